"""The fabric against hand-computed cases and against textbook progressive filling."""

from __future__ import annotations

import random
from typing import Any, Dict, List, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.fabric import Fabric
from kvsim.loop import Loop
from tests.sim.fabric_oracle import progressive_filling

GB = 1_000_000_000


class Ends:
    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.at: Dict[Any, int] = {}

    def __call__(self, arg: Any) -> None:
        assert arg not in self.at
        self.at[arg] = self.loop.now_ns


def world() -> Tuple[Loop, Fabric, Ends]:
    loop = Loop()
    return loop, Fabric(loop), Ends(loop)


def test_a_lone_flow_takes_latency_then_bytes_over_bandwidth() -> None:
    loop, fabric, ends = world()
    link = fabric.link("a", 2 * GB, latency_ns=500)
    fabric.start((link,), 1_000_000, ends, "f")
    loop.advance(10**9)
    assert ends.at == {"f": 500 + 500_000}
    assert fabric.solver.solves == 0


def test_two_flows_share_and_the_longer_one_speeds_up() -> None:
    loop, fabric, ends = world()
    link = fabric.link("a", GB)
    fabric.start((link,), 1000, ends, "short")
    fabric.start((link,), 3000, ends, "long")
    loop.advance(10**9)
    assert ends.at == {"short": 2000, "long": 4000}


def test_the_smaller_link_of_a_path_rules() -> None:
    loop, fabric, ends = world()
    wide, narrow = fabric.link("wide", 10 * GB), fabric.link("narrow", GB)
    fabric.start((wide, narrow), 1000, ends, "f")
    fabric.start((wide,), 9000, ends, "g")
    loop.advance(10**9)
    assert ends.at == {"f": 1000, "g": 1000}


def test_the_parking_lot() -> None:
    """A long flow over three links, a short one on each: all get half; when one link widens, only its own gains."""
    loop, fabric, ends = world()
    links = [fabric.link(f"l{i}", GB) for i in range(3)]
    long = fabric.start(tuple(links), 10**9, ends, "long")
    short = [fabric.start((link,), 10**9, ends, i) for i, link in enumerate(links)]
    loop.advance(1)
    assert [fabric.rate(f) for f in (long, *short)] == pytest.approx([GB / 2] * 4, rel=1e-12)
    fabric.set_capacity(links[1], 3 * GB)
    loop.advance(2)
    assert [fabric.rate(f) for f in (long, *short)] == pytest.approx([GB / 2, GB / 2, 2.5 * GB, GB / 2], rel=1e-12)
    fabric.set_capacity(links[0], GB / 10)
    loop.advance(3)
    rates = [fabric.rate(f) for f in (long, *short)]
    assert rates == pytest.approx([GB / 20, GB / 20, 2.95 * GB, 0.95 * GB], rel=1e-12)


def test_a_cap_leaves_the_rest_to_the_others() -> None:
    loop, fabric, ends = world()
    link = fabric.link("a", GB)
    capped = fabric.start((link,), 10**9, ends, "capped", cap=GB / 10)
    free = fabric.start((link,), 10**9, ends, "free")
    loop.advance(1)
    assert (fabric.rate(capped), fabric.rate(free)) == pytest.approx((GB / 10, 0.9 * GB), rel=1e-12)


def test_cancel_tells_what_has_crossed_and_calls_nothing() -> None:
    loop, fabric, ends = world()
    link = fabric.link("a", GB)
    first = fabric.start((link,), 10_000, ends, "first")
    fabric.start((link,), 4_000, ends, "second")
    loop.advance(4_000)
    assert fabric.progress(first) == pytest.approx(0.2)
    assert fabric.cancel(first) == pytest.approx(0.2)
    assert fabric.cancel(first) == 0.0
    loop.advance(10**9)
    assert ends.at == {"second": 6_000}
    assert not fabric.flows


def test_cancel_during_the_latency() -> None:
    loop, fabric, ends = world()
    link = fabric.link("a", GB, latency_ns=100)
    flow = fabric.start((link,), 10, ends, "f")
    loop.advance(50)
    assert fabric.cancel(flow) == 0.0
    loop.advance(10**9)
    assert ends.at == {}


def test_nothing_to_carry_and_nowhere_to_carry_it() -> None:
    loop, fabric, ends = world()
    link = fabric.link("a", GB)
    fabric.start((link,), 0, ends, "no bytes")
    fabric.start((), 10**9, ends, "no path", after_ns=7)
    loop.advance(10**9)
    assert ends.at == {"no bytes": 0, "no path": 7}


def test_a_hundred_flows_that_end_together_are_solved_once() -> None:
    loop, fabric, ends = world()
    up, down = fabric.link("up", GB), fabric.link("down", GB)
    for i in range(100):
        fabric.start((up, down), 1000, ends, i)
    loop.advance(10**9)
    assert set(ends.at.values()) == {100_000}
    assert fabric.solver.solves == 1


def test_done_may_start_and_cancel() -> None:
    loop, fabric, ends = world()
    link = fabric.link("a", GB)
    other = fabric.start((link,), 10**9, ends, "other")

    def then(arg: Any) -> None:
        fabric.cancel(other)
        fabric.start((link,), 1000, ends, "next")

    fabric.start((link,), 1000, then, None)
    loop.advance(10**9)
    assert ends.at == {"next": 3000}


