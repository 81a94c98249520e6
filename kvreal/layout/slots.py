"""Chunks between an engine's blocks and a rank's slots: on one device at once, else by way of memory beside it."""

from __future__ import annotations

from typing import Any

import torch

from kvreal.layout.paged import Paged, Tables
from kvreal.memory import Memory

Tensor = Any


def slot(memory: Memory, location: str, number: int, nbytes: int) -> Tensor:
    """The first ``nbytes`` bytes of a slot as uint8, not a copy, on whatever device the location lies.
    SlabError if there is no such slot."""
    place = memory.check(location, number, nbytes)
    slab, start = memory.homes[location]
    first = start + number * place.slot_bytes
    if slab.tensor is not None:
        return slab.tensor[first : first + nbytes]
    return torch.from_numpy(slab.bytes[first : first + nbytes])


def store(paged: Paged, tables: Tables, start: int, num_tokens: int, chunk: Tensor) -> None:
    """Tokens [start, start + num_tokens) into ``chunk``, wherever it lies."""
    if chunk.device == paged.device:
        gather(paged, tables, start, num_tokens, chunk)
        return
    beside = torch.empty(chunk.numel(), dtype=torch.uint8, device=paged.device)
    gather(paged, tables, start, num_tokens, beside)
    chunk.copy_(beside)


def load(paged: Paged, tables: Tables, start: int, num_tokens: int, chunk: Tensor) -> None:
    """``chunk``, wherever it lies, into tokens [start, start + num_tokens)."""
    scatter(paged, tables, start, num_tokens, chunk.to(paged.device))


def gather(paged: Paged, tables: Tables, start: int, num_tokens: int, chunk: Tensor) -> None:
    """By the Triton kernel where it can run, else by torch; the bytes are the same."""
    paged.gather(tables, start, num_tokens, chunk)


def scatter(paged: Paged, tables: Tables, start: int, num_tokens: int, chunk: Tensor) -> None:
    paged.scatter(tables, start, num_tokens, chunk)
