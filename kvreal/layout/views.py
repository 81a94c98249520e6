"""One part of one layer in an engine's blocks: tokens out of it, and into it.

Bytes are moved as integers of the item's size, so that no dtype is interpreted and none need be known to an operation.
``View`` is plain torch, on any device, and what the others are compared with. ``HostView`` does the same on a CPU by
NumPy: torch starts its threads anew for every plane, and waits for them; beside a busy engine that costs more than it
gains, and even alone one thread of NumPy scatters faster.
"""

from __future__ import annotations

from typing import Any, Final, List, Tuple

import msgspec
import numpy as np
import torch

from kvreal.layout.shape import Plane

Tensor = Any  # torch is too large for mypy to follow

INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Piece(msgspec.Struct, frozen=True):
    """``count`` tokens of a chunk, from its token ``first`` on, that lie in ``block`` from ``offset`` on."""

    block: int
    offset: int
    first: int
    count: int


class Cut(msgspec.Struct, frozen=True):
    """Tokens [first, last) of a chunk fill ``blocks``; the others lie in ``pieces``, or (``absent``) nowhere."""

    blocks: Tensor
    first: int
    last: int
    pieces: List[Piece]
    absent: bool


class View:
    """``tensor``: integers, as [block][token...][head][channel...], any strides, tokens in ``token_dims`` dimensions.
    ``rows`` are its items as [token][head * channel], contiguous, on the same device."""

    def __init__(self, plane: Plane, tensor: Tensor, token_dims: int) -> None:
        self.plane: Plane = plane
        self.tensor: Tensor = tensor
        self.token_dims: int = token_dims

    @property
    def row(self) -> int:
        """Items of one token."""
        return self.plane.part.heads * self.plane.part.channels

    def take(self, cut: Cut, rows: Tensor) -> None:
        """Out of the blocks into ``rows``."""
        if cut.absent:
            rows.zero_()
        if cut.blocks is not None:
            out = rows[cut.first : cut.last].view(len(cut.blocks), *self.tensor.shape[1:])
            torch.index_select(self.tensor, 0, cut.blocks, out=out)
        for piece in cut.pieces:
            there = self._narrow(piece) if self.token_dims == 1 else self.tensor[self._where(piece)]
            self._piece(rows, piece).copy_(there)

    def give(self, cut: Cut, rows: Tensor) -> None:
        """Out of ``rows`` into the blocks."""
        if cut.blocks is not None:
            source = rows[cut.first : cut.last].view(len(cut.blocks), *self.tensor.shape[1:])
            self.tensor.index_copy_(0, cut.blocks, source)
        for piece in cut.pieces:
            if self.token_dims == 1:
                self._narrow(piece).copy_(self._piece(rows, piece))
            else:
                self.tensor[self._where(piece)] = self._piece(rows, piece)

    def _piece(self, rows: Tensor, piece: Piece) -> Tensor:
        shape = (piece.count, *self.tensor.shape[1 + self.token_dims :])
        return rows[piece.first : piece.first + piece.count].view(shape)

    def _narrow(self, piece: Piece) -> Tensor:
        return self.tensor[piece.block].narrow(0, piece.offset, piece.count)

    def _where(self, piece: Piece) -> Tuple[Any, ...]:
        """The indices of a piece's tokens one by one, in as many dimensions as a block's tokens have."""
        rest = torch.arange(piece.offset, piece.offset + piece.count, device=self.tensor.device)
        levels: List[Tensor] = []
        for size in reversed(self.tensor.shape[1 : 1 + self.token_dims]):
            levels.append(rest % size)
            rest = rest // size
        return (piece.block, *reversed(levels))


class HostView(View):
    """The same, for memory that the host reaches."""

    def __init__(self, plane: Plane, tensor: Tensor, token_dims: int) -> None:
        super().__init__(plane, tensor, token_dims)
        self.array: Any = tensor.numpy()
        self.lines: Any = None
        """Where a block lies in one piece: memory as lines of a block's size, ``apart`` of them from block to block."""
        self.apart: int = 0
        count, size, stride = tensor.shape[0], tensor[0].numel(), tensor.stride(0)
        if count and tensor[0].is_contiguous() and stride % size == 0:
            self.apart = stride // size
            shape, strides = ((count - 1) * self.apart + 1, size), (size * tensor.element_size(), tensor.element_size())
            self.lines = np.lib.stride_tricks.as_strided(self.array, shape, strides)

    def take(self, cut: Cut, rows: Tensor) -> None:
        if cut.absent:
            rows.zero_()
        to = rows.numpy()
        if cut.blocks is not None:
            blocks = cut.blocks.numpy()
            whole = to[cut.first : cut.last]
            if self.lines is not None:  # the numbers have been checked: mode "clip" only spares a copy
                np.take(self.lines, blocks * self.apart, 0, whole.reshape(len(blocks), -1), "clip")
            else:
                for target, block in zip(whole.reshape(len(blocks), *self.array.shape[1:]), blocks):
                    target[...] = self.array[block]
        for piece in cut.pieces:
            self._rows(to, piece)[...] = self.array[self._at(piece)]

    def give(self, cut: Cut, rows: Tensor) -> None:
        fro = rows.numpy()
        if cut.blocks is not None:
            blocks = cut.blocks.numpy()
            whole = fro[cut.first : cut.last]
            if self.lines is not None:
                self.lines[blocks * self.apart] = whole.reshape(len(blocks), -1)
            else:
                for source, block in zip(whole.reshape(len(blocks), *self.array.shape[1:]), blocks):
                    self.array[block] = source
        for piece in cut.pieces:
            self.array[self._at(piece)] = self._rows(fro, piece)

    def _rows(self, rows: Any, piece: Piece) -> Any:
        shape = (piece.count, *self.array.shape[1 + self.token_dims :])
        return rows[piece.first : piece.first + piece.count].reshape(shape)

    def _at(self, piece: Piece) -> Tuple[Any, ...]:
        if self.token_dims == 1:
            return piece.block, slice(piece.offset, piece.offset + piece.count)
        shape = self.array.shape[1 : 1 + self.token_dims]
        return (piece.block, *np.unravel_index(np.arange(piece.offset, piece.offset + piece.count), shape))
