"""What clients ask of the controller beside plain moves: drains, repeated questions, users' pins."""

from __future__ import annotations

import pytest

from kvcore.protocol.config import Rules
from kvcore.protocol.messages import (
    NO_ID,
    CancelRequest,
    End,
    MoveRequest,
    PinRequest,
    Push,
    Release,
    Rid,
    StatusRequest,
    Stop,
    UnpinRequest,
)
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


def stepped(step: int, held: str = "wxyz", push: bool = False, step_window: int = 3) -> Story:
    """A move of four chunks, prefix by prefix."""
    w = Story(Rules(), push=push, step_window=step_window)
    w.store("a/0", held)
    w.mail()
    w.request(MoveRequest("s", ("a", CPU), ("b", CPU), keys("wxyz"), lens("wxyz"), step=step))
    return w


def fence(w: Story, rid: Rid) -> None:
    """The copy of that reservation ends, and the source says that it was good."""
    w.finish_copy("b/0", rid)
    w.mail(keep=(Release, End))


@pytest.mark.parametrize("push", [False, True])
def test_a_stepped_move_shows_prefix_after_prefix_and_deletes_at_the_end(push: bool) -> None:
    w = stepped(1, push=push)
    event = w.begun()[0]
    seen = []
    while w.status(event).state not in ("done", "failed"):
        here = w.at("b/0")
        if here not in seen:
            seen.append(here)
        if here != "wxyz":
            assert w.at("a/0") == "wxyz"  # all of it, until the last prefix is there
        w.step()
    w.settle()
    assert seen == ["", "w", "wx", "wxy", "wxyz"]
    answer = w.status(event)
    assert (answer.state, answer.num_tokens, answer.n) == ("done", 4, 4)
    assert [one.deleted for one in answer.source] == [4]
    assert (w.at("a/0"), w.at("b/0"), w.leaks()) == ("", "wxyz", "")
    assert [answer.state for answer in w.answers["s"]] == ["copying", "done"]


def test_steps_are_under_way_at_once_and_each_follows_the_one_before_it() -> None:
    w = stepped(1, step_window=3)
    w.mail()
    copies = {rid: copy for (_, rid), (copy, _) in w.copies.items()}
    first, second, third = copies
    assert [copy.after for copy in copies.values()] == [NO_ID, first, second]
    assert {copy.keys for copy in copies.values()} == {keys("w"), keys("x"), keys("y")}
    fence(w, first)
    assert w.at("b/0") == "w"
    (fourth,) = [rid for _, rid in w.copies if rid not in copies]
    assert w.copies["b/0", fourth][0].after == third


def test_a_step_that_is_there_before_those_before_it_is_not_visible() -> None:
    w = stepped(1)
    w.mail()
    first, second, third = [rid for _, rid in w.copies]
    fence(w, third)
    fence(w, second)
    assert w.at("b/0") == "" and w.controller().moves.events[w.begun()[0]].shown() == 0
    fence(w, first)
    assert w.at("b/0") == "wxy" and w.controller().moves.events[w.begun()[0]].shown() == 3
    w.settle()
    assert (w.at("a/0"), w.at("b/0"), w.leaks()) == ("", "wxyz", "")


def test_steps_go_one_by_one_where_that_is_asked() -> None:
    w = stepped(1, step_window=1)
    w.mail()
    assert len(w.copies) == 1
    w.settle()
    assert (w.at("a/0"), w.at("b/0"), w.leaks()) == ("", "wxyz", "")


@pytest.mark.parametrize("push", [False, True])
def test_a_step_whose_copy_fails_ends_the_move_and_those_behind_it(push: bool) -> None:
    w = stepped(1, push=push)
    event = w.begun()[0]
    w.mail()
    node = "a/0" if push else "b/0"
    first, second, third = [rid for _, rid in w.copies]
    w.finish_copy(node, first)
    w.mail(keep=(Release, End))
    w.finish_copy(node, second, ok=False)
    w.mail(keep=(Stop,))
    assert set(w.worker("b/0").destination.quarantines) >= {third}  # its bytes may still land
    w.settle()
    answer = w.status(event)
    assert (answer.state, answer.reason) == ("failed", "copy_failed")
    assert (w.at("a/0"), w.at("b/0"), w.leaks(), w.wrong_bytes()) == ("wxyz", "w", "", "")


