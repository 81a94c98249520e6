"""The clock: plain calls and real simpy events in one order."""

from __future__ import annotations

from typing import Any, Generator, List, Tuple

import pytest
import simpy

from kvsim.loop import EventLimit, Loop


def test_equal_times_fire_in_the_order_asked_for_and_ranks_shift_them() -> None:
    loop = Loop()
    log: List[str] = []

    def say(what: str, _: Any) -> None:
        log.append(what)

    def first(_: Any, __: Any) -> None:
        loop.at_end_of_instant(say, "end")
        loop.at(loop.now_ns, say, "same instant")
        log.append("first")

    loop.at(10, first)
    loop.at(10, say, "second")
    loop.at(5, say, "early")
    loop.advance(100)
    assert log == ["early", "first", "second", "same instant", "end"]
    assert loop.now_ns == 100


def test_simpy_processes_share_the_heap() -> None:
    loop = Loop()
    log: List[Tuple[int, str]] = []

    def process(env: simpy.Environment) -> Generator[Any, Any, None]:
        for _ in range(2):
            yield env.timeout(10)
            log.append((int(env.now), "process"))

    loop.process(process(loop))
    loop.at(10, lambda a, b: log.append((loop.now_ns, a)), "call")
    store = simpy.Store(loop)

    def taker() -> Generator[Any, Any, None]:
        item = yield store.get()
        log.append((loop.now_ns, item))

    loop.process(taker())

    def put(item: str, _: Any) -> None:
        store.put(item)

    loop.at(15, put, "put")
    loop.run()
    assert log == [(10, "call"), (10, "process"), (15, "put"), (20, "process")]


def test_run_until_is_simpys() -> None:
    loop = Loop()
    loop.at(10, lambda a, b: None)
    loop.run(until=7)
    assert loop.now == 7
    assert loop.run(until=loop.timeout(5, "value")) == "value"
    assert loop.now == 12


def test_stop_ends_an_advance_and_the_next_goes_on() -> None:
    loop = Loop()
    log: List[int] = []

    def tick(n: int, _: Any) -> None:
        log.append(n)
        if n == 2:
            loop.stop()

    for n in range(5):
        loop.at(n, tick, n)
    loop.advance(3)
    assert log == [0, 1, 2]
    loop.advance(100)
    assert log == [0, 1, 2, 3, 4]


def test_a_run_in_circles_is_ended() -> None:
    loop = Loop()

    def again(a: Any, b: Any) -> None:
        loop.at(loop.now_ns, again)

    loop.at(0, again)
    with pytest.raises(EventLimit, match="1000 events"):
        loop.advance(10, max_events=1000)


def test_fired_counts_events() -> None:
    loop = Loop()
    for n in range(5):
        loop.at(n, lambda a, b: None)
    loop.advance(2)
    assert loop.fired() == 3 + 1  # and the horizon's own
