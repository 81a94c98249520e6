"""H01 to H12: each rule's run, with the rule and without it. docs/protocol.md tells the same stories in words."""

from __future__ import annotations

from kvcore.protocol.config import Rules
from kvcore.protocol.messages import (
    End,
    Fence,
    Pin,
    Pinned,
    Release,
    Stop,
)
from tests.core.drive import Story, hole


@hole(on="failed, x is whole at a", off="failed, x is whole at ")
def test_h01_release_waits_for_every_rank(rules: Rules) -> str:
    """Two ranks: rank 0 has committed, and its source could delete; then rank 1's copy fails."""
    w = Story(rules, ranks=2)
    w.store("a/0", "x")
    w.store("a/1", "x")
    event = w.move("a", "b", "x")
    w.mail()
    w.finish_copy("b/0", w.copying("b/0"))
    w.mail()
    w.finish_copy("b/1", w.copying("b/1"), ok=False)
    w.mail()
    return f"{w.status(event).state}, x is whole at {w.whole_at('x')}"


# h34 (what another event retains is kept) would keep x at both places.
@hole(on="x at ab", off="x at ", also_off=("h34",))
def test_h02_leaving_is_not_there(rules: Rules) -> str:
    """x at a and at b. M a>b and N b>a both pin, both find x there, both commit, both delete."""
    w = Story(rules)
    w.store("a/0", "x")
    w.store("b/0", "x")
    w.move("a", "b", "x")
    w.move("b", "a", "x")
    w.mail()
    w.settle()
    return f"x at {w.whole_at('x')}"


@hole(on="x at a", off="x at ", also_off=("h34",))
def test_h02_leaving_is_not_there_for_a_move_back(rules: Rules) -> str:
    """x at a alone. N b>a starts when M a>b has committed, before M's Release lands at a."""
    w = Story(rules)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    w.until(Release)
    late = w.hold(Release)
    w.move("b", "a", "x")
    while not w.copies and w.fresh and "x" in w.at("b/0"):
        w.deliver(next(iter(w.fresh)))
    w.deliver(late)
    w.settle()
    return f"x at {w.whole_at('x')}"


# h34 would keep x at both places.
@hole(on="x at ab", off="x at ", also_off=("h34",))
def test_h03_delete_only_the_pinned_slot(rules: Rules) -> str:
    """As H02, and copied anew: M's Release deletes by key the entry that N has just put there, and N's M's."""
    w = Story(rules)
    w.store("a/0", "x")
    w.store("b/0", "x")
    w.move("a", "b", "x")
    w.move("b", "a", "x")
    w.mail()
    for node in ("a/0", "b/0"):
        w.finish_copy(node, w.copying(node))
    w.settle()
    return f"x at {w.whole_at('x')}"


@hole(on="x at a", off="x at ")
def test_h04_no_finished_event_is_remembered(rules: Rules) -> str:
    """M is done; its destination is cleared; an engine stores x at a again; a late double of Release(M) arrives."""
    w = Story(rules)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    release = w.until(Release)
    w.settle()
    w.clear("b")
    w.settle()
    w.store("a/0", "x")
    w.deliver(release)
    return f"x at {w.whole_at('x')}"


@hole(on="x at a", off="x at ")
def test_h05_release_names_the_pin(rules: Rules) -> str:
    """As H04, after a late Pin(M) has made a new pin, which the late Release(M) does not name."""
    w = Story(rules)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    pin = w.until(Pin)
    release = w.until(Release)
    w.settle()
    w.clear("b")
    w.settle()
    w.store("a/0", "x")
    w.deliver(pin)
    w.hold(Pinned)
    w.deliver(release)
    return f"x at {w.whole_at('x')}"


# Under h02 x would be copied anew beside itself, under h34 the event's own retention would keep it.
@hole(on="done, x at a", off="done, x at ", also_off=("h02", "h34"))
def test_h06_a_move_to_its_own_place_deletes_nothing(rules: Rules) -> str:
    """M a>a: x is already there, commit, delete."""
    w = Story(rules)
    w.store("a/0", "x")
    event = w.move("a", "a", "x")
    w.settle()
    return f"{w.status(event).state}, x at {w.whole_at('x')}"


@hole(on="store refused, 2 moved, x at b", off="store ok, 2 moved, x at ")
def test_h07_present_chunks_are_held_until_commit(rules: Rules) -> str:
    """b (two slots) holds x and copies y; an engine's store would evict x; the commit says two."""
    w = Story(rules, {"a": 4, "b": 2})
    w.store("a/0", "xy")
    w.store("b/0", "x")
    event = w.move("a", "b", "xy")
    w.mail()
    stored = w.store("b/0", "z")
    w.settle()
    return f"store {stored}, {w.status(event).n} moved, x at {w.whole_at('x')}"


