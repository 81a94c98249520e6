"""When the Triton kernel can run, and what it is launched with."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Dict, Final, List, Sequence, Tuple

import msgspec
import torch

from kvreal.layout.paged import Paged, Tables
from kvreal.layout.views import View

Tensor = Any
TOKENS_EACH: Final = 16
"""Of one program; and up to 256 items of each."""


def why_not(paged: Paged) -> str:
    """"" if the kernel can copy this engine's KV; else what is missing, in a few words."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if paged.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the KV is on {paged.device}, not on a CUDA device"
    if any(view.token_dims > 2 or view.tensor.dim() - view.token_dims > 4 for view in paged.views):
        return "tokens or channels are split into more than two dimensions"
    return ""


class Launch(msgspec.Struct, frozen=True):
    """Planes that differ only in where they begin."""

    group: int
    item_bytes: int
    block_tokens: int
    low_tokens: int
    row: int
    channels: int
    low_channels: int
    strides: Tuple[int, ...]
    """Of block, token (high, low), head, channel (high, low), in items."""


class Copier:
    """A paged KV's launches, worked out once. ``gather`` and ``scatter`` are those of Paged."""

    def __init__(self, paged: Paged) -> None:
        """ValueError: ``why_not`` has the reason."""
        why = why_not(paged)
        if why:
            raise ValueError(why)
        self.paged: Paged = paged
        planes: Dict[Launch, List[View]] = {}
        for view in paged.views:
            planes.setdefault(_launch(paged, view), []).append(view)
        self.launches: List[Tuple[Launch, Tensor, Tensor]] = []
        for launch, views in planes.items():
            bases = self._numbers([view.tensor.data_ptr() for view in views])
            self.launches.append((launch, bases, self._numbers([view.plane.offset_bytes for view in views])))

    def _numbers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.paged.device)

    def gather(self, tables: Tables, start: int, num_tokens: int, chunk: Tensor) -> None:
        self._copy(tables, start, num_tokens, chunk, True)

    def scatter(self, tables: Tables, start: int, num_tokens: int, chunk: Tensor) -> None:
        self._copy(tables, start, num_tokens, chunk, False)

    def _copy(self, tables: Tables, start: int, num_tokens: int, chunk: Tensor, gather: bool) -> None:
        from kvreal.layout import kernel

        self.paged.check(tables, start, num_tokens, chunk)
        if not num_tokens:
            return
        aligned = chunk if chunk.data_ptr() % 8 == 0 else chunk.clone()
        blocks: List[Tensor] = []
        for group, table in zip(self.paged.layout.groups, tables):
            first, last = start // group.block_tokens, -(-(start + num_tokens) // group.block_tokens)
            blocks.append(self._numbers(table[first:last]))
        for launch, bases, offsets in self.launches:
            items_each = min(256, 1 << (launch.row - 1).bit_length())
            grid = (len(bases), -(-num_tokens // TOKENS_EACH), -(-launch.row // items_each))
            kernel.copy[grid](
                aligned, bases, offsets, blocks[launch.group], start % launch.block_tokens, num_tokens, *launch.strides,
                BLOCK_TOKENS=launch.block_tokens, LOW_TOKENS=launch.low_tokens, ROW=launch.row,
                CHANNELS=launch.channels, LOW_CHANNELS=launch.low_channels, ITEM=kernel.ITEMS[launch.item_bytes],
                GATHER=gather, TOKENS_EACH=TOKENS_EACH, ITEMS_EACH=items_each,
            )  # fmt: skip
        if gather and aligned is not chunk:
            chunk.copy_(aligned)


def _launch(paged: Paged, view: View) -> Launch:
    tensor, dims = view.tensor, view.token_dims
    shape, strides = list(tensor.shape), list(tensor.stride())
    if dims == 1:  # a dimension of one before it
        shape.insert(1, 1)
        strides.insert(1, 0)
    if len(shape) < 5:  # no channel dimension: one of one
        shape.append(1)
        strides.append(1)
    if len(shape) < 6:
        shape.insert(4, 1)
        strides.insert(4, 0)
    heads, high, low = shape[3:]
    if high == 1 and (heads == 1 or strides[3] == low * strides[5]):  # a token's heads lie one after the other
        heads, low, strides[3] = 1, heads * low, 0
    block_tokens = paged.layout.groups[view.plane.group].block_tokens
    launch = Launch(
        view.plane.group, tensor.element_size(), block_tokens, shape[2], view.row, high * low, low, tuple(strides)
    )
    return _widened(paged, view, launch)


def _widened(paged: Paged, view: View, launch: Launch) -> Launch:
    """Eight bytes at a time, where a token's items lie one after the other and all begins at multiples of eight."""
    size = launch.item_bytes
    by = 8 // size
    if launch.channels != launch.row or launch.low_channels != launch.row or launch.strides[5] != 1:
        return launch
    counts = [launch.row, *launch.strides[:5]]
    if any(count % by for count in counts) or view.tensor.data_ptr() % 8 or view.plane.offset_bytes % 8:
        return launch
    row = launch.row // by
    strides = (*[stride // by for stride in launch.strides[:5]], 1)
    return msgspec.structs.replace(launch, item_bytes=8, row=row, channels=row, low_channels=row, strides=strides)
