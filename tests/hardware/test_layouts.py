"""An engine's paged KV into slots and out again, where both lie here: the same bytes as plain torch copies on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")

from kvreal.layout.bind import allocate  # noqa: E402
from kvreal.layout.paged import Paged  # noqa: E402
from kvreal.layout.shape import Group, Layout, Part, Stored, like  # noqa: E402
from kvreal.layout.slots import Copies, slot  # noqa: E402
from kvreal.memory import Memory  # noqa: E402

KV = (Part("k", 8, 128, "bfloat16"), Part("v", 8, 128, "bfloat16"))
MLA = (Part("latent", 1, 512, "bfloat16"), Part("rope", 1, 64, "bfloat16"))
FP8 = (
    Part("k_scale", 8, 1, "float32"), Part("v_scale", 8, 1, "float32"),
    Part("k", 8, 128, "float8_e4m3fn"), Part("v", 8, 128, "float8_e4m3fn"),
)  # fmt: skip
SCALED = tuple([Stored((part.name,), "block token head channel") for part in FP8])
PAIRS = {
    "K and V together": (like(KV, 8, 16), like(KV, 8, 64, "block part token head channel")),
    "K and V apart": (like(KV, 8, 16, "block token head channel"), like(KV, 8, 32, "block head channel token")),
    "MLA": (like(MLA, 6, 64, "block token channel"), like(MLA, 6, 16, "token block channel")),
    "fp8 with scales": (Layout((Group(4, 16, FP8, SCALED),)), Layout((Group(4, 32, FP8, SCALED),))),
}
TOKENS = 300
STARTS = ((0, 256), (256, 44))
"""A whole chunk and a partial one."""
LOCATIONS = {"cpu": "LocalCPUBackend", "gpu": "LocalGPUBackend"}
DEVICES = {"cpu": "cpu", "gpu": "cuda"}

gpu = pytest.param(
    "gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch sees none")
)


def noisy(layout: Layout, device: str) -> tuple[Paged, Any]:
    """An engine full of noise on ``device``, and its double on the CPU, copied by plain torch."""
    blocks = [-(-TOKENS // group.block_tokens) + 3 for group in layout.groups]
    given = allocate(layout, blocks)
    for tensor in given[0]:
        tensor.view(torch.uint8).random_()
    there = [[tensor.to(device) for tensor in given[0]]]
    return Paged(layout, there), Paged(layout, given, plain=True)


def table(layout: Layout, seed: int) -> list[int]:
    size = layout.groups[0].block_tokens
    order = torch.randperm(-(-TOKENS // size) + 3, generator=torch.Generator().manual_seed(seed))
    found: list[int] = order.tolist()
    return found[: -(-TOKENS // size)]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("engine", ["cpu", gpu])
@pytest.mark.parametrize("location", ["cpu", gpu])
def test_bytes_are_those_of_plain_copies(name: str, engine: str, location: str) -> None:
    one, other = PAIRS[name]
    assert one.form == other.form
    memory = Memory()
    memory.lay_out([(LOCATIONS[location], 2)], 256 * one.bytes_per_token)
    source, its_double = noisy(one, DEVICES[engine])
    target, target_double = noisy(other, DEVICES[engine])
    fro, to = [table(one, 1)], [table(other, 2)]
    for number, (start, tokens) in enumerate(STARTS):
        chunk = slot(memory, LOCATIONS[location], number, tokens * one.bytes_per_token)
        Copies(source).store(fro, start, tokens, chunk)
        expected = torch.empty(chunk.numel(), dtype=torch.uint8)
        its_double.gather(fro, start, tokens, expected)
        assert torch.equal(chunk.cpu(), expected)
        Copies(target).load(to, start, tokens, chunk)
        target_double.scatter(to, start, tokens, expected)
    for view, double in zip(target.views, target_double.views):
        assert torch.equal(view.tensor.cpu(), double.tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch sees none")
def test_the_kernel_is_used() -> None:
    pytest.importorskip("triton", reason="triton is not installed: chunks are copied by torch, a plane at a time")
    assert Copies(noisy(PAIRS["MLA"][0], "cuda")[0]).why_torch == ""
