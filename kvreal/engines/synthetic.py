"""KV whose every byte is a function of (key, layer, offset), so that any node can make it again and compare.

A chunk's bytes lie packed: ``layers`` equal parts, one after the other, each of num_tokens * bytes_per_token / layers
bytes. A partial chunk is thus a shorter run of bytes, not a slot with holes, and moves as one descriptor. Within a
layer byte i belongs to the 64-bit word i // 8, which is ``(i // 8 * STEP + add) ^ flip`` with (add, flip) from
blake2b(key, layer): no two words of a chunk are alike, so a shifted, torn or foreign piece is seen wherever it lies.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any, Final, Tuple

import numpy as np
import numpy.typing as npt

from kvcore.protocol.machine import StartFill, StartRead
from kvreal.memory import Memory

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

STEP: Final = 0x9E3779B97F4A7C15
MASK: Final = (1 << 64) - 1
BLOCK_WORDS: Final = 1 << 15
"""Words made at a time: 256 KiB, which stay in the cache between making and comparing."""

MAX_LAYERS: Final = 32


def layers_of(bytes_per_token: int) -> int:
    """How many layers the synthetic model has: the largest power of two up to 32 that divides ``bytes_per_token``."""
    layers = MAX_LAYERS
    while bytes_per_token % layers:
        layers //= 2
    return layers


@lru_cache(maxsize=1)
def _ramp() -> Words:
    """0, STEP, 2 STEP, ...: one block of it; the blocks after it differ by a constant."""
    ramp: Words = np.arange(BLOCK_WORDS, dtype=np.uint64) * np.uint64(STEP)
    ramp.flags.writeable = False
    return ramp


@lru_cache(maxsize=4096)
def _seeds(key: bytes, layer: int) -> Tuple[int, int]:
    digest = hashlib.blake2b(key, digest_size=16, salt=layer.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _make(key: bytes, layer: int, first_word: int, out: Words) -> None:
    """Write the words [first_word, first_word + len(out)) of a layer; at most BLOCK_WORDS of them."""
    add, flip = _seeds(key, layer)
    np.add(_ramp()[: len(out)], np.uint64((first_word * STEP + add) & MASK), out=out)
    np.bitwise_xor(out, np.uint64(flip), out=out)


def _parts(nbytes: int, layers: int) -> Tuple[int, int]:
    part, rest = divmod(nbytes, layers)
    if rest:
        raise ValueError(f"{nbytes} bytes do not divide into {layers} layers")
    return part, BLOCK_WORDS * 8


def fill(view: Bytes, key: bytes, num_tokens: int, bytes_per_token: int) -> int:
    """Write the chunk ``key`` into the first num_tokens * bytes_per_token bytes of ``view``; returns how many."""
    nbytes = num_tokens * bytes_per_token
    layers = layers_of(bytes_per_token)
    part, block = _parts(nbytes, layers)
    words: Words = np.empty(BLOCK_WORDS, dtype=np.uint64)
    raw = words.view(np.uint8)
    for layer in range(layers):
        base = layer * part
        for start in range(0, part, block):
            size = min(block, part - start)
            target = view[base + start : base + start + size]
            if size % 8 == 0 and _aligned(target):
                _make(key, layer, start // 8, target.view(np.uint64))
            else:
                _make(key, layer, start // 8, words[: -(-size // 8)])
                target[:] = raw[:size]
    return nbytes


def blank(nbytes: int) -> Bytes:
    """Memory of our own, where the chunk's home cannot be written in place."""
    return np.empty(nbytes, dtype=np.uint8)


def check(view: Bytes, key: bytes, num_tokens: int, bytes_per_token: int) -> int:
    """-1 if ``view`` begins with the chunk ``key``'s bytes; else the offset of the first byte that differs."""
    nbytes = num_tokens * bytes_per_token
    layers = layers_of(bytes_per_token)
    part, block = _parts(nbytes, layers)
    words: Words = np.empty(BLOCK_WORDS, dtype=np.uint64)
    raw = words.view(np.uint8)
    for layer in range(layers):
        base = layer * part
        for start in range(0, part, block):
            size = min(block, part - start)
            there = view[base + start : base + start + size]
            _make(key, layer, start // 8, words[: -(-size // 8)])
            if not _equal(there, raw[:size]):
                return base + start + int(np.flatnonzero(there != raw[:size])[0])
    return -1


def _equal(one: Bytes, other: Bytes) -> bool:
    """Bytes compared as words where their addresses allow it: eight times fewer comparisons."""
    size = len(one) // 8 * 8
    if size and _aligned(one):
        whole: Any = one[:size].view(np.uint64) == other[:size].view(np.uint64)
        return bool(whole.all()) and bool((one[size:] == other[size:]).all())
    return bool((one == other).all())


def _aligned(view: Bytes) -> bool:
    return int(view.ctypes.data) % 8 == 0


class Synthetic:
    """The engine that nodes have when nothing else is said."""

    def fill(self, memory: Memory, task: StartFill, bytes_per_token: int) -> bool:
        for slot, key, tokens in zip(task.slots, task.keys, task.lens):
            nbytes = tokens * bytes_per_token
            if memory.mapped(task.location):
                fill(memory.view(task.location, slot, nbytes), key, tokens, bytes_per_token)
            else:
                scratch = blank(nbytes)
                fill(scratch, key, tokens, bytes_per_token)
                memory.put(task.location, slot, scratch, key)
        return True

    def read(self, memory: Memory, task: StartRead, bytes_per_token: int) -> bool:
        ok = True
        for slot, key, tokens in zip(task.slots, task.keys, task.lens):
            view = memory.get(task.location, slot, tokens * bytes_per_token, key)
            ok = check(view, key, tokens, bytes_per_token) < 0 and ok
        return ok
