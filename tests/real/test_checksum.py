"""Checksums of chunks: equal bytes agree, every planted damage is found, and each mode says what it cannot find."""

from __future__ import annotations

import random
import threading
from typing import List, Tuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvreal import checksum
from kvreal.checksum import PIECE, STRIPE, Mismatch, Mode, compare, mode_of, sums
from kvreal.memory import Memory
from kvreal.slab import SlabError

CPU, DISK = "LocalCPUBackend", "LocalDiskBackend"
SLOT = 3 * STRIPE + 5000
SLOTS = 6
KEYS = [random.Random(at).randbytes(32) for at in range(SLOTS)]


@pytest.fixture(scope="module")
def pair() -> Tuple[Memory, Memory]:
    """Two memories with the same noise in slots [0, SLOTS) of the one and, backwards, of the other."""
    one, other = Memory(), Memory()
    for memory in (one, other):
        memory.lay_out([(CPU, SLOTS), (DISK, SLOTS)], SLOT)
    for at in range(SLOTS):
        noise = np.random.default_rng(at).integers(0, 256, SLOT, dtype=np.uint8)
        one.put(CPU, at, noise)
        other.put(CPU, SLOTS - 1 - at, noise)
        other.put(DISK, at, noise, KEYS[at])
    return one, other


def summed(memory: Memory, mode: Mode, slots: List[int], sizes: List[int], location: str = CPU) -> List[int]:
    return sums(memory, location, slots, sizes, KEYS[: len(slots)], mode)


@pytest.mark.parametrize("mode", ["off", "sample", "all"])
@pytest.mark.parametrize("size", [1, 100, 4 * PIECE, 4 * PIECE + 1, STRIPE - 1, STRIPE, 2 * STRIPE + 17, SLOT])
def test_equal_bytes_have_equal_sums_wherever_they_lie(pair: Tuple[Memory, Memory], mode: Mode, size: int) -> None:
    one, other = pair
    slots, back, sizes = list(range(SLOTS)), list(range(SLOTS - 1, -1, -1)), [size] * SLOTS
    there = summed(one, mode, slots, sizes)
    assert summed(other, mode, back, sizes) == there == summed(other, mode, slots, sizes, DISK)
    compare(other, CPU, back, sizes, KEYS, mode, there)
    assert (len(set(there)) == SLOTS) == (mode != "off")


@settings(max_examples=200, deadline=None)
@given(st.integers(1, SLOT), st.data())
def test_any_flipped_bit_is_found_by_all(pair: Tuple[Memory, Memory], size: int, data: st.DataObject) -> None:
    one, other = pair
    at = data.draw(st.integers(0, size - 1))
    there = summed(one, "all", [0], [size])
    view = other.view(CPU, SLOTS - 1, size)
    view[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        with pytest.raises(Mismatch):
            compare(other, CPU, [SLOTS - 1], [size], KEYS[:1], "all", there)
    finally:
        view[at] = one.view(CPU, 0, size)[at]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, SLOT), st.data())
def test_what_transports_lose_is_found_by_a_sample(pair: Tuple[Memory, Memory], size: int, data: st.DataObject) -> None:
    """A stretch of two stripes anywhere, or everything from some place on, or up to some place."""
    one, other = pair
    begin = data.draw(st.integers(0, size - 1))
    lost = data.draw(
        st.sampled_from([slice(begin, size), slice(0, begin + 1), slice(begin, min(size, begin + 2 * STRIPE))])
    )
    there = summed(one, "sample", [0], [size])
    view = other.view(CPU, SLOTS - 1, size)
    view[lost] ^= 0xFF
    try:
        with pytest.raises(Mismatch):
            compare(other, CPU, [SLOTS - 1], [size], KEYS[:1], "sample", there)
    finally:
        view[lost] ^= 0xFF


def test_a_sample_reads_a_64th_and_at_other_places_for_other_keys(pair: Tuple[Memory, Memory]) -> None:
    """What it costs, and what it cannot promise: most single bytes go unseen under one key."""
    one, _ = pair
    size = 3 * STRIPE
    view = one.view(CPU, 2, size)
    seen = []
    for key in KEYS:
        before = sums(one, CPU, [2], [size], [key], "sample")
        found = set()
        for at in range(0, size, PIECE):
            view[at] ^= 1
            if sums(one, CPU, [2], [size], [key], "sample") != before:
                found.add(at)
            view[at] ^= 1
        assert {0, size - PIECE} <= found and len(found) <= 5
        seen.append(frozenset(found))
    assert len(set(seen)) > 1


@pytest.mark.parametrize("mode", ["sample", "all"])
def test_another_prompts_chunk_is_found_even_where_bytes_are_equal(pair: Tuple[Memory, Memory], mode: Mode) -> None:
    one, other = pair
    there = sums(one, CPU, [0], [SLOT], [KEYS[0]], mode)
    with pytest.raises(Mismatch):
        compare(other, CPU, [SLOTS - 1], [SLOT], [KEYS[1]], mode, there)


def test_the_line_names_chunk_slot_and_both_sums(pair: Tuple[Memory, Memory]) -> None:
    one, _ = pair
    there = summed(one, "all", [0, 1, 2], [9, 9, 9])
    there[1] ^= 1
    there[2] ^= 1
    with pytest.raises(Mismatch) as error:
        compare(one, CPU, [0, 1, 2], [9, 9, 9], KEYS[:3], "all", there)
    text = str(error.value)
    assert error.value.bad == (1, 2) and "\n" not in text
    first = f"the first is {KEYS[1].hex()[:16]} (9 bytes in slot 1"
    assert text.startswith(f"{CPU}: 2 of 3 chunks have wrong bytes, {first}")
    assert f"at the source {there[1]:016x}" in text


def test_sums_that_are_too_few_are_a_mismatch(pair: Tuple[Memory, Memory]) -> None:
    one, _ = pair
    with pytest.raises(Mismatch, match="1 checksums came for 2 chunks"):
        compare(one, CPU, [0, 1], [9, 9], KEYS[:2], "all", [5])
    compare(one, CPU, [0, 1], [9, 9], KEYS[:2], "off", [])


def test_large_sets_are_summed_in_threads_to_the_same_sums(
    pair: Tuple[Memory, Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = pair
    names = set()
    real = checksum._whole

    def noted(*args: object) -> List[int]:
        names.add(threading.current_thread().name.partition("_")[0])
        return real(*args)  # type: ignore[arg-type]

    slots, sizes = list(range(SLOTS)), [SLOT] * SLOTS
    alone = summed(one, "all", slots, sizes)
    monkeypatch.setattr(checksum, "_whole", noted)
    monkeypatch.setattr(checksum, "PARALLEL_BYTES", 1 << 20)
    monkeypatch.setattr(checksum.os, "cpu_count", lambda: 3)
    assert summed(one, "all", slots, sizes) == alone and names == {"checksum"}


def test_no_such_slot_and_no_such_mode(pair: Tuple[Memory, Memory]) -> None:
    for mode in ("sample", "all"):
        with pytest.raises(SlabError, match="no slot 99"):
            summed(pair[0], mode_of(mode), [99], [SLOT])
    with pytest.raises(ValueError, match="checksums: found 'some', expected one of off, sample, all"):
        mode_of("some")