@pytest.mark.parametrize("lost", ["w", "x"])
def test_a_push_of_a_step_that_was_lost_is_asked_for_again(lost: str) -> None:
    w = stepped(1, push=True)
    w.until(Push)
    for letter in [one for one in w.fresh if isinstance(one[2], Push) and set(one[2].keys) & set(keys(lost))]:
        w.lose(letter)
    w.mail()
    assert len(w.copies) == 3 - len(lost)
    w.elapse(w.specs["ctl"].config.retry_ns)  # the Fetch is sent again, and with it the Pushes
    assert len(w.copies) == 3
    w.settle()
    assert (w.at("a/0"), w.at("b/0"), w.leaks(), w.wrong_bytes()) == ("", "wxyz", "", "")


def test_a_push_of_a_step_that_comes_after_its_stop_or_twice_writes_nothing() -> None:
    w = stepped(1, push=True)
    w.until(Push)
    first = next(one for one in w.fresh if isinstance(one[2], Push) and one[2].keys == keys("w"))
    w.lose(first)
    w.mail()
    w.cancel(w.begun()[0])
    w.settle()
    assert w.leaks() == ""  # its Stop was answered: its slot may be used again
    w.deliver(first)
    assert not w.copies
    w = stepped(1, push=True)
    w.until(Push)
    first = next(one for one in w.fresh if isinstance(one[2], Push) and one[2].keys == keys("w"))
    w.lose(first)
    w.mail()
    w.deliver(first)
    w.finish_copy("a/0", first[2].rid)  # type: ignore[union-attr]
    running = len(w.copies)
    w.deliver(first)
    assert len(w.copies) == running


def test_steps_that_the_destination_has_already_are_not_copied() -> None:
    w = Story(Rules())
    w.store("a/0", "wxyz")
    w.store("b/0", "wx")
    w.mail()
    w.request(MoveRequest("s", ("a", CPU), ("b", CPU), keys("wxyz"), lens("wxyz"), step=1))
    w.mail()
    assert [copy.keys for copy, _ in w.copies.values()] == [keys("y"), keys("z")]
    w.settle()
    assert (w.at("a/0"), w.at("b/0"), w.leaks()) == ("", "wxyz", "")


def test_what_another_move_takes_away_stands_again_with_the_next_step() -> None:
    w = Story(Rules(), {"a": 4, "b": 4, "c": 4})
    w.store("a/0", "wxyz")
    w.mail()
    w.request(MoveRequest("s", ("a", CPU), ("b", CPU), keys("wxyz"), lens("wxyz"), step=2))
    w.mail()
    first, second = [rid for _, rid in w.copies]
    fence(w, first)
    w.move("b", "c", "wx")
    w.mail()
    w.finish_copy("c/0", w.copying("c/0"))
    w.mail()
    assert (w.at("b/0"), w.at("c/0")) == ("", "wx")
    fence(w, second)
    assert w.at("b/0") == "wxyz"
    w.settle()
    assert (w.at("a/0"), w.at("b/0"), w.at("c/0"), w.leaks(), w.wrong_bytes()) == ("", "wxyz", "wx", "", "")


def test_a_stepped_move_of_what_is_held_only_in_part_moves_that_part() -> None:
    w = stepped(2, held="wxy")
    w.settle()
    assert w.answers["s"][0].num_tokens == 3
    assert (w.at("a/0"), w.at("b/0")) == ("", "wxy")


def test_a_stepped_move_that_fails_has_deleted_nothing() -> None:
    w = stepped(2)
    event = w.begun()[0]
    while w.at("b/0") != "wx":
        w.step()
    w.ask(CancelRequest("c", event), "c")
    w.settle()
    answer = w.status(event)
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


def test_long_steps_are_shown_and_held_as_short_ones_are() -> None:
    text = "abcdefghijklmnopqrstuvwxy"
    w = Story(Rules(), {"a": 32, "b": 26, "c": 32})
    w.store("a/0", text)
    w.store("b/0", "Z")
    w.mail()
    w.request(MoveRequest("s", ("a", CPU), ("b", CPU), keys(text), lens(text), step=9))
    w.mail()
    first, second, third = [rid for _, rid in w.copies]
    fence(w, first)
    assert w.at("b/0") == "Z" + text[:9]
    w.store("b/0", "0")  # which finds room where Z was, and not in what is shown
    assert w.at("b/0") == "0" + text[:9]
    fence(w, third)
    fence(w, second)
    w.settle()
    assert (w.at("a/0"), w.at("b/0"), w.leaks(), w.wrong_bytes()) == ("", "0" + text, "", "")
