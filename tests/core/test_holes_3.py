"""H26 to H40: each rule's run, with the rule and without it."""

from __future__ import annotations

from kvcore.protocol.config import MS, Rules, S
from kvcore.protocol.machine import Received, Send
from kvcore.protocol.messages import (
    Alive,
    Beat,
    Committed,
    Delta,
    Fence,
    Fenced,
    Fetch,
    MoveRequest,
    Pin,
    Push,
    Register,
    Release,
    Retain,
)
from tests.core.drive import CPU, Story, hole


@hole(on="planned 1, moved 1", off="planned 2, moved 1")
def test_h26_the_controller_fixes_a_drains_list(rules: Rules) -> str:
    """y is at rank 0 only, so the instance does not have it: a drain that plans from one rank promises too much."""
    w = Story(rules, ranks=2)
    w.store("a/0", "xy")
    w.store("a/1", "x")
    w.settle()
    w.request(MoveRequest("drain", ("a", CPU), ("b", CPU)))
    w.settle()
    planned, ended = w.answers["drain"]
    return f"planned {planned.num_tokens}, moved {len(w.at('b/1'))}"


@hole(on="use ok, store refused", off="use failed, store ok")
def test_h27_local_readers_hold_references(rules: Rules) -> str:
    """An engine loads x from its slot while Release deletes x and a store takes the slot."""
    w = Story(rules, {"a": 1, "b": 1})
    w.store("a/0", "x")
    use = w.use("a/0", "x")
    w.move("a", "b", "x")
    w.mail()
    w.finish_copy("b/0", w.copying("b/0"))
    w.mail()
    stored = w.store("a/0", "z")
    w.settle()
    return f"use {w.answers[use][-1].state}, store {stored}"


@hole(on="failed, x at ab", off="failed, x at b")
def test_h28_a_lower_incarnation_is_refused(rules: Rules) -> str:
    """A paused old controller goes on beside its successor, which has already told everybody that M has failed."""
    w = Story(rules)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.until(Committed)
    committed = w.hold(Committed)
    old = w.controller()
    w.boot("ctl")
    w.mail()
    w.beat("a/0")
    w.mail()  # the successor asks a for its inventory, so a knows of it
    for effect in old.handle(w.now, Received(committed[0], committed[2])):
        if isinstance(effect, Send) and effect.dst == "a/0":
            w.deliver(("ctl", "a/0", effect.msg))
    return f"{w.status(event).state}, x at {w.whole_at('x')}"


@hole(on="found 1", off="found 0")
def test_h29_beat_carries_the_sequence_number(rules: Rules) -> str:
    """The last Delta is lost and nothing follows."""
    w = Story(rules)
    w.store("a/0", "x")
    w.hold(Delta)
    w.beat("a/0")
    w.mail()
    return f"found {len(w.lookup('x'))}"


@hole(on="", off="b/0: quarantine 1 waits for a/0")
def test_h30_a_dead_peers_quarantines_end(rules: Rules) -> str:
    """The pushing source dies for good: no Stopped will ever come."""
    w = Story(rules, push=True)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    w.mail()
    w.crash("a/0")
    w.elapse(60 * S)
    return w.leaks()


@hole(on="failed source_changed", off="copying")
def test_h31_a_failed_fence_is_refused(rules: Rules) -> str:
    """The pin is gone: reading the same slots again can never succeed. A new event pins anew."""
    w = Story(rules)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.mail()
    w.lease_ends("a/0", event)
    for _ in range(5):
        for at in list(w.copies):
            w.finish_copy(*at)
        w.mail()
    answer = w.status(event)
    return f"{answer.state} {answer.reason}".strip()


@hole(on="b is believed, x moved", off="b is not believed, x not moved")
def test_h32_a_new_epoch_is_believed_at_its_first_beat(rules: Rules) -> str:
    """The late Register of a process that has died meanwhile must not push out the one that lives."""
    w = Story(rules)
    w.store("a/0", "x")
    w.boot("b/0")
    late = w.hold(Register)
    w.boot("b/0")
    w.elapse(3 * S)
    event = w.move("a", "b", "x")
    w.until(Fence)
    w.deliver(late)
    w.elapse(700 * MS, lose=(Fenced, Alive, Beat))
    rank = w.controller().registry.by_address["b/0"]
    believed = "is" if rank.epoch == w.worker("b/0").epoch else "is not"
    w.settle()
    w.elapse(S)
    moved = "moved" if w.status(event).state == "done" else "not moved"
    return f"b {believed} believed, x {moved}"


@hole(on="x at b", off="x at ")
def test_h33_a_retention_bars_the_key(rules: Rules) -> str:
    """M a>b has committed x. N b>c pins it, so a copy P a>b replaces the entry; P ends; then b needs space."""
    w = Story(rules, {"a": 2, "b": 2, "c": 2})
    w.store("a/0", "x")
    w.move("a", "b", "x")
    w.until(Release)
    late = w.hold(Release)
    n = w.move("b", "c", "x")
    w.deliver(w.until(Pin))
    p = w.move("a", "b", "x", copy=True)
    w.mail(deaf=("c/0",))
    w.finish_copy("b/0", w.copying("b/0"))
    w.mail(deaf=("c/0",))
    assert w.status(p).state == "done"
    w.store("b/0", "z")
    w.store("b/0", "z")
    w.cancel(n)
    w.deliver(late)
    w.settle()
    return f"x at {w.whole_at('x')}"


