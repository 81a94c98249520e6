"""An engine's tensors, checked against what its layout says of them, and made anew for engines that have none yet."""

from __future__ import annotations

import math
from typing import Any, Dict, Final, List, Sequence, Tuple

import torch

from kvreal.layout.shape import ITEM_BYTES, Group, Layout, LayoutError, Part, Stored
from kvreal.layout.views import INTEGERS, Tensor

DIMENSIONS: Final = ("block", "token", "head", "channel")

Planes = Dict[Tuple[int, int, str], Tuple[Tensor, int]]
"""(group, layer, part) -> [block][token...][head][channel...], and in how many dimensions its tokens lie."""


def allocate(layout: Layout, blocks: Sequence[int], device: Any = "cpu") -> List[List[Tensor]]:
    """Tensors for a layout, zeros, with ``blocks[group]`` blocks. LayoutError: a split dimension's sizes are unsaid."""
    found: List[List[Tensor]] = []
    for group, count in zip(layout.groups, blocks):
        named = {part.name: part for part in group.parts}
        tensors: List[Tensor] = []
        for layer, stored in [(layer, stored) for layer in range(group.layers) for stored in group.stored]:
            if layer and "layer" in stored.words:
                continue
            part = named[stored.parts[0]]
            sizes = {**_sizes(group, stored, part), "block": count}
            if len(set(stored.words)) < len(stored.words):
                raise LayoutError(f"axes '{stored.axes}': nobody says how large each part of a split dimension is")
            shape = [sizes[word] for word in stored.words]
            tensors.append(torch.zeros(shape, dtype=getattr(torch, part.dtype), device=device))
        found.append(tensors)
    return found


def bind(number: int, group: Group, given: List[Tensor], parts: Planes) -> int:
    """Sort a group's tensors into ``parts``; returns how many blocks there are."""
    blocks = 0
    stored_of = [(layer, stored) for layer in range(group.layers) for stored in group.stored]
    wanted = [(layer, one) for layer, one in stored_of if layer == 0 or "layer" not in one.words]
    if len(given) != len(wanted):
        raise LayoutError(f"group {number}: {len(given)} tensors given, expected {len(wanted)} ({group.layers} layers)")
    for (layer, stored), tensor in zip(wanted, given):
        named = {part.name: part for part in group.parts}
        held = [named[name] for name in stored.parts]
        where = f"group {number}, layer {layer}, {'+'.join(stored.parts)}"
        tensor = _checked(where, group, stored, held, tensor)
        count = tensor.shape[stored.words.index("block")]
        if blocks and count != blocks:
            raise LayoutError(f"{where}: {count} blocks, the group's first tensor has {blocks}")
        blocks = count
        layers = range(group.layers) if "layer" in stored.words else [layer]
        for at in layers:
            for index, part in enumerate(held):
                parts[number, at, part.name] = _plane(tensor, stored.words, at, index)
    return blocks


def _checked(where: str, group: Group, stored: Stored, held: List[Part], tensor: Tensor) -> Tensor:
    words = stored.words
    part = held[0]
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != part.dtype:
        raise LayoutError(f"{where}: the tensor is {dtype}, expected {part.dtype}")
    expected = _sizes(group, stored, part)
    shape = list(tensor.shape)
    sizes = {word: math.prod([size for size, axis in zip(shape, words) if axis == word]) for word in words}
    if len(shape) != len(words) or any(sizes[word] != expected.get(word, sizes[word]) for word in words):
        told = " ".join([f"{word}={expected[word]}" if word in expected else word for word in words])
        raise LayoutError(f"{where}: the tensor's shape is {tuple(shape)}, expected ({told})")
    return tensor.view(INTEGERS[ITEM_BYTES[part.dtype]])


def _sizes(group: Group, stored: Stored, part: Part) -> Dict[str, int]:
    """Of a tensor, in its words; the number of blocks is the engine's own."""
    return {
        "layer": group.layers,
        "part": len(stored.parts),
        "token": group.block_tokens,
        "head": part.heads,
        "channel": part.channels,
    }


def _plane(tensor: Tensor, words: List[str], layer: int, index: int) -> Tuple[Tensor, int]:
    """One part of one layer, as [block][token...][head][channel...], and how many dimensions its tokens have."""
    left = list(words)
    for word, at in (("layer", layer), ("part", index)):
        if word in left:
            tensor = tensor.select(left.index(word), at)
            left.remove(word)
    order: List[int] = []
    for word in DIMENSIONS:
        order += [dim for dim, name in enumerate(left) if name == word]
    tensor = tensor.permute(order)
    sorted_words = [left[dim] for dim in order]
    if "head" not in sorted_words:
        at = 1 + sorted_words.count("token")
        tensor = tensor.unsqueeze(at)
    return tensor, left.count("token")
