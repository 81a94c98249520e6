"""An engine's paged KV, bound to its layout: gather tokens into a chunk's bytes, scatter a chunk's bytes into blocks.

    paged = Paged(layout, [[layer_0, layer_1, ...]])         # for each group its tensors: for each layer, each stored
    paged.gather([table], start, num_tokens, chunk)          # chunk: num_tokens * bytes_per_token of uint8
    paged.scatter([table], start, num_tokens, chunk)

Token t of a sequence lies in block ``table[t // block_tokens]``, at t % block_tokens. A block of -1 is not there (a
sliding window has passed it): its tokens are zeros in the chunk, and are left out by ``scatter``.

Bytes are moved as integers of the item's size, so that no dtype is interpreted and none need be known to an operation.
This file is plain torch, on any device, and what the Triton kernel is compared with. Whole blocks go by one operation
a plane, what lies beside them by one a piece; scattering writes no token but the chunk's own.
"""

from __future__ import annotations

import math
from typing import Any, Dict, Final, List, Sequence, Tuple

import msgspec
import torch

from kvreal.layout.shape import ITEM_BYTES, Group, Layout, LayoutError, Part, Plane, Stored

Tensor = Any  # torch is too large for mypy to follow
Tables = Sequence[Sequence[int]]
"""For each group the blocks of one sequence, first to last."""

INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
DIMENSIONS: Final = ("block", "token", "head", "channel")


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


class View(msgspec.Struct, frozen=True):
    """A plane in the engine's memory: integers, as [block][token...][head][channel...], any strides.
    ``rows`` are its items as [token][head * channel], contiguous."""

    plane: Plane
    tensor: Tensor
    token_dims: int

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
            _put(self.tensor, cut.blocks, source)
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


class Paged:
    def __init__(self, layout: Layout, tensors: Sequence[Sequence[Tensor]]) -> None:
        """``tensors[group]``: for each layer, for each of the group's ``stored``, a tensor; one for all layers where
        its axes name ``layer``. LayoutError if one is not as the layout says."""
        if len(tensors) != len(layout.groups):
            raise LayoutError(f"{len(tensors)} groups of tensors given, the layout has {len(layout.groups)}")
        self.layout: Layout = layout
        parts: Dict[Tuple[int, int, str], Tuple[Tensor, int]] = {}
        self.blocks: List[int] = []
        """How many each group has."""
        for number, (group, given) in enumerate(zip(layout.groups, tensors)):
            self.blocks.append(_bind(number, group, list(given), parts))
        self.views: List[View] = []
        for plane in layout.planes():
            tensor, token_dims = parts[plane.group, plane.layer, plane.part.name]
            self.views.append(View(plane, tensor, token_dims))
        self.device: Any = self.views[0].tensor.device
        strays = [view for view in self.views if view.tensor.device != self.device]
        if strays:
            raise LayoutError(f"tensors lie on {self.device} and on {strays[0].tensor.device}, expected one device")

    # ---- what a call is about
    def check(self, tables: Tables, start: int, num_tokens: int, chunk: Tensor) -> None:
        """LayoutError if the tables do not reach so far, or the chunk's bytes are not as many."""
        if len(tables) != len(self.layout.groups):
            raise LayoutError(f"{len(tables)} block tables given, the layout has {len(self.layout.groups)} groups")
        expected = num_tokens * self.layout.bytes_per_token
        if chunk.dtype != torch.uint8 or chunk.dim() != 1 or chunk.numel() != expected or not chunk.is_contiguous():
            found = f"{tuple(chunk.shape)} of {chunk.dtype}"
            raise LayoutError(f"a chunk of {num_tokens} tokens is {expected} contiguous uint8, found {found}")
        if start < 0 or num_tokens < 0:
            raise LayoutError(f"no tokens {start} to {start + num_tokens}")
        for number, (group, table) in enumerate(zip(self.layout.groups, tables)):
            needed = -(-(start + num_tokens) // group.block_tokens)
            if num_tokens and len(table) < needed:
                raise LayoutError(f"group {number}: {len(table)} blocks in the table, {needed} needed")
            for block in table[start // group.block_tokens : needed]:
                if not -1 <= block < self.blocks[number]:
                    raise LayoutError(f"group {number}: no block {block} among {self.blocks[number]}")

    def gather(self, tables: Tables, start: int, num_tokens: int, chunk: Tensor) -> None:
        """Write tokens [start, start + num_tokens) of a sequence into ``chunk``, which lies on this device."""
        self.check(tables, start, num_tokens, chunk)
        cuts = [self.cut(number, table, start, num_tokens) for number, table in enumerate(tables)]
        for view in self.views:
            view.take(cuts[view.plane.group], _rows(view, chunk, num_tokens))

    def scatter(self, tables: Tables, start: int, num_tokens: int, chunk: Tensor) -> None:
        """Write ``chunk``'s tokens to where tokens [start, start + num_tokens) of a sequence belong."""
        self.check(tables, start, num_tokens, chunk)
        cuts = [self.cut(number, table, start, num_tokens) for number, table in enumerate(tables)]
        for view in self.views:
            view.give(cuts[view.plane.group], _rows(view, chunk, num_tokens))

    def cut(self, number: int, table: Sequence[int], start: int, num_tokens: int) -> Cut:
        """Which of a chunk's tokens fill whole blocks, one after the other, and in what pieces the others lie."""
        size = self.layout.groups[number].block_tokens
        end = start + num_tokens
        first_block, last_block = -(-start // size), end // size
        absent = -1 in table[start // size : -(-end // size)]
        if absent or first_block >= last_block:
            first = last = num_tokens
            blocks = None
        else:
            first, last = first_block * size - start, last_block * size - start
            blocks = torch.tensor(list(table[first_block:last_block]), dtype=torch.int64, device=self.device)
        pieces: List[Piece] = []
        at = 0
        while at < num_tokens:
            if at == first:
                at = last
                continue
            block, offset = divmod(start + at, size)
            count = min(size - offset, num_tokens - at)
            if table[block] >= 0:
                pieces.append(Piece(table[block], offset, at, count))
            at += count
        return Cut(blocks, first, last, pieces, absent)


def _rows(view: View, chunk: Tensor, num_tokens: int) -> Tensor:
    """A plane's bytes within a chunk, as items [token][head * channel]."""
    part = view.plane.part
    first = num_tokens * view.plane.offset_bytes
    raw = chunk[first : first + num_tokens * part.token_bytes]
    return raw.view(INTEGERS[ITEM_BYTES[part.dtype]]).view(num_tokens, view.row)


def _put(tensor: Tensor, blocks: Tensor, source: Tensor) -> None:
    """tensor[blocks] = source. On a CPU NumPy copies runs where torch goes item by item: twice as fast."""
    if tensor.device.type == "cpu":
        tensor.numpy()[blocks.numpy()] = source.numpy()
    else:
        tensor.index_copy_(0, blocks, source)


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


# ---- binding an engine's tensors
def _bind(number: int, group: Group, given: List[Tensor], parts: Dict[Tuple[int, int, str], Tuple[Tensor, int]]) -> int:
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
