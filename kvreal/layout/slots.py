"""Chunks between an engine's blocks and a rank's slots: on one device at once, else by way of memory beside it."""

from __future__ import annotations

from typing import Any, Union

import torch

from kvreal.layout import gpu
from kvreal.layout.paged import Paged, Tables
from kvreal.memory import Memory
from kvreal.slab import SlabError

Tensor = Any


def slot(memory: Memory, location: str, number: int, nbytes: int) -> Tensor:
    """The first ``nbytes`` bytes of a slot as uint8, not a copy, on whatever device the location lies.
    SlabError if there is no such slot, or none that has a place in memory."""
    memory.check(location, number, nbytes)
    if memory.on_disk(location):
        raise SlabError(f"{location} is on a disk: its bytes cannot be looked at in place")
    slab, _ = memory.homes[location]
    first = memory.start(location, number)
    if slab.tensor is not None:
        return slab.tensor[first : first + nbytes]
    return torch.from_numpy(slab.bytes[first : first + nbytes])


class Copies:
    """Between one engine's blocks and chunks anywhere: by the Triton kernel where it can run, else by torch; the
    bytes are the same. When a call returns, they are there for every other stream, thread and device."""

    def __init__(self, paged: Paged) -> None:
        self.paged: Paged = paged
        self.why_torch: str = gpu.why_not(paged)
        """Why not the kernel; "" if it is used."""
        self.by: Union[Paged, gpu.Copier] = paged if self.why_torch else gpu.Copier(paged)

    def store(self, tables: Tables, start: int, num_tokens: int, chunk: Tensor) -> None:
        """Tokens [start, start + num_tokens) of a sequence into ``chunk``."""
        if chunk.device == self.paged.device:
            self.by.gather(tables, start, num_tokens, chunk)
        else:
            beside = torch.empty(chunk.numel(), dtype=torch.uint8, device=self.paged.device)
            self.by.gather(tables, start, num_tokens, beside)
            chunk.copy_(beside)
        self._settle()

    def load(self, tables: Tables, start: int, num_tokens: int, chunk: Tensor) -> None:
        """``chunk`` into tokens [start, start + num_tokens) of a sequence."""
        self.by.scatter(tables, start, num_tokens, chunk.to(self.paged.device))
        self._settle()

    def _settle(self) -> None:
        if self.paged.device.type == "cuda":
            torch.cuda.current_stream(self.paged.device).synchronize()
