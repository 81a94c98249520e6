"""An engine's paged KV, bound to its layout: gather tokens into a chunk's bytes, scatter a chunk's bytes into blocks.

    paged = Paged(layout, [[layer_0, layer_1, ...]])         # for each group its tensors: for each layer, each stored
    paged.gather([table], start, num_tokens, chunk)          # chunk: num_tokens * bytes_per_token of uint8
    paged.scatter([table], start, num_tokens, chunk)

Token t of a sequence lies in block ``table[t // block_tokens]``, at t % block_tokens. A block of -1 is not there (a
sliding window has passed it): its tokens are zeros in the chunk, and are left out by ``scatter``.

Whole blocks go by one operation a plane, what lies beside them by one a piece; scattering writes no token but the
chunk's own. kvreal.layout.views has the operations, kvreal.layout.gpu a kernel that does the same on a GPU.
"""

from __future__ import annotations

from typing import Any, List, Sequence

import torch

from kvreal.layout.bind import Planes, bind
from kvreal.layout.shape import ITEM_BYTES, Layout, LayoutError
from kvreal.layout.views import INTEGERS, Cut, HostView, Piece, Tensor, View

Tables = Sequence[Sequence[int]]
"""For each group the blocks of one sequence, first to last."""


class Paged:
    def __init__(self, layout: Layout, tensors: Sequence[Sequence[Tensor]], plain: bool = False) -> None:
        """``tensors[group]``: for each layer, for each of the group's ``stored``, a tensor; one for all layers where
        its axes name ``layer``. ``plain``: by torch, on a CPU too. LayoutError if one is not as the layout says."""
        if len(tensors) != len(layout.groups):
            raise LayoutError(f"{len(tensors)} groups of tensors given, the layout has {len(layout.groups)}")
        self.layout: Layout = layout
        parts: Planes = {}
        self.blocks: List[int] = []
        """How many each group has."""
        for number, (group, given) in enumerate(zip(layout.groups, tensors)):
            self.blocks.append(bind(number, group, list(given), parts))
        self.views: List[View] = []
        for plane in layout.planes():
            tensor, token_dims = parts[plane.group, plane.layer, plane.part.name]
            host = tensor.device.type == "cpu" and not plain
            self.views.append((HostView if host else View)(plane, tensor, token_dims))
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
