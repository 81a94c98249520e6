"""Ordinary and unlucky moves with the checkers watching: nothing is violated, then or once quiet."""

from __future__ import annotations

from typing import Dict, List, Optional, Tuple

import pytest

from kvcore.protocol.config import Rules, S
from kvcore.protocol.messages import (
    Clear,
    Committed,
    Expelled,
    Fetch,
    MoveRequest,
    Pin,
    Pinned,
    PinRequest,
    Release,
    Reserved,
    UnpinRequest,
)
from kvcore.scenario.check_world import attach
from tests.core.drive import CPU, Story, keys, lens

TRANSFERS = pytest.mark.parametrize("push", [False, True], ids=["read", "push"])


class Watched(Story):
    """A story that is watched from its first step; ``done`` ends it: nothing may be violated, open or forgotten."""

    def __init__(
        self,
        instances: Optional[Dict[str, int]] = None,
        ranks: int = 1,
        locations: Tuple[str, ...] = (CPU,),
        push: bool = False,
        faults: bool = True,
    ) -> None:
        super().__init__(Rules(), instances, ranks, locations, push)
        self.watch = attach(self, faults)

    def done(self) -> None:
        self.settle()
        self.elapse(150 * S)
        self.settle()
        self.elapse(3 * S)
        assert self.watch.quiet(self) == []
        assert not self.watch.checker.ghosts.open

    def told(self, op: str) -> List[Tuple[str, int]]:
        return [(answer.state, answer.num_tokens) for answer in self.answers[op]]


@TRANSFERS
def test_a_move(push: bool) -> None:
    w = Watched(push=push, faults=False)
    w.store("a/0", "xyz")
    w.move("a", "b", "xyz", "m")
    w.settle()
    assert w.told("m") == [("copying", 3), ("done", 3)]
    assert (w.at("a/0"), w.at("b/0")) == ("", "xyz")
    w.done()


@TRANSFERS
def test_a_copy(push: bool) -> None:
    w = Watched(push=push, faults=False)
    w.store("a/0", "xy")
    w.move("a", "b", "xy", "c", copy=True)
    w.settle()
    assert w.told("c")[-1] == ("done", 2)
    assert w.whole_at("xy") == "ab"
    w.done()


@TRANSFERS
def test_a_move_to_another_tier(push: bool) -> None:
    w = Watched(locations=("cpu", "disk"), push=push, faults=False)
    w.store("a/0", "xy")
    w.move("a", "a", "xy", location="disk")
    w.settle()
    assert (w.at("a/0"), w.at("a/0", "disk")) == ("", "xy")
    w.done()


def test_a_move_to_its_own_place() -> None:
    w = Watched(faults=False)
    w.store("a/0", "xy")
    w.move("a", "a", "xy", "m")
    w.settle()
    assert w.told("m") == [("done", 2)] and w.at("a/0") == "xy"
    w.done()


@TRANSFERS
def test_two_ranks(push: bool) -> None:
    w = Watched(ranks=2, push=push, faults=False)
    for rank in ("a/0", "a/1"):
        w.store(rank, "xy")
    w.move("a", "b", "xy", "m")
    w.settle()
    assert w.told("m")[-1] == ("done", 2) and w.whole_at("xy") == "b"
    w.done()


@TRANSFERS
def test_a_partial_move_and_a_refused_one(push: bool) -> None:
    w = Watched({"a": 4, "b": 1, "c": 0}, push=push, faults=False)
    w.store("a/0", "xy")
    w.move("a", "b", "xy", "m")
    w.settle()
    assert w.told("m")[-1] == ("done", 1) and w.at("a/0") == "xy"
    w.move("a", "c", "xy", "n")
    w.settle()
    assert w.told("n") == [("failed", 0)]
    w.done()


@TRANSFERS
@pytest.mark.parametrize("at_both", [False, True], ids=["at a", "at both"])
def test_crossing_moves(push: bool, at_both: bool) -> None:
    w = Watched(push=push, faults=False)
    w.store("a/0", "x")
    if at_both:
        w.store("b/0", "x")
    w.move("a", "b", "x", "m")
    w.move("b", "a", "x", "n")
    w.settle()
    assert w.whole_at("x")
    w.done()


@pytest.mark.parametrize("push", [False, True], ids=["read", "push"])
def test_a_chain_and_a_ring(push: bool) -> None:
    w = Watched({"a": 2, "b": 2, "c": 2}, push=push, faults=False)
    for node in ("a/0", "b/0", "c/0"):
        w.store(node, "x")
    for src, dst in (("a", "b"), ("b", "c"), ("c", "a")):
        w.move(src, dst, "x")
    w.settle()
    assert w.whole_at("x")
    w.done()


@TRANSFERS
def test_prompts_that_share_a_prefix(push: bool) -> None:
    w = Watched(push=push, faults=False)
    w.store("a/0", "ab")
    w.store("a/0", "ac")
    w.move("a", "b", "ab")
    w.settle()
    assert w.at("a/0") == "ac"
    w.move("a", "b", "ac")
    w.settle()
    assert (w.at("a/0"), w.at("b/0")) == ("", "abc")
    w.done()


