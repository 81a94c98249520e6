"""What every transport must do by itself (``kvreal.transfer.conformance``), between every two kinds of memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest

from kvreal.transfer.conformance import Conformance
from tests.hardware.found import KINDS, known_transports, need, way

pytestmark = [pytest.mark.real, pytest.mark.hardware, pytest.mark.timeout(300)]

PAIRS = [(source, target) for source in KINDS for target in KINDS]


@pytest.fixture(scope="class", autouse=True)
def arena(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both processes of a pair share one, where that is what is tested."""
    if request.cls.transport != "arena":
        yield
        return
    with tempfile.TemporaryDirectory(prefix="kvmove-", dir="/dev/shm", ignore_cleanup_errors=True) as folder:
        request.cls.env = {"KVMOVE_ARENA": folder}
        yield


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest) -> None:
    need(*request.cls.what)


for _transport in known_transports():
    for _source, _target in PAIRS:
        _name, _env = way(_transport)
        _words = f"{_transport} {_source} to {_target}"
        globals()[f"Test {_words}"] = type(
            f"Test {_words}", (Conformance,),
            {
                "transport": _name, "env": _env, "locations": (KINDS[_source], KINDS[_target]),
                "what": (_transport, _source, _target),
            },
        )  # fmt: skip
