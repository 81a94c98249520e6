"""The Triton kernel against the torch version, byte for byte: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, List, Tuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvreal.layout.bind import allocate
from kvreal.layout.gpu import Copier, why_not
from kvreal.layout.paged import Paged
from kvreal.layout.shape import Part, like
from tests.real.layout.strategies import FORMS, Kept, engines, pairs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAN = HAS_TRITON and (DEVICE == "cuda" or INTERPRETED)
WHY = "triton is not installed" if not HAS_TRITON else "no CUDA device (and not in Triton's interpreter)"
here = pytest.mark.skipif(not CAN, reason=WHY)
QUICK = settings(
    max_examples=40 if INTERPRETED else 150, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip


def moved(kept: Kept) -> Kept:
    """The same engine on the device; strides as they were."""
    given = []
    for group in kept.tensors:
        given.append([_there(tensor) for tensor in group])
    return Kept(kept.layout, given, kept.tables, Paged(kept.layout, given))


def _there(tensor: Any) -> Any:
    bits = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=bits.dtype, device=DEVICE)
    copy.copy_(bits)
    return copy.view(tensor.dtype)


def items(kept: Kept) -> List[Any]:
    return [view.tensor.cpu().clone() for view in kept.paged.views]


@here
@QUICK
@given(pairs(), st.data())
def test_it_copies_what_torch_copies(pair: Tuple[Kept, Kept, int, int], data: st.DataObject) -> None:
    one, other, start, tokens = pair
    gone = data.draw(st.booleans())
    one, other = moved(one), moved(other)
    for kept in (one, other):
        if gone and kept.tables[0]:
            kept.tables[0][data.draw(st.integers(0, len(kept.tables[0]) - 1))] = -1
    size = tokens * one.layout.bytes_per_token
    expected = torch.full((size,), 7, dtype=torch.uint8, device=DEVICE)
    odd = data.draw(st.integers(0, 1)) * 4  # slots need not begin at multiples of eight
    chunk = torch.full((odd + size,), 9, dtype=torch.uint8, device=DEVICE)[odd:]
    one.paged.gather(one.tables, start, tokens, expected)
    Copier(one.paged).gather(one.tables, start, tokens, chunk)
    assert torch.equal(chunk, expected)
    before = items(other)
    Copier(other.paged).scatter(other.tables, start, tokens, chunk)
    after = items(other)
    for view, old in zip(other.paged.views, before):
        view.tensor.copy_(old)
    other.paged.scatter(other.tables, start, tokens, chunk)
    assert all(torch.equal(a, b) for a, b in zip(after, items(other)))


@here
def test_wide_and_narrow_items_are_both_used() -> None:
    """What lies one after the other goes eight bytes at a time; all layers in one launch."""
    kv = (Part("k", 4, 64, "bfloat16"), Part("v", 4, 64, "bfloat16"))
    for axes, size, count in (("part block token head channel", 8, 1), ("part block head token channel", 2, 1)):
        layout = like(kv, 3, 16, axes)
        tensors = allocate(layout, [5], DEVICE)
        launches = Copier(Paged(layout, tensors)).launches
        assert [launch.item_bytes for launch, _, _ in launches] == [size] * count
        assert sum(len(bases) for _, bases, _ in launches) == 6


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (its interpreter needs no GPU)")
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernel itself runs here")
def test_in_tritons_interpreter() -> None:
    """Where there is no GPU: the tests above, once more, in a process that interprets the kernel."""
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(Path(__file__))]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (its compiler needs no GPU)")
@pytest.mark.skipif(INTERPRETED, reason="what is interpreted is not compiled")
@pytest.mark.parametrize(("size", "row"), [(8, 256), (4, 2), (2, 1024), (1, 13)])
@pytest.mark.parametrize("gather", [True, False])
def test_it_compiles_for_gpus_that_are_not_here(size: int, row: int, gather: bool) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kvreal.layout import kernel

    constants = {
        "BLOCK_TOKENS": 16, "LOW_TOKENS": 16, "ROW": row, "CHANNELS": row, "LOW_CHANNELS": row,
        "ITEM": kernel.ITEMS[size], "GATHER": gather, "TOKENS_EACH": 16, "ITEMS_EACH": 16,
    }  # fmt: skip
    pointers = {"chunk": "*u8", "bases": "*i64", "offsets": "*i64", "table": "*i64"}
    numbers = dict.fromkeys(kernel.copy.arg_names[4:12], "i64")
    source = ASTSource(kernel.copy, {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}, constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert f"st.global.b{8 * size}" in ptx


@QUICK
@given(st.data())
def test_where_it_cannot_run_it_says_why(data: st.DataObject) -> None:
    kept = data.draw(engines(FORMS[0], (1,), 8))
    why = why_not(kept.paged)
    if not HAS_TRITON:
        assert why == "triton is not installed"
    elif INTERPRETED:
        assert why == ""
    else:
        assert why == "the KV is on cpu, not on a CUDA device"
    if why:
        with pytest.raises(ValueError, match=why):
            Copier(kept.paged)
