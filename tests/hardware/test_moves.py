"""Byte-exact moves over every transport, between every two kinds of memory, in every layout, by one rank and several.

Each move is a whole one: processes, protocol, transport; then the source's memory is overwritten and each process
compares every byte of what it holds. The last chunk is always a partial one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvreal.pool import Pool
from tests.hardware.found import Case, need
from tests.hardware.plays import moved, of_case, row

pytestmark = [pytest.mark.real, pytest.mark.hardware, pytest.mark.timeout(300)]


def test_between_instances(
    case: Case, pool_of: Callable[[str], Pool], note: Callable[..., None], tmp_path: Path
) -> None:
    need(case.transport, case.source, case.target)
    result, phases = moved(case, of_case(case), pool_of(case.transport), tmp_path / "log")
    carried = result.transport or ""
    if case.transport != "tcp" and "disk" in (case.source, case.target):
        assert carried == "unix"  # files have no addresses: their chunks are staged
    elif case.transport == "nixl":
        assert carried.startswith("nixl/ucx/") and "unknown" not in carried
    elif case.transport == "nixl over tcp":
        assert carried == "nixl/ucx/tcp"
    elif case.transport == "nixl over rdma":
        assert "rc" in carried
    elif case.transport == "tcp":
        assert carried == "tcp"
    note(**row(case, result, phases))


def test_between_tiers_of_one_instance(
    tier: Case, pool_of: Callable[[str], Pool], note: Callable[..., None], tmp_path: Path
) -> None:
    need(tier.source, tier.target)
    result, phases = moved(tier, of_case(tier, within=True), pool_of(tier.transport), tmp_path / "log")
    note(**row(tier, result, phases))


def test_pinned_where_there_is_cuda() -> None:
    """A GPU copies from and to CPU memory at its full rate only if that is page-locked."""
    need("gpu")
    import torch

    from kvreal.slab import Slab

    assert torch.cuda.is_available()
    slab = Slab("cpu", 1 << 20)
    assert slab.pinned
    there = Slab("gpu", 1 << 20)
    slab.bytes[:] = 7
    there.tensor.copy_(torch.from_numpy(slab.bytes), non_blocking=True)
    torch.cuda.synchronize()
    assert bool((there.tensor == 7).all())
