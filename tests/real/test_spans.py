"""What is said of many slots at once is what is said of each."""

from __future__ import annotations

import random
import struct
from typing import List, Tuple

import numpy as np
import pytest

from kvreal.memory import Memory
from kvreal.slab import POISON, SlabError
from kvreal.spans import Spans, ints, packed, runs, unpacked

KIB = 1 << 10


def test_packed_and_back() -> None:
    numbers = [0, 7, -1, 1 << 40]
    assert unpacked(packed(numbers)).tolist() == numbers and unpacked(packed(ints(numbers))).tolist() == numbers
    assert unpacked(packed(())).tolist() == [] and len(packed(numbers)) == 32
    with pytest.raises(ValueError):
        unpacked(b"1234567")
    with pytest.raises(struct.error):
        ints([1 << 70])


def plain_runs(mine: List[int], theirs: List[int], sizes: List[int], limit: int) -> List[Tuple[int, int, int]]:
    merged: List[List[int]] = []
    for a, b, size in zip(mine, theirs, sizes):
        if merged and merged[-1][0] + merged[-1][2] == a and merged[-1][1] + merged[-1][2] == b:
            merged[-1][2] += size
        else:
            merged.append([a, b, size])
    return [
        (a + at, b + at, min(limit, size - at)) for a, b, size in merged for at in range(0, size, limit)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_neighbours_at_both_ends_are_merged_and_what_is_large_is_cut(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.choice([0, 1, 2, 50])
    slots = [sorted(draw.sample(range(80), count)) if draw.random() < 0.7 else list(range(count)) for _ in range(2)]
    if draw.random() < 0.3:
        draw.shuffle(slots[1])
    sizes = [64] * count
    if count and draw.random() < 0.7:
        sizes[-1] = draw.randint(1, 64)
    mine, theirs = [slot * 64 for slot in slots[0]], [5000 + slot * 64 for slot in slots[1]]
    limit = draw.choice([16, 64, 200, 10_000])
    found = runs(ints(mine), ints(theirs), ints(sizes), limit)
    assert list(zip(*(one.tolist() for one in found))) == plain_runs(mine, theirs, sizes, limit)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.25, 0.3, 0.5, 0.99, 1.0])
def test_a_fraction_of_the_bytes_is_the_first_of_them(fraction: float) -> None:
    spans = Spans(range(4), range(8, 4, -1), [100, 100, 100, 30])
    some = spans.first(fraction)
    assert some.nbytes == int(330 * fraction) and spans.nbytes == 330
    assert all(size > 0 for _, _, size in some)
    assert [one[:2] for one in some] == [one[:2] for one in spans][: len(some)]
    assert [one[2] for one in some][:-1] == [one[2] for one in spans][: max(0, len(some) - 1)]


def test_spans_are_numbers_in_order() -> None:
    spans = Spans((3, 4), (7, 9), (10, 11))
    assert list(spans) == [(3, 7, 10), (4, 9, 11)] and spans[1] == (4, 9, 11) and len(spans) == 2
    assert all(type(number) is int for span in [*spans, spans[0]] for number in span)


@pytest.fixture
def memory() -> Memory:
    memory = Memory()
    memory.lay_out([("LocalCPUBackend", 16)], 4 * KIB)
    return memory


def test_slots_that_follow_one_another_are_one_view(memory: Memory) -> None:
    place = "LocalCPUBackend"
    for slot in range(16):
        memory.put(place, slot, np.full(4 * KIB, slot, dtype=np.uint8))
    found = memory.ranges(place, [2, 3, 4, 9, 8, 5], [4 * KIB] * 5 + [100])
    assert [len(one) for one in found] == [12 * KIB, 4 * KIB, 4 * KIB, 100]
    assert [sorted(set(one.tolist())) for one in found] == [[2, 3, 4], [9], [8], [5]]
    short = memory.ranges(place, [2, 3], [100, 100])
    assert [set(one.tolist()) for one in short] == [{2}, {3}]
    assert memory.ranges(place, [], []) == []


@pytest.mark.parametrize("slots, sizes", [([0, 16], [1, 1]), ([0, -1], [1, 1]), ([0, 1], [1, 4097]), ([0, 1], [-1, 1])])
def test_slots_that_are_not_there_are_refused_whichever_of_them_it_is(
    memory: Memory, slots: List[int], sizes: List[int]
) -> None:
    for order in (slice(None), slice(None, None, -1)):
        with pytest.raises(SlabError, match="LocalCPUBackend: no slot"):
            memory.ranges("LocalCPUBackend", slots[order], sizes[order])


def test_what_held_something_is_spoilt_and_nothing_else(memory: Memory) -> None:
    place = "LocalCPUBackend"
    memory.soil(place, [1, 2, 3, 7])
    for slot in range(16):
        memory.view(place, slot, 4 * KIB)[:] = 1
    memory.soil(place, [0, 1, 2, 7, 9], poison=True)
    spoilt = [slot for slot in range(16) if memory.view(place, slot, 1)[0] == POISON]
    assert spoilt == [1, 2, 7]
    assert [slot for slot in range(16) if memory.view(place, slot, 4 * KIB)[-1] == POISON] == spoilt
    assert memory.wipe([(place, 7), (place, 9)]) == 4 * 4 * KIB  # 0, 1, 2, 3
    wiped = [slot for slot in range(16) if (memory.view(place, slot, 4 * KIB) == POISON).all()]
    assert wiped == [0, 1, 2, 3]
    assert memory.wipe() == 2 * 4 * KIB and memory.wipe() == 0
