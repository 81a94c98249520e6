"""Pools of warm processes for the tests of the real world, and the promise that none of them outlives the tests."""

from __future__ import annotations

from typing import Iterator

import pytest

pytest.importorskip("zmq", reason="the real world is not installed: no pyzmq")
pytest.importorskip("numpy", reason="the real world is not installed: no numpy")

from kvreal.pool import Pool
from kvreal.transfer import available


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The fastest transport that is installed here."""
    with Pool("auto") as found:
        yield found
    assert not [host for host in found.all if host.process.poll() is None]


@pytest.fixture(scope="session")
def tcp_pool() -> Iterator[Pool]:
    with Pool("tcp") as found:
        yield found


@pytest.fixture(scope="session")
def socket_pool() -> Iterator[Pool]:
    with Pool("socket") as found:
        yield found


@pytest.fixture(params=["nixl", "socket", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    """Each transport; one that is not installed is skipped by name."""
    name: str = request.param
    if name not in ("tcp", *available()):
        pytest.skip(f"transport {name} is not installed here")
    return name
