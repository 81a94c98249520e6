"""H13 to H25: each rule's run, with the rule and without it."""

from __future__ import annotations

from kvcore.protocol.config import Rules, S
from kvcore.protocol.messages import (
    Cleared,
    Committed,
    End,
    Fetch,
    Pin,
    Pinned,
    Push,
    Pushed,
    Release,
    Released,
    Reserved,
    Stop,
)
from tests.core.drive import Story, hole


@hole(on="store ok, bytes: ", off="store ok, bytes: b/0 z holds x")
def test_h13_a_doubled_push_writes_nothing(rules: Rules) -> str:
    """A push is done and committed, b is cleared and its slot used again; a double of the Push finds its pin alive."""
    w = Story(rules, {"a": 2, "b": 1}, push=True)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    push = w.until(Push)
    w.deliver(push)
    w.finish_copy("a/0", w.copying("a/0"))
    w.until(Committed)
    w.hold(Committed)
    w.clear("b")
    w.deliver(w.until(Cleared))
    w.hold(Release)  # so the pin is still alive when the double arrives
    w.mail()
    stored = w.store("b/0", "z")
    w.deliver(push)
    w.settle()
    return f"store {stored}, bytes: {w.wrong_bytes()}"


@hole(on="store ok, bytes: ", off="store ok, bytes: b/0 z holds x")
def test_h13c_stop_overtakes_push(rules: Rules) -> str:
    """Stop arrives before its Push and is answered at once; the slot is used again; then the Push arrives."""
    w = Story(rules, {"a": 2, "b": 1}, push=True)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.until(Push)
    push = w.hold(Push)
    w.mail()
    w.cancel(event)
    w.hold(Release)  # so the pin is still alive when the Push arrives
    w.mail()
    stored = w.store("b/0", "z")
    w.deliver(push)
    w.settle()
    return f"store {stored}, bytes: {w.wrong_bytes()}"


@hole(on="bytes: ", off="bytes: b/0 y holds x")
def test_h14_an_answer_of_another_reservation_commits_nothing(rules: Rules) -> str:
    """M's push ends well although M is over; its Pushed finds N's reservation, whose Push was lost."""
    w = Story(rules, push=True)
    w.store("a/0", "x")
    w.store("a/0", "y")
    m = w.move("a", "b", "x")
    w.mail()
    w.cancel(m)
    w.hold(Release)
    w.mail(keep=(Stop,))
    w.finish_copy("a/0", w.copying("a/0"))
    pushed = w.hold(Pushed)
    w.mail()
    w.move("a", "b", "y")
    w.mail(lose=(Push,))
    w.deliver(pushed)
    return f"bytes: {w.wrong_bytes()}"


# h34 would keep x at b, which M has committed to and not given back.
@hole(on="x at a", off="x at ", also_off=("h34",))
def test_h15_a_pin_that_lapsed_is_never_replaced(rules: Rules) -> str:
    """x at both. M a>b has committed; its pin lapses; N b>a counts x at a as there; a late Pin(M) makes a new pin."""
    w = Story(rules)
    w.store("a/0", "x")
    w.store("b/0", "x")
    m = w.move("a", "b", "x")
    pin = w.until(Pin)
    w.until(Committed)
    reserved, committed = w.hold(Reserved), w.hold(Committed)
    w.lease_ends("a/0", m)
    w.move("b", "a", "x")
    w.settle()
    assert w.whole_at("x") == "a"
    w.deliver(pin)
    w.deliver(w.hold(Pinned))
    w.deliver(reserved)
    w.deliver(committed)
    w.settle()
    return f"x at {w.whole_at('x')}"


@hole(on="ac usable at a", off="ac usable at ")
def test_h16_a_chunk_whose_child_is_here_stays(rules: Rules) -> str:
    """[a,b] is moved, [a,c] stays: without a, c cannot be reached."""
    w = Story(rules)
    w.store("a/0", "ab")
    w.store("a/0", "ac")
    w.move("a", "b", "ab")
    w.settle()
    return f"ac usable at {w.whole_at('ac')}"


# A new incarnation of a participant fails its events at once, so the answer of the old one must find another event:
# h24 off lets N have M's number. h35 would ask b again before it decides.
@hole(on="reserving, x at a", off="done, x at ", also_off=("h24", "h35"))
def test_h18_answers_of_another_incarnation_are_ignored(rules: Rules) -> str:
    """b has committed, restarted and registered; the old Committed is believed and x deleted at a."""
    w = Story(rules)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    w.until(Committed)
    old = w.hold(Committed)
    w.boot("ctl")
    w.boot("b/0")
    w.settle()
    w.beat("a/0")
    w.lease_ends("a/0", 1)
    event = w.move("a", "b", "x")
    w.mail(lose=(Fetch,))
    w.deliver(old)
    w.settle()
    return f"{w.status(event).state}, x at {w.whole_at('x')}"


