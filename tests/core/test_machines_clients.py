"""What clients ask of the controller beside plain moves: drains, repeated questions, users' pins."""

from __future__ import annotations

from kvcore.protocol.config import Rules
from kvcore.protocol.messages import CancelRequest, MoveRequest, PinRequest, Release, StatusRequest, UnpinRequest
from tests.core.drive import CPU, Story, keys, lens


def draining(idem: str = "", window: int = 4) -> Story:
    """Two chains at a, and their drain has begun."""
    w = Story(Rules(), drain_window=window)
    w.store("a/0", "xy")
    w.store("a/0", "z")
    w.mail()
    w.request(MoveRequest("d", ("a", CPU), ("b", CPU), idem=idem))
    w.event = w.begun()[-1] - min(window, 2)
    return w


def test_chains_of_a_drain_move_at_once() -> None:
    w = draining()
    assert len(w.begun()) == 3
    w.settle()
    answer = w.status(w.event)
    assert (answer.state, answer.num_tokens) == ("done", 3)
    assert sorted(w.at("b/0")) == ["x", "y", "z"] and w.at("a/0") == "" and w.leaks() == ""


def test_chains_that_share_their_head_follow_one_another() -> None:
    w = Story(Rules())
    w.store("a/0", "xy")
    w.store("a/0", "xz")
    w.mail()
    w.request(MoveRequest("d", ("a", CPU), ("b", CPU)))
    assert len(w.begun()) == 2
    w.settle()
    assert sorted(w.at("b/0")) == ["x", "y", "z"] and w.at("a/0") == "" and w.leaks() == ""


def test_a_cancelled_drain_fails_what_is_not_decided() -> None:
    w = draining()
    w.ask(CancelRequest("c", w.event), "c")
    w.settle()
    answer = w.status(w.event)
    assert (answer.state, answer.reason) == ("failed", "cancelled")
    assert sorted(w.at("a/0")) == ["x", "y", "z"] and w.at("b/0") == "" and w.leaks() == ""


def stepped(step: int, held: str = "wxyz", **more: object) -> Story:
    """A move of four chunks, prefix by prefix."""
    w = Story(Rules())
    w.store("a/0", held)
    w.mail()
    w.request(MoveRequest("s", ("a", CPU), ("b", CPU), keys("wxyz"), lens("wxyz"), step=step, **more))  # type: ignore[arg-type]
    return w


def test_a_stepped_move_shows_prefix_after_prefix_and_deletes_at_the_end() -> None:
    w = stepped(1)
    parent = w.begun()[0]
    seen = []
    while w.status(parent).state == "copying":
        here = w.at("b/0")
        if here not in seen:
            seen.append(here)
        if here != "wxyz":
            assert w.at("a/0") == "wxyz"  # all of it, until the last prefix is there
        w.step()
    w.settle()
    assert seen[:4] == ["", "w", "wx", "wxy"]
    answer = w.status(parent)
    assert (answer.state, answer.num_tokens, answer.n) == ("done", 4, 4)
    assert (w.at("a/0"), w.at("b/0"), w.leaks()) == ("", "wxyz", "")
    assert [answer.state for answer in w.answers["s"]] == ["copying", "done"]


def test_a_stepped_move_of_what_is_held_only_in_part_moves_that_part() -> None:
    w = stepped(2, held="wxy")
    assert w.answers["s"][0].num_tokens == 3
    w.settle()
    assert (w.at("a/0"), w.at("b/0")) == ("", "wxy")


def test_a_stepped_move_that_fails_has_deleted_nothing() -> None:
    w = stepped(2)
    parent = w.begun()[0]
    while w.at("b/0") != "wx":
        w.step()
    w.ask(CancelRequest("c", parent), "c")
    w.settle()
    answer = w.status(parent)
    assert (answer.state, answer.reason) == ("failed", "cancelled")
    assert (w.at("a/0"), w.at("b/0"), w.leaks()) == ("wxyz", "wx", "")


def test_a_step_as_long_as_the_prompt_is_a_plain_move() -> None:
    w = stepped(4)
    assert len(w.begun()) == 1
    w.settle()
    assert (w.at("a/0"), w.at("b/0")) == ("", "wxyz")


def test_a_drain_cancelled_while_a_chain_is_released_begins_no_other() -> None:
    w = draining(window=1)
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