@pytest.mark.parametrize("slots", [8, 2], ids=["all", "what fits"])
def test_a_drain(slots: int) -> None:
    w = Watched({"a": 8, "b": slots}, ranks=2)
    for rank in ("a/0", "a/1"):
        w.store(rank, "ab")
        w.store(rank, "ac")
        w.store(rank, "x")
    w.settle()
    w.request(MoveRequest("drain", ("a", CPU), ("b", CPU), evict=False))
    w.settle()
    told = w.told("drain")
    assert told == ([("copying", 4), ("done", 4)] if slots == 8 else [("copying", 4), ("failed", told[-1][1])])
    w.done()


def test_a_drain_whose_controller_dies() -> None:
    w = Watched({"a": 8, "b": 8})
    w.store("a/0", "ab")
    w.store("a/0", "x")
    w.settle()
    w.request(MoveRequest("drain", ("a", CPU), ("b", CPU)))
    w.until(Release)
    w.boot("ctl")
    w.done()


@TRANSFERS
def test_a_clear_of_either_side_while_it_copies(push: bool) -> None:
    for side in "ab":
        w = Watched(push=push)
        w.store("a/0", "xy")
        w.move("a", "b", "xy")
        w.mail()
        w.clear(side)
        w.mail()
        w.store(f"{side}/0", "z")
        w.done()


@TRANSFERS
@pytest.mark.parametrize("kind", [Pin, Pinned, Fetch, Reserved, Committed, Release])
@pytest.mark.parametrize("node", ["ctl", "a/0", "b/0"])
def test_a_node_dies_and_comes_back(push: bool, kind: type, node: str) -> None:
    w = Watched(push=push)
    w.store("a/0", "xy")
    w.move("a", "b", "xy")
    w.until(kind)
    w.boot(node)
    w.done()


@TRANSFERS
@pytest.mark.parametrize("kind", [Pin, Pinned, Fetch, Reserved, Committed, Release])
def test_a_worker_dies_for_good(push: bool, kind: type) -> None:
    for node in ("a/0", "b/0"):
        w = Watched(push=push)
        w.store("a/0", "xy")
        w.move("a", "b", "xy")
        w.until(kind)
        w.crash(node)
        w.done()


@TRANSFERS
@pytest.mark.parametrize("kind", [Pinned, Fetch, Committed, Release])
def test_everything_is_delivered_once_more_at_the_end(push: bool, kind: type) -> None:
    w = Watched({"a": 2, "b": 2}, push=push)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    w.until(kind)
    w.move("b", "a", "x")
    w.settle()
    w.store("a/0", "z")
    for letter in list(w.sent):
        w.deliver(letter)
        w.mail()
    w.done()


@TRANSFERS
def test_a_cancel_a_lapse_and_a_failed_copy(push: bool) -> None:
    w = Watched({"a": 2, "b": 2}, push=push)
    w.store("a/0", "x")
    w.cancel(w.move("a", "b", "x"))
    w.settle()
    event = w.move("a", "b", "x")
    w.mail()
    w.lease_ends("a/0", event)
    w.store("a/0", "z")
    w.settle()
    w.store("a/0", "x")
    w.move("a", "b", "x")
    w.mail()
    w.finish_copy(*next(iter(w.copies)), ok=False)
    w.done()


def test_eviction_is_an_excuse_once_the_event_is_over() -> None:
    w = Watched({"a": 1, "b": 1})
    w.store("a/0", "x")
    w.move("a", "b", "x")
    release = w.until(Release)
    w.settle()
    assert w.store("b/0", "z") == "ok"
    w.store("a/0", "x")
    w.deliver(release)
    assert w.at("a/0") == "x"
    w.done()


def test_users_pins_and_readers() -> None:
    w = Watched({"a": 2, "b": 2})
    w.store("a/0", "xy")
    w.settle()
    w.request(PinRequest("pin", ("a", CPU), keys("x"), lens("x")))
    w.use("a/0", "xy")
    w.move("a", "b", "xy")
    while w.fresh or w.copies:
        w.mail()
        for at in list(w.copies):
            w.finish_copy(*at)
    w.settle()
    assert w.at("a/0") == "x"
    w.request(UnpinRequest("unpin", w.answers["pin"][-1].event))
    w.done()


def test_late_bytes_of_an_aborted_copy() -> None:
    w = Watched({"a": 2, "b": 1})
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.mail()
    rid = w.copying("b/0")
    w.cancel(event)
    w.mail()
    assert w.store("b/0", "z") == "refused"
    w.land_and_end("b/0", rid)
    w.mail()
    assert w.store("b/0", "z") == "ok"
    w.done()


def test_a_clear_that_nobody_obeys() -> None:
    """b has been expelled and has no epoch yet: it keeps what it holds, and hears no Clear."""
    w = Watched()
    w.store("b/0", "x")
    w.clear("b")
    clear = w.hold(Clear)
    w.deliver(("ctl", "b/0", Expelled(w.controller().incarnation, w.worker("b/0").epoch)))
    w.deliver(clear)
    assert w.at("b/0") == "x"
    w.done()