@hole(on="done, x at b", off="failed, x at b")
def test_h08_decide_is_journaled_first(rules: Rules) -> str:
    """Release(delete) has been carried out; the controller dies and starts again. Failed means: nothing was deleted."""
    w = Story(rules)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.deliver(w.until(Release))
    w.crash("ctl")
    w.fresh.clear()
    w.boot("ctl")
    w.settle()
    return f"{w.status(event).state}, x at {w.whole_at('x')}"


@hole(on="failed, bytes: ", off="done, bytes: b/0 x holds z")
def test_h09_bytes_count_only_if_the_pin_was_alive_after_them(rules: Rules) -> str:
    """The lease ends while b reads, the slot is used again, b reads what is there now."""
    w = Story(rules, {"a": 1, "b": 4})
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.mail()
    w.lease_ends("a/0", event)
    w.store("a/0", "z")
    w.settle()
    return f"{w.status(event).state}, bytes: {w.wrong_bytes()}"


@hole(on="failed, bytes: ", off="done, bytes: b/0 x holds z")
def test_h09_bytes_pushed_count_only_if_the_pin_was_alive_after_them(rules: Rules) -> str:
    """The same by push: the writer asks its own pin once the last byte is written."""
    w = Story(rules, {"a": 1, "b": 4}, push=True)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.mail()
    w.lease_ends("a/0", event)
    w.store("a/0", "z")
    w.settle()
    return f"{w.status(event).state}, bytes: {w.wrong_bytes()}"


@hole(on="failed, bytes: ", off="done, bytes: b/0 x holds z")
def test_h10_the_fence_comes_after_the_last_byte(rules: Rules) -> str:
    """The pin is alive when the copy begins, and a fence then says so; lease and slot go before the last byte."""
    w = Story(rules, {"a": 1, "b": 4})
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.mail()  # without the rule, Fence and Fenced as well
    w.lease_ends("a/0", event)
    w.store("a/0", "z")
    w.settle()
    return f"{w.status(event).state}, bytes: {w.wrong_bytes()}"


@hole(on="bytes: ", off="bytes: b/0 x holds z")
def test_h11_a_pin_id_holds_its_epoch(rules: Rules) -> str:
    """a restarts; b reads what its new memory holds; x is stored and pinned again as pin 1: the fence asks for 1."""
    w = Story(rules, {"a": 2, "b": 2, "c": 2})
    w.store("a/0", "x")
    w.move("a", "b", "x")
    w.mail()
    w.boot("a/0")
    w.mail(lose=(End,))  # the controller has failed M, and b does not hear of it
    w.store("a/0", "z")  # in the slot from which b reads
    w.finish_copy("b/0", w.copying("b/0"))
    fence = w.hold(Fence)
    w.store("a/0", "x")
    w.move("a", "c", "x")
    w.deliver(w.until(Pin))
    w.deliver(fence)
    w.mail()
    return f"bytes: {w.wrong_bytes()}"


@hole(on="store refused, bytes: ", off="store ok, bytes: b/0 z holds x")
def test_h12_an_aborted_copys_slots_stay_in_quarantine(rules: Rules) -> str:
    """The move is cancelled, b aborts its read, an engine stores z at b; then the read's bytes land."""
    w = Story(rules, {"a": 2, "b": 1})
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.mail()
    rid = w.copying("b/0")
    w.cancel(event)
    w.mail()
    stored = w.store("b/0", "z")
    w.land_and_end("b/0", rid)
    result = f"store {stored}, bytes: {w.wrong_bytes()}"
    assert w.store("b/0", "y") == "ok"  # the quarantine is over once the copy has ended
    return result


@hole(on="store refused, bytes: ", off="store ok, bytes: b/0 z holds x")
def test_h12_a_stopped_pushs_slots_stay_in_quarantine(rules: Rules) -> str:
    """The same by push: a writes on until Stop has reached it and it has stopped."""
    w = Story(rules, {"a": 2, "b": 1}, push=True)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.mail()
    rid = w.copying("a/0")
    w.cancel(event)
    w.mail(keep=(Stop,))
    stored = w.store("b/0", "z")
    w.land("a/0", rid)
    result = f"store {stored}, bytes: {w.wrong_bytes()}"
    w.settle()
    assert w.store("b/0", "y") == "ok"
    return result