@hole(on="1 moved, x at ab", off="2 moved, x at ")
def test_h19_what_is_held_is_not_evicted_for_the_rest(rules: Rules) -> str:
    """b has one slot and x in it; [x,y] is moved there: y must not push x out and be counted as the second."""
    w = Story(rules, {"a": 4, "b": 1})
    w.store("a/0", "xy")
    w.store("b/0", "x")
    event = w.move("a", "b", "xy")
    w.settle()
    return f"{w.status(event).n} moved, x at {w.whole_at('x')}"


@hole(on="cleared: ok, then x at ", off="cleared: ok, then x at b")
def test_h20_a_clear_ends_what_runs(rules: Rules) -> str:
    """M has failed, its End is lost, b is cleared; then the copy ends and finds its pin alive."""
    w = Story(rules)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.mail()
    rid = w.copying("b/0")
    w.cancel(event)
    w.hold(End)
    w.hold(Release)
    cleared = w.clear("b")
    w.mail()
    answer = w.answers[cleared][-1].state
    w.land_and_end("b/0", rid)
    w.mail()
    return f"cleared: {answer}, then x at {w.at('b/0') and 'b'}"


@hole(on="cleared: ok, then x at ", off="cleared: ok, then x at b")
def test_h20_a_clear_raises_the_incarnation(rules: Rules) -> str:
    """M has failed and b is cleared; a late Fetch, its pin still alive, names the location as it was before."""
    w = Story(rules)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.until(Fetch)
    fetch = w.hold(Fetch)
    w.cancel(event)
    w.hold(Release)
    cleared = w.clear("b")
    w.mail()
    answer = w.answers[cleared][-1].state
    w.deliver(fetch)
    for at in list(w.copies):
        w.finish_copy(*at)
    w.mail(lose=(End,))
    return f"cleared: {answer}, then x at {w.at('b/0') and 'b'}"


@hole(on="a has xy, b has x", off="a has , b has x")
def test_h21_only_the_reserved_prefix_is_deleted(rules: Rules) -> str:
    """b takes one chunk of two. What b did not take must stay, and with it its head."""
    w = Story(rules, {"a": 4, "b": 1})
    w.store("a/0", "xy")
    w.move("a", "b", "xy")
    w.settle()
    return f"a has {w.at('a/0')}, b has {w.at('b/0')}"


@hole(on="", off="a/0: pin of event 4294967297")
def test_h22_a_pin_has_a_lease(rules: Rules) -> str:
    """Pin arrives after the event has failed, and its answer is lost: nobody will ever release it."""
    w = Story(rules)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    pin = w.hold(Pin)
    w.cancel(event)
    w.mail()
    w.deliver(pin)
    w.mail(lose=(Pinned,))
    w.elapse(60 * S)
    return w.leaks()


@hole(on="full full", off="reserving reserving")
def test_h23_nobody_waits_for_space(rules: Rules) -> str:
    """a and b are full: x to b would wait for y's slot, y to a for x's, and each pin keeps the other waiting."""
    w = Story(rules, {"a": 1, "b": 1})
    w.store("a/0", "x")
    w.store("b/0", "y")
    events = [w.move("a", "b", "x"), w.move("b", "a", "y")]
    w.elapse(60 * S)
    answers = [w.status(event) for event in events]
    return " ".join(answer.reason or answer.state for answer in answers)


# h35 would ask b again before it decides.
@hole(on="y at a", off="y at ", also_off=("h35",))
def test_h24_event_ids_are_never_used_twice(rules: Rules) -> str:
    """The controller restarts; a new event has the old one's number; an old Committed counts for the new one."""
    w = Story(rules)
    w.store("a/0", "x")
    w.store("a/0", "y")
    w.move("a", "b", "x")
    w.until(Committed)
    old = w.hold(Committed)
    w.boot("ctl")
    w.settle()
    for node in ("a/0", "b/0"):
        w.beat(node)
    w.lease_ends("a/0", old[2].event)
    w.settle()
    w.move("a", "b", "y")
    w.until(Fetch)
    w.hold(Fetch)
    w.deliver(old)
    w.settle()
    return f"y at {w.whole_at('y')}"


@hole(on="done, deleted -1 of 1", off="done, deleted 0 of 1")
def test_h25_deleted_is_a_count_only_from_a_live_pin(rules: Rules) -> str:
    """Released is lost; the second one says pin_gone and deleted 0, although the first had deleted."""
    w = Story(rules)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.until(Released)
    w.hold(Released)
    w.fire("ctl", ("retry", event, 0))
    w.settle()
    answer = w.status(event)
    gone = 1 - len(w.at("a/0"))
    return f"{answer.state}, deleted {answer.source[0].deleted} of {gone}"
