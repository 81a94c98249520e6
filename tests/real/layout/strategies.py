"""Layouts of every kind, and engines' memory for them."""

from __future__ import annotations

from typing import Any, List, Sequence, Tuple

import msgspec
import torch
from hypothesis import strategies as st

from kvreal.layout.paged import Paged
from kvreal.layout.shape import ITEM_BYTES, Group, Layout, Part, Stored

BLOCKS = 9

FORMS: List[Tuple[Tuple[Part, ...], ...]] = [
    ((Part("k", 2, 4, "bfloat16"), Part("v", 2, 4, "bfloat16")),),
    ((Part("k", 1, 8, "float32"), Part("v", 1, 8, "float32")),),
    ((Part("k", 3, 4, "float16"), Part("v", 3, 6, "float16")),),
    ((Part("latent", 1, 12, "bfloat16"),),),
    ((Part("latent", 1, 8, "bfloat16"), Part("rope", 1, 4, "bfloat16")),),
    (
        (
            Part("k_scale", 2, 1, "float32"), Part("v_scale", 2, 1, "float32"),
            Part("k", 2, 4, "float8_e4m3fn"), Part("v", 2, 4, "float8_e4m3fn"),
        ),
    ),
    ((Part("packed", 1, 13, "uint8"),),),
    ((Part("k", 2, 4, "bfloat16"), Part("v", 2, 4, "bfloat16")), (Part("latent", 1, 6, "float16"),)),
]  # fmt: skip
"""What a token has, by group of layers."""


class Kept(msgspec.Struct):
    """One engine: a layout, its blocks, and a block table for each group."""

    layout: Layout
    tensors: List[List[Any]]
    tables: List[List[int]]
    paged: Paged

    def raw(self) -> List[Any]:
        """A copy of all bytes, a tensor each."""
        return [t.contiguous().view(torch.uint8).clone() for group in self.tensors for t in group]


@st.composite
def groups(draw: st.DrawFn, parts: Tuple[Part, ...], layers: int) -> Group:
    """One way to keep these parts: block size, together or apart, dimensions in any order, some of them split."""
    block_tokens = draw(st.sampled_from([1, 2, 4, 6, 8]))
    alike = len({(part.heads, part.channels, part.dtype) for part in parts}) == 1
    if len(parts) > 1 and alike and draw(st.booleans()):
        held = [tuple(part.name for part in parts)]
    else:
        held = [(part.name,) for part in parts]
    shapes = {part.name: part for part in parts}
    stored = []
    for names in held:
        part = shapes[names[0]]
        words = ["block", "token"]
        words += ["head"] if part.heads > 1 or draw(st.booleans()) else []
        words += ["channel"] if part.channels > 1 or draw(st.booleans()) else []
        words += ["part"] if len(names) > 1 or draw(st.booleans()) else []
        words += ["layer"] if draw(st.booleans()) else []
        words += ["token"] if block_tokens % 2 == 0 and draw(st.booleans()) else []
        words += ["channel"] if "channel" in words and part.channels % 2 == 0 and draw(st.booleans()) else []
        stored.append(Stored(names, " ".join(draw(st.permutations(words)))))
    return Group(layers, block_tokens, parts, tuple(stored))


@st.composite
def tensors(draw: st.DrawFn, group: Group, blocks: int) -> List[Any]:
    """What an engine would have allocated, full of noise: dense, or every other item of something larger."""
    named = {part.name: part for part in group.parts}
    found = []
    for layer in range(group.layers):
        for stored in group.stored:
            if layer and "layer" in stored.words:
                continue
            part = named[stored.parts[0]]
            sizes = {
                "layer": group.layers, "part": len(stored.parts), "block": blocks, "token": group.block_tokens,
                "head": part.heads, "channel": part.channels,
            }  # fmt: skip
            shape = []
            for at, word in enumerate(stored.words):
                if stored.words.count(word) == 1:
                    shape.append(sizes[word])
                else:  # two dimensions of it: the first is 2
                    shape.append(2 if stored.words.index(word) == at else sizes[word] // 2)
            found.append(_noise(shape, part.dtype, draw(st.booleans())))
    return found


def _noise(shape: Sequence[int], dtype: str, strided: bool) -> Any:
    size = ITEM_BYTES[dtype]
    whole = [*shape[:-1], shape[-1] * 2] if strided else list(shape)
    raw = torch.randint(0, 256, (*whole[:-1], whole[-1] * size), dtype=torch.uint8)
    tensor = raw.view(getattr(torch, dtype))
    return tensor[..., ::2] if strided else tensor


@st.composite
def engines(draw: st.DrawFn, form: Tuple[Tuple[Part, ...], ...], layers: Tuple[int, ...], tokens: int) -> Kept:
    layout = Layout(tuple(draw(groups(parts, count)) for parts, count in zip(form, layers)))
    given = []
    tables = []
    for group in layout.groups:
        needed = -(-tokens // group.block_tokens)
        blocks = needed + draw(st.integers(0, 3))
        given.append(draw(tensors(group, blocks)))
        tables.append(draw(st.permutations(range(blocks)))[:needed])
    return Kept(layout, given, tables, Paged(layout, given))


@st.composite
def pairs(draw: st.DrawFn) -> Tuple[Kept, Kept, int, int]:
    """Two engines of one form, (start, number of tokens) of a chunk."""
    form = draw(st.sampled_from(FORMS))
    layers = tuple(draw(st.integers(1, 3)) for _ in form)
    start = draw(st.integers(0, 20))
    tokens = draw(st.integers(1, 24))
    torch.manual_seed(draw(st.integers(0, 9)))
    return (
        draw(engines(form, layers, start + tokens)), draw(engines(form, layers, start + tokens)), start, tokens,
    )  # fmt: skip
