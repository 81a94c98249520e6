"""Flows that are not alike: what weight, priority and cap make of a link, and that all is fair again afterwards."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import pytest
from hypothesis import given, settings

from kvcore.protocol.messages import Terms
from kvsim.fabric import Fabric
from kvsim.loop import Loop
from tests.sim.test_fabric import Twin, histories

GB = 10**9


class Net:
    def __init__(self, *capacities: float) -> None:
        self.loop: Loop = Loop()
        self.fabric: Fabric = Fabric(self.loop)
        self.links: List[Any] = [self.fabric.link(f"l{i}", capacity * GB) for i, capacity in enumerate(capacities)]
        self.ends: Dict[int, int] = {}

    def start(
        self,
        nbytes: int = 10**12,
        path: Tuple[int, ...] = (0,),
        owner: str = "b",
        terms: Optional[Terms] = None,
        cap: float = 0.0,
    ) -> int:
        links = tuple([self.links[i] for i in path])
        name = len(self.ends) + len(self.fabric.flows) + 1000
        found = self.fabric.start(links, nbytes, self._ended, name, cap * GB, owner=owner, terms=terms)
        self.loop.advance(self.loop.now_ns)
        return found

    def _ended(self, name: int) -> None:
        self.ends[name] = self.loop.now_ns

    def rates(self, *flows: int) -> List[float]:
        return [self.fabric.rate(flow) / GB for flow in flows]


def test_flows_of_one_process_share_by_weight() -> None:
    net = Net(8)
    three, one = net.start(terms=Terms(weight=3)), net.start()
    assert net.rates(three, one) == pytest.approx([6, 2])


def test_weights_count_within_a_process_only() -> None:
    net = Net(6)
    heavy, light, other = net.start(terms=Terms(weight=3)), net.start(), net.start(owner="c")
    assert net.rates(heavy, light, other) == pytest.approx([3, 1, 2])


def test_the_higher_priority_has_all_and_the_lower_what_it_leaves() -> None:
    net = Net(8)
    low, high = net.start(), net.start(terms=Terms(priority=5))
    assert net.rates(low, high) == pytest.approx([0, 8])
    capped = net.start(terms=Terms(priority=9), cap=3)
    assert net.rates(low, high, capped) == pytest.approx([0, 5, 3])
    net.fabric.cancel(high)
    net.loop.advance(net.loop.now_ns)
    assert net.rates(low, capped) == pytest.approx([5, 3])


def test_a_priority_is_nothing_to_another_process() -> None:
    net = Net(8)
    high, low, other = net.start(terms=Terms(priority=1)), net.start(), net.start(owner="c", terms=Terms(priority=-3))
    assert net.rates(high, low, other) == pytest.approx([4, 0, 4])


def test_what_a_cap_leaves_is_shared_by_weight() -> None:
    net = Net(8)
    capped, three, one = net.start(cap=2, terms=Terms(weight=4)), net.start(terms=Terms(weight=3)), net.start()
    assert net.rates(capped, three, one) == pytest.approx([2, 4.5, 1.5])


def test_a_flow_that_waits_ends_as_soon_as_it_can() -> None:
    net = Net(1)
    net.start(1000)
    net.start(500, terms=Terms(priority=1))
    net.loop.advance(10**9)
    assert sorted(net.ends.values()) == [500, 1500]


def test_afterwards_all_is_fair() -> None:
    net = Net(8, 2)
    flows = [net.start(), net.start(path=(0, 1)), net.start(owner="c")]
    heavy = net.start(terms=Terms(weight=7))
    net.fabric.cancel(heavy)
    net.loop.advance(net.loop.now_ns)
    assert net.rates(*flows) == pytest.approx([3, 2, 3])
    late = net.start(path=(1,))
    assert net.rates(*flows, late) == pytest.approx([3.5, 1, 3.5, 1])


@settings(max_examples=100, deadline=None)
@given(histories())
def test_of_flows_that_are_alike_both_ways_make_the_same(
    history: Tuple[List[float], List[List[Tuple[Any, ...]]]],
) -> None:
    """Now one way, now the other, in turn."""
    capacities, instants = history
    twin = Twin(list(capacities))
    for nth, instant in enumerate(instants):
        for what, *args in instant:
            getattr(twin, what)(*args)
        twin.fabric.was_unlike = nth % 2 == 0
        twin.loop.advance(twin.loop.now_ns)
        twin.check()
        twin.loop.advance(twin.loop.now_ns + 10**6)
        twin.check()