@hole(on="x at b", off="x at ")
def test_h34_what_another_event_retains_is_kept(rules: Rules) -> str:
    """M a>b has committed, its Release is late. N b>c moves x on, c loses it; then M deletes at a."""
    w = Story(rules, {"a": 2, "b": 2, "c": 1})
    w.store("a/0", "x")
    w.move("a", "b", "x")
    w.until(Release)
    late = w.hold(Release)
    w.move("b", "c", "x")
    w.settle()
    w.store("c/0", "z")  # N is over: c may evict x
    w.deliver(late)
    w.settle()
    return f"x at {w.whole_at('x')}"


@hole(on="failed retention_lapsed, x whole at a", off="done, x whole at ")
def test_h35_decide_needs_a_fresh_committed(rules: Rules) -> str:
    """Rank 0 has committed and its retention has lapsed unrenewed; then rank 1 commits."""
    w = Story(rules, {"a": 2, "b": 1}, ranks=2)
    w.store("a/0", "x")
    w.store("a/1", "x")
    event = w.move("a", "b", "x")
    w.mail()
    w.finish_copy("b/0", w.copying("b/0"))
    w.mail()
    w.elapse(35 * S, lose=(Retain,))
    w.store("b/0", "z")
    w.settle()
    answer = w.status(event)
    return f"{answer.state} {answer.reason}".strip() + f", x whole at {w.whole_at('x')}"


@hole(on="done, x at a", off="done, x at ", also_off=("h39",))  # else the pin has lapsed long before
def test_h36_a_restarted_controller_asks_for_the_retentions(rules: Rules) -> str:
    """The controller is down for longer than a retention; doubles of its Pin, late, keep the source's pin alive."""
    w = Story(rules, {"a": 2, "b": 1})
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    pin = w.until(Pin)
    w.until(Release)
    w.hold(Release)
    w.crash("ctl")
    for _ in range(5):
        w.elapse(8 * S)
        w.deliver(pin)
    w.store("b/0", "z")
    w.boot("ctl")
    w.settle()
    return f"{w.status(event).state}, x at {w.whole_at('x')}"


@hole(on="done, x at a", off="done, x at ")
def test_h37_overdue_timers_run_first(rules: Rules) -> str:
    """The source is stopped, given up and resumed: a queued Release comes before the timer of its lapsed lease."""
    w = Story(rules, {"a": 2, "b": 1})
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.until(Release)
    release = w.hold(Release)
    w.elapse(60 * S, frozen=("a/0",))
    w.store("b/0", "z")  # the retention is over: b may evict x
    w.deliver(release)
    return f"{w.status(event).state}, x at {w.whole_at('x')}"


@hole(on="", off="b/0: reservation of event 4294967297 is copying from a/0")
def test_h38_a_lost_push_ends_by_a_timer(rules: Rules) -> str:
    """The Push is lost, and with its event's controller the End: nobody will ever answer this reservation."""
    w = Story(rules, push=True)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    w.mail(lose=(Push,))
    w.boot("ctl")
    w.elapse(90 * S)
    return w.leaks()


@hole(on="", off="b/0: reservation of event 4294967297 is fencing from a/0")
def test_h38_a_lost_fence_ends_by_a_timer(rules: Rules) -> str:
    """The bytes are there, the Fence is lost, and a restarted controller has forgotten whom to tell End."""
    w = Story(rules)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    w.mail()
    w.finish_copy("b/0", w.copying("b/0"))
    w.hold(Fence)
    w.boot("ctl")
    w.elapse(90 * S)
    return w.leaks()


@hole(on="done, x at a", off="done, x at ")
def test_h39_an_old_pin_does_not_prolong_a_pin(rules: Rules) -> str:
    """The source is given up; doubles of Pin go on arriving there, and last the Release, when b has long evicted x."""
    w = Story(rules, {"a": 1, "b": 1})
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.until(Fetch)
    pin = next(letter for letter in w.sent if isinstance(letter[2], Pin))
    w.until(Release)
    release = w.hold(Release)
    for _ in range(5):
        w.elapse(9 * S, lose=(Release,))
        w.deliver(pin)
    w.store("b/0", "z")
    w.deliver(release)
    return f"{w.status(event).state}, x at {w.whole_at('x')}"


@hole(on="x at b", off="x at ")
def test_h40_a_retention_outlives_an_epoch(rules: Rules) -> str:
    """b is silent for dead_ns and takes a new epoch; a Release from before is late, and finds its pin alive."""
    w = Story(rules, {"a": 1, "b": 1})
    w.store("a/0", "x")
    w.move("a", "b", "x")
    w.until(Release)
    release = w.hold(Release)
    w.elapse(5200 * MS, lose=(Release,), frozen=("b/0",))
    w.elapse(1200 * MS, lose=(Release,))
    w.store("b/0", "z")
    w.deliver(release)
    return f"x at {w.whole_at('x')}"