@pytest.mark.parametrize("bandwidth", [0, -1])
def test_a_link_that_carries_nothing_is_refused(bandwidth: int) -> None:
    fabric = Fabric(Loop())
    with pytest.raises(ValueError, match="link a: "):
        fabric.link("a", bandwidth)


class Twin:
    """A fabric and, beside it, what it is meant to hold, for the oracle to solve from scratch."""

    def __init__(self, capacities: List[float]) -> None:
        self.loop = Loop()
        self.fabric = Fabric(self.loop)
        self.capacities = capacities
        self.links = [self.fabric.link(f"l{i}", c) for i, c in enumerate(capacities)]
        self.live: Dict[int, Tuple[Tuple[int, ...], float]] = {}
        self.by_name: Dict[int, int] = {}
        self.names = 0

    def start(self, path: Tuple[int, ...], nbytes: int, cap: float) -> None:
        name = self.names = self.names + 1
        links = tuple(self.links[i] for i in path)
        self.by_name[name] = fid = self.fabric.start(links, nbytes, self.ended, name, cap)
        self.live[fid] = (path, cap)

    def ended(self, name: int) -> None:
        del self.live[self.by_name[name]]

    def cancel(self, nth: int) -> None:
        if self.live:
            fid = list(self.live)[nth % len(self.live)]
            self.fabric.cancel(fid)
            del self.live[fid]

    def resize(self, link: int, capacity: float) -> None:
        self.capacities[link] = capacity
        self.fabric.set_capacity(self.links[link], capacity)

    def check(self) -> None:
        want = progressive_filling(self.capacities, self.live)
        for fid, rate in want.items():
            assert self.fabric.rate(fid) == pytest.approx(rate, rel=1e-9), (fid, self.live, self.capacities)


capacity = st.sampled_from([1e9, 1e9, 1e9, 2e9, 5e9, 1e8, 3.3e9]) | st.floats(1e6, 1e11)
cap = st.sampled_from([0.0, 0.0, 0.0, 5e8, 2.5e8]) | st.floats(1e5, 1e10)


@st.composite
def histories(draw: st.DrawFn) -> Tuple[List[float], List[List[Tuple[Any, ...]]]]:
    n = draw(st.integers(1, 9))
    link = st.integers(0, n - 1)
    path = st.lists(link, min_size=1, max_size=4, unique=True).map(tuple)
    op = st.one_of(
        st.tuples(st.just("start"), path, st.integers(1, 10**9), cap),
        st.tuples(st.just("start"), path, st.integers(10**9, 10**12), st.just(0.0)),
        st.tuples(st.just("cancel"), st.integers(0, 100)),
        st.tuples(st.just("resize"), link, capacity),
    )
    capacities = draw(st.lists(capacity, min_size=n, max_size=n))
    return capacities, draw(st.lists(st.lists(op, min_size=1, max_size=6), min_size=1, max_size=12))


@settings(max_examples=300, deadline=None)
@given(histories(), st.integers(1, 10**8))
def test_rates_are_those_of_progressive_filling(
    history: Tuple[List[float], List[List[Tuple[Any, ...]]]], pause_ns: int
) -> None:
    capacities, instants = history
    twin = Twin(list(capacities))
    for instant in instants:
        for what, *args in instant:
            getattr(twin, what)(*args)
        twin.loop.advance(twin.loop.now_ns)
        twin.check()
        twin.loop.advance(twin.loop.now_ns + pause_ns)
        twin.check()


def test_a_busy_crossbar_stays_exact_and_ends_when_it_should() -> None:
    """Hundreds of coupled flows, equal links: where ties are everywhere."""
    rng = random.Random(3)
    hosts = 16
    twin = Twin([5e9] * (2 * hosts))
    for _ in range(250):
        for _ in range(rng.randrange(4)):
            a, b = rng.sample(range(hosts), 2)
            twin.start((a, hosts + b), rng.randrange(1, 40_000_000), 0.0)
        if rng.random() < 0.2:
            twin.cancel(rng.randrange(1000))
        twin.loop.advance(twin.loop.now_ns)
        twin.check()
        twin.loop.advance(twin.loop.now_ns + rng.randrange(1_000_000))
    twin.loop.advance(10**12)
    assert not twin.live and not twin.fabric.flows


def test_every_byte_is_carried() -> None:
    """The oracle integrates its own rates in small steps between events; ends agree to a few nanoseconds."""
    rng = random.Random(11)
    loop, fabric, ends = world()
    capacities = [GB * rng.choice((1, 2, 5)) for _ in range(6)]
    links = [fabric.link(f"l{i}", c) for i, c in enumerate(capacities)]
    flows: Dict[int, Tuple[Tuple[int, ...], float]] = {}
    left: Dict[int, float] = {}
    for i in range(30):
        path = tuple(rng.sample(range(6), rng.randrange(1, 4)))
        flows[i] = (path, 0.0)
        left[i] = float(rng.randrange(1000, 10_000_000))
        fabric.start(tuple(links[j] for j in path), int(left[i]), ends, i)
    loop.advance(10**12)
    now = 0.0
    want: Dict[int, float] = {}
    while flows:
        rates = progressive_filling(capacities, flows)
        step = min(left[i] / rates[i] for i in flows)
        now += step
        for i in list(flows):
            left[i] -= rates[i] * step
            if left[i] <= 1e-6:
                want[i] = now * 1e9
                del flows[i]
    assert {i: ends.at[i] for i in sorted(want)} == {i: pytest.approx(want[i], abs=100) for i in sorted(want)}
