"""What clients ask of the controller beside plain moves: drains, repeated questions, users' pins."""

from __future__ import annotations

from kvcore.protocol.config import Rules
from kvcore.protocol.messages import CancelRequest, MoveRequest, PinRequest, Release, StatusRequest, UnpinRequest
from tests.core.drive import CPU, Story, keys, lens


def draining(idem: str = "") -> Story:
    """Two chains at a, and their drain has begun."""
    w = Story(Rules())
    w.store("a/0", "xy")
    w.store("a/0", "z")
    w.mail()
    w.request(MoveRequest("d", ("a", CPU), ("b", CPU), idem=idem))
    w.event = w.begun()[-1] - 1
    return w


def test_a_drain_cancelled_while_a_chain_is_released_begins_no_other() -> None:
    w = draining()
    w.until(Release)
    answer = w.ask(CancelRequest("c", w.event), "c")
    assert (answer.state, answer.reason, answer.num_tokens) == ("copying", "cancelled", 3)
    w.settle()
    answer = w.status(w.event)
    assert (answer.state, answer.reason) == ("failed", "cancelled")
    assert answer.detail == "1 chains not begun: cancelled"
    assert w.at("a/0") + w.at("b/0") in ("xyz", "zxy")
    assert w.leaks() == ""


def test_a_drain_asked_for_twice_is_answered_twice() -> None:
    w = draining("k")
    answer = w.ask(MoveRequest("again", ("a", CPU), ("b", CPU), idem="k"), "again")
    assert (answer.state, answer.num_tokens, answer.event) == ("copying", 3, w.event)
    w.settle()
    assert [answer.state for answer in w.answers["again"]] == ["copying", "done"]


def test_a_drain_is_waited_for() -> None:
    w = draining()
    w.request(StatusRequest("wait", w.event, wait=True))
    w.settle()
    assert [answer.state for answer in w.answers["wait"]] == ["done"]


def test_an_unpin_that_runs_is_answered_although_it_is_asked_for_again() -> None:
    w = Story(Rules())
    w.store("a/0", "x")
    w.mail()
    w.request(PinRequest("p", ("a", CPU), keys("x"), lens("x")))
    w.mail()
    event = w.answers["p"][-1].event
    w.request(UnpinRequest("u", event))
    assert w.ask(UnpinRequest("again", event), "again").reason == "in_progress"
    w.mail()
    assert [answer.state for answer in w.answers["u"]] == ["ok"]
    assert w.ask(UnpinRequest("late", event), "late").reason == "unknown_event"
