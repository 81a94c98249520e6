"""Blocks as vLLM's CPU attention packs them: each half of a (head, block) is K and V in an order of its own."""

from __future__ import annotations

from typing import Any, Tuple

import pytest
import torch

from kvreal.layout.paged import Paged
from kvreal.layout.shape import Group, Layout, Part, Stored

BLOCKS, HEADS, BLOCK, CHANNELS = 5, 2, 32, 64


def vec(k: Any, v: Any) -> Tuple[Any, Any]:
    """K [channel][token], V [token][channel]; given as [block][head][token][channel]."""
    return k.transpose(2, 3), v


def amx(k: Any, v: Any) -> Tuple[Any, Any]:
    """K [token / 16][channel / 2][16 tokens][2], V [channel / 16][token / 2][16 channels][2 tokens]."""
    return (
        k.unflatten(2, (-1, 16)).unflatten(4, (-1, 2)).permute(0, 1, 2, 4, 3, 5),
        v.unflatten(2, (-1, 2)).unflatten(4, (-1, 16)).permute(0, 1, 4, 2, 5, 3),
    )


WAYS = {
    "vec": (vec, "float32", "block head channel token", "block head token channel"),
    "amx": (amx, "bfloat16", "block head token channel token channel", "block head channel token channel token"),
}


def stated(way: str) -> Layout:
    _, dtype, k, v = WAYS[way]
    parts = (Part("k", HEADS, CHANNELS, dtype), Part("v", HEADS, CHANNELS, dtype))
    return Layout((Group(1, BLOCK, parts, (Stored(("k",), k), Stored(("v",), v))),))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("start", "tokens"), [(0, 3 * BLOCK), (0, 12), (7, 50)])
def test_a_packed_block_is_a_layout_like_any_other(way: str, start: int, tokens: int) -> None:
    """So that 12 tokens of a packed block travel as 12 tokens, and to engines that pack otherwise."""
    pack, dtype, _, _ = WAYS[way]
    shape = (BLOCKS, HEADS, BLOCK, CHANNELS)
    plain = [torch.randn(shape).to(getattr(torch, dtype)) for _ in "kv"]
    packed = [half.contiguous() for half in pack(*plain)]
    # one tensor holds both, as the engine has it: the first half of each (block, head) is K
    whole = torch.stack([half.reshape(BLOCKS, HEADS, -1) for half in packed], 2)
    given = [whole[:, :, at].unflatten(2, packed[at].shape[2:]) for at in (0, 1)]
    paged = Paged(stated(way), [given])
    table = [4, 0, 2]
    chunk = torch.zeros(tokens * paged.layout.bytes_per_token, dtype=torch.uint8)
    paged.gather([table], start, tokens, chunk)
    rows = [half[table].transpose(1, 2).reshape(3 * BLOCK, -1)[start : start + tokens] for half in plain]
    assert torch.equal(chunk, torch.cat([part.contiguous().view(torch.uint8).reshape(-1) for part in rows]))
    before = whole.clone()
    paged.scatter([table], start, tokens, chunk)
    assert torch.equal(whole, before)
    whole.zero_()
    paged.scatter([table], start, tokens, chunk)
    again = torch.zeros_like(chunk)
    paged.gather([table], start, tokens, again)
    assert torch.equal(chunk, again) and int((whole != 0).sum()) == int((torch.cat(rows, 1) != 0).sum())
