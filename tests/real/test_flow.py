"""Turns: by priority, by weight, within a cap; and nobody who is stopped waits for one."""

from __future__ import annotations

import threading
import time
from typing import List

import pytest

from kvcore.protocol.machine import StartCopy
from kvcore.protocol.messages import Terms
from kvreal.transfer.flow import BATCH_BYTES, BURST_S, Flow
from kvreal.transfer.job import Copy, Job, Stopped

MIB = 1 << 20


def job(number: int, priority: int = 0, weight: int = 1, cap: int = 0) -> Job:
    terms = Terms(priority, weight, cap)
    effect = StartCopy((1, number), True, "a/0", 1, "cpu", (0,), "cpu", (0,), (1,), terms=terms)
    return Job(Copy(effect, "", 1, 1, 10**12))


def served(jobs: List[Job], turns: int) -> List[int]:
    """Whose turn it was, in order, while every job wants one always. The first holds it until all are waiting."""
    flow = Flow()
    order: List[int] = []
    going = threading.Event()
    for one in jobs:
        flow.enter(one)
    flow.turn(jobs[0], 0)

    def want(one: Job) -> None:
        while len(order) < turns:
            flow.turn(one, MIB)
            order.append(one.copy.effect.rid[1])
            until = time.monotonic() + 10
            while len(flow.waiting) < len(jobs) - 1 and len(order) < turns and time.monotonic() < until:
                going.wait(0.0005)  # the others have come back to the queue
            flow.done()

    threads = [threading.Thread(target=want, args=(one,), daemon=True) for one in jobs]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 10
    while len(flow.waiting) < len(jobs) and time.monotonic() < until:
        going.wait(0.001)
    flow.done()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return order[:turns]


def test_equals_take_turns() -> None:
    order = served([job(1), job(2)], 20)
    assert abs(order.count(1) - order.count(2)) <= 1


def test_turns_go_by_weight() -> None:
    order = served([job(1, weight=3), job(2)], 40)
    assert 28 <= order.count(1) <= 32


def test_a_higher_priority_goes_first() -> None:
    order = served([job(1), job(2, priority=5), job(3)], 12)
    assert order == [2] * 12


def test_one_that_comes_late_does_not_catch_up() -> None:
    flow = Flow()
    old, new = job(1), job(2)
    flow.enter(old)
    for _ in range(100):
        flow.turn(old, MIB)
        flow.done()
    flow.enter(new)
    flow.turn(new, MIB)
    flow.done()
    assert old.service - new.service <= MIB


def test_a_cap_is_kept() -> None:
    """Never faster: how much slower depends on the machine."""
    flow = Flow()
    capped = job(1, cap=100 * MIB)
    flow.enter(capped)
    batch = flow.batch(capped)
    assert 64 << 10 <= batch <= MIB
    begun = time.monotonic()
    moved = 0
    while moved < 20 * MIB:
        flow.turn(capped, batch)
        flow.done()
        moved += batch
    assert time.monotonic() - begun >= 0.95 * (20 - 2) / 100


def test_the_copies_of_one_move_have_one_cap() -> None:
    """Each step of a move is a copy; what one may move early it may move early once."""
    flow = Flow()
    first = job(1, cap=100 * MIB)
    steps = [first]
    for _ in range(10):
        steps.append(Job(first.copy, steps[-1]))
    begun = time.monotonic()
    for step in steps:
        flow.enter(step)
        flow.turn(step, 1 * MIB)
        flow.done()
        flow.leave(step)
    took = time.monotonic() - begun
    assert took >= (len(steps) - 1) / 100 - BURST_S, "bytes went that the cap forbids"


def test_without_a_cap_batches_are_whole() -> None:
    assert Flow().batch(job(1)) == BATCH_BYTES


def test_who_does_not_want_to_wait_is_told() -> None:
    flow = Flow()
    one, other = job(1), job(2)
    flow.turn(one, MIB)
    assert not flow.turn(other, MIB, wait=False)
    flow.done()
    assert flow.turn(other, MIB, wait=False)


def test_a_stopped_copy_waits_no_longer() -> None:
    flow = Flow()
    holder, stopped = job(1), job(2)
    flow.turn(holder, MIB)
    stopped.stop()
    with pytest.raises(Stopped):
        flow.turn(stopped, MIB)
    slow = job(3, cap=1)
    slow.free_at_s = time.monotonic() + 1000
    slow.stop()
    with pytest.raises(Stopped):
        flow.turn(slow, MIB)


def test_room_goes_by_weight_and_yields_to_a_higher_priority() -> None:
    flow = Flow()
    one, heavy = job(1), job(2, weight=3)
    flow.enter(one)
    assert flow.room(one, 8) == 8
    flow.enter(heavy)
    assert (flow.room(one, 8), flow.room(heavy, 8)) == (2, 6)
    first = job(3, priority=1)
    flow.enter(first)
    assert (flow.room(one, 8), flow.room(first, 8)) == (1, 8)
    flow.leave(first)
    assert flow.room(one, 8) == 2


def test_a_copy_behind_another_of_its_move_waits_for_that_one_s_last_turn_only() -> None:
    flow = Flow()
    first = job(1)
    first.nbytes = 2 * MIB
    effect = StartCopy((1, 2), True, "a/0", 1, "cpu", (0,), "cpu", (0,), (1,))
    second = Job(Copy(effect, "", 1, 1, 10**12), first)
    other = job(3)
    for one in (first, second, other):
        flow.enter(one)
    assert flow.turn(first, MIB, wait=False)
    flow.done()
    assert not flow.turn(second, MIB, wait=False)  # nobody else waits, and still
    assert flow.turn(other, MIB, wait=False)
    flow.done()
    assert flow.turn(first, MIB, wait=False)
    flow.done()
    assert flow.turn(second, MIB, wait=False)


def test_a_copy_that_has_failed_lets_those_behind_it_go() -> None:
    flow = Flow()
    first = job(1)
    effect = StartCopy((1, 2), True, "a/0", 1, "cpu", (0,), "cpu", (0,), (1,))
    second = Job(Copy(effect, "", 1, 1, 10**12), first)
    flow.enter(second)
    got = threading.Event()

    def want() -> None:
        flow.turn(second, MIB)
        got.set()

    thread = threading.Thread(target=want, daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while not flow.waiting and time.monotonic() < until:
        time.sleep(0.001)
    assert not got.is_set()
    flow.pass_by(first)  # it has never come so far as to enter
    thread.join(10)
    assert got.is_set()
