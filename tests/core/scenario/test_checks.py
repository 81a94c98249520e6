"""Every property with its bug planted, and that property alone is broken."""

from __future__ import annotations

import pickle
from typing import List, Tuple

import msgspec

from kvcore.protocol.config import Rules, S
from kvcore.protocol.machine import Command
from kvcore.protocol.messages import (
    Cleared,
    Committed,
    Delta,
    End,
    Fetch,
    MoveRequest,
    Pin,
    Pinned,
    Release,
    Released,
    StatusRequest,
)
from kvcore.scenario.check_world import Watch, attach
from tests.core.drive import CPU, Story, keys, lens

LONG = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&()*+,-./:;<=>?@[]^_{|}~"


def broken(watch: Watch) -> List[str]:
    """The properties that are violated, each once."""
    return sorted({violation.property for violation in watch.checker.violations})


def look(w: Story, watch: Watch, node: str) -> None:
    """As after an input that changed nothing."""
    watch.checker.step(w.now, node, w.machines[node], Command("look"), [])


# ---- at every step
def test_byte_wrong_bytes_in_a_visible_chunk() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    w.memory[("a/0", CPU)][0] = b"z"
    watch.checker.touched(w.now, "a/0", w.machines["a/0"])
    watch.checker.touched(w.now, "a/0", w.machines["a/0"])
    (violation,) = watch.checker.violations
    assert (violation.property, violation.node) == ("Byte", "a/0")
    assert violation.text == "x in slot 0 of cpu holds z"


def test_byte_a_late_landing_is_seen_at_its_slots_only() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "xy")
    w.memory[("a/0", CPU)][1] = b"?"
    watch.checker.touched(w.now, "a/0", w.machines["a/0"], CPU, [0])
    assert not watch.checker.violations
    watch.checker.touched(w.now, "a/0", w.machines["a/0"], CPU, [0, 1])
    assert broken(watch) == ["Byte"]


def test_byte_an_engine_that_read_something_else() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    w.use("a/0", "x")
    w.memory[("a/0", CPU)][0] = b"z"
    w.finish_read(*next(iter(w.reads)))
    assert broken(watch) == ["Byte"]


def test_loss_an_entry_that_vanishes_for_no_reason() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    w.worker("a/0").pools[CPU].drop(b"x")
    look(w, watch, "a/0")
    assert broken(watch) == ["Loss"]


def test_loss_a_copy_that_deletes() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    w.move("a", "b", "x", copy=True)
    src, dst, release = w.until(Release)
    assert isinstance(release, Release)
    w.deliver((src, dst, msgspec.structs.replace(release, delete=True)))
    assert broken(watch) == ["Loss"]


def test_loss_more_is_deleted_than_was_committed() -> None:
    w = Story(Rules(), {"a": 4, "b": 1})
    watch = attach(w)
    w.store("a/0", "xy")
    w.move("a", "b", "xy")
    src, dst, release = w.until(Release)
    assert isinstance(release, Release) and release.n == 1
    w.deliver((src, dst, msgspec.structs.replace(release, n=2)))
    assert broken(watch) == ["Loss"]
    assert "has committed 1 of 2" in watch.checker.violations[0].text


def test_loss_after_a_crash_of_the_destination_is_excused() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    release = w.until(Release)
    w.boot("b/0")
    w.deliver(release)
    assert w.whole_at("x") == ""
    assert not watch.checker.violations


def test_loss_after_a_clear_is_excused() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    release = w.until(Release)
    w.lose(release)
    w.clear("b")
    w.deliver(w.until(Cleared))
    w.deliver(release)
    assert w.whole_at("x") == ""
    assert not watch.checker.violations


def test_known_a_decision_for_another_incarnation() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    committed = w.until(Committed)
    w.controller().registry.by_address["b/0"].views[CPU].inc = (1 << 40, 0)
    w.deliver(committed)
    assert broken(watch) == ["Known"]
    texts = [violation.text for violation in watch.checker.violations]
    assert len(texts) == 2 and "is decided for b/0" in texts[0] and "has committed 1" in texts[1]


def test_known_a_commit_that_never_was() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    _, _, fetch = w.until(Fetch)
    assert isinstance(fetch, Fetch)
    w.hold(Fetch)
    w.deliver(("b/0", "ctl", Committed(event, fetch.inc, 1, fetch.stamp + 1, fetch.incarnation)))
    assert broken(watch) == ["Known"]
    w.deliver(w.until(Release))
    assert broken(watch) == ["Known", "Loss"]


def test_shared_a_chunk_dropped_under_its_child() -> None:
    w = Story(Rules(h16=False))
    watch = attach(w)
    w.store("a/0", "ab")
    w.store("a/0", "ac")
    w.move("a", "b", "ab")
    w.settle()
    assert broken(watch) == ["Shared"]


def test_clear_a_commit_of_an_event_that_was_over() -> None:
    w = Story(Rules(h20=False))
    watch = attach(w)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.until(Fetch)
    fetch = w.hold(Fetch)
    w.cancel(event)
    w.hold(Release)
    w.clear("b")
    w.mail()
    w.deliver(fetch)
    w.finish_copy(*next(iter(w.copies)))
    w.mail(lose=(End,))
    assert broken(watch) == ["Clear"]


def test_free_a_reference_too_many() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    w.worker("a/0").pools[CPU].ref(0)
    look(w, watch, "a/0")
    assert broken(watch) == ["Free"]


def test_free_two_keys_in_one_slot() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "xy")
    pool = w.worker("a/0").pools[CPU]
    pool.unref(pool.index[b"y"].slot)
    pool.index[b"y"].slot = pool.index[b"x"].slot
    pool.ref(pool.index[b"x"].slot)
    watch.checker.step(w.now, "a/0", w.worker("a/0"), Command("look"), [])
    assert [violation.text for violation in watch.checker.violations] == [
        "cpu: slot 0 holds both y and x",
        "y in slot 0 of cpu holds x",
    ]


def test_free_a_slot_free_and_in_use() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    w.worker("a/0").pools[CPU].free.append(0)
    look(w, watch, "a/0")
    assert [violation.text for violation in watch.checker.violations] == ["cpu: slots [0] are free and in use"]


def test_free_a_slot_reused_under_a_running_copy() -> None:
    w = Story(Rules(h12=False), {"a": 2, "b": 1})
    watch = attach(w)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.mail()
    w.cancel(event)
    w.mail()
    assert not watch.checker.violations
    w.store("b/0", "z")
    assert broken(watch) == ["Free"]


def test_truth_done_with_other_tokens_than_replied() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.until(Committed)
    w.controller().moves.events[event].num_tokens = 7
    w.settle()
    assert broken(watch) == ["Truth"]
    assert any("done with 7 tokens, replied 1" in violation.text for violation in watch.checker.violations)


def test_truth_failed_and_deleted() -> None:
    w = Story(Rules(h08=False))
    watch = attach(w)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    w.deliver(w.until(Release))
    w.fresh.clear()
    w.boot("ctl")
    w.settle()
    assert broken(watch) == ["Truth"]


def in_steps() -> Tuple[Story, Watch]:
    """A move in three steps, their copies under way."""
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "xyz")
    w.mail()
    w.request(MoveRequest("s", ("a", CPU), ("b", CPU), keys("xyz"), lens("xyz"), step=1))
    w.mail()
    return w, watch


def test_shared_a_step_that_is_visible_before_the_one_before_it() -> None:
    w, watch = in_steps()
    (reservation,) = w.worker("b/0").destination.reservations.values()
    first, second, third = reservation.parts
    reservation.parts[:] = [second, third]
    reservation.own[0], reservation.held[0] = -1, -2
    w.finish_copy("b/0", second.rid)
    w.mail()
    assert "Shared" in broken(watch)
    assert any(one.text == "y is in cpu, what it follows is not" for one in watch.checker.violations)


def test_truth_a_step_that_is_said_to_be_visible_and_is_not() -> None:
    w, watch = in_steps()
    (reservation,) = w.worker("b/0").destination.reservations.values()
    w.finish_copy("b/0", reservation.parts[0].rid)
    reservation.keys = keys("qyz")  # it is put into the index under another name
    w.mail()
    assert "Truth" in broken(watch)
    assert any("shows 1 chunks, the first 0 are visible" in one.text for one in watch.checker.violations)


def test_truth_an_end_that_is_answered_otherwise_later() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.settle()
    moves = w.controller().moves
    moves.ended[event] = msgspec.structs.replace(moves.ended[event], state="failed")
    w.request(StatusRequest("later", event))
    assert broken(watch) == ["Truth"]


def test_truth_a_commit_of_what_is_not_there() -> None:
    w = Story(Rules(h07=False), {"a": 4, "b": 2})
    watch = attach(w)
    w.store("a/0", "xy")
    w.store("b/0", "x")
    w.move("a", "b", "xy")
    w.mail()
    w.store("b/0", "z")
    while not watch.checker.violations:
        assert w.step()
    first, second = watch.checker.violations
    assert first.property == "Truth" and second.property == "Shared"
    assert second.text == "y is in cpu, what it follows is not"


def test_truth_a_count_of_what_was_deleted() -> None:
    w = Story(Rules(h25=False))
    watch = attach(w)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    w.until(Released)
    w.hold(Released)
    w.fire("ctl", ("retry", event, 0))
    w.settle()
    assert broken(watch) == ["Truth"]


def test_retention_a_retained_key_is_evicted() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    w.until(Release)
    w.hold(Release)
    worker = w.worker("b/0")
    pool = worker.pools[CPU]
    held = pool.retained.pop(b"x")
    pool.evict()
    pool.retained[b"x"] = held
    watch.checker.step(w.now, "b/0", worker, Command("evict", (CPU,)), [])
    assert broken(watch) == ["Retention"]


def test_instance_whole_nowhere() -> None:
    """Without faults, whatever else is said of it: a move's deletion leaves no instance that has the key."""
    w = Story(Rules(h06=False, h02=False, h34=False))
    watch = attach(w, faults=False)
    w.store("a/0", "x")
    w.move("a", "a", "x")
    w.settle()
    assert broken(watch) == ["Instance", "Loss"]


# ---- once quiet
def test_ends_an_event_that_never_ends() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    w.settle()
    event = w.move("a", "b", "x")
    w.controller().moves.events.clear()
    w.controller().timers.cancel(("retry", event, 0))
    w.hold(Pin)
    watch.quiet(w)
    assert broken(watch) == ["Ends"]


def test_leak_a_pin_without_a_lease() -> None:
    w = Story(Rules(h22=False))
    watch = attach(w)
    w.store("a/0", "x")
    event = w.move("a", "b", "x")
    pin = w.hold(Pin)
    w.cancel(event)
    w.mail()
    w.deliver(pin)
    w.mail(lose=(Pinned,))
    w.elapse(60 * S)
    assert not watch.checker.violations
    watch.quiet(w)
    assert broken(watch) == ["Leak"]


def test_leak_a_slot_that_nothing_holds() -> None:
    w = Story(Rules())
    watch = attach(w)
    pool = w.worker("a/0").pools[CPU]
    pool.take(False)
    watch.quiet(w)
    assert broken(watch) == ["Free", "Leak"]


def test_view_a_lost_delta() -> None:
    w = Story(Rules(h29=False))
    watch = attach(w)
    w.store("a/0", "x")
    w.mail(lose=(Delta,))
    w.beat("a/0")
    w.settle()
    watch.quiet(w)
    assert broken(watch) == ["View"]


def test_view_is_whole_again_after_a_beat() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    w.mail(lose=(Delta,))
    w.beat("a/0")
    w.settle()
    assert not watch.quiet(w)


# ---- drivers
def test_a_large_pool_is_followed_by_its_deltas() -> None:
    w = Story(Rules(), {"a": 200, "b": 200})
    watch = attach(w)
    w.store("a/0", LONG)
    w.settle()
    assert len(watch.checker.shadows["a/0"].pools[CPU].slots) == len(LONG) > 64
    w.move("a", "b", LONG)
    w.settle()
    assert not watch.checker.shadows["a/0"].pools[CPU].slots
    assert len(watch.checker.shadows["b/0"].pools[CPU].slots) == len(LONG)
    assert not watch.quiet(w)
    w.worker("b/0").pools[CPU].ref(0)
    for _ in range(len(LONG)):
        look(w, watch, "b/0")
    assert broken(watch) == ["Free"]


def test_a_large_pool_that_loses_an_entry_in_silence() -> None:
    w = Story(Rules(), {"a": 200, "b": 200})
    watch = attach(w)
    w.store("a/0", LONG)
    pool = w.worker("a/0").pools[CPU]
    pool.drop(LONG[-1].encode())
    pool.drops.clear()
    look(w, watch, "a/0")
    assert broken(watch) == ["Loss"]


def test_a_fork_goes_its_own_way() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    w.move("a", "b", "x")
    w.until(Committed)
    other = w.fork()
    assert isinstance(other.observe, Watch)
    assert other.observe.checker.state() == watch.checker.state()
    w.settle()
    assert not watch.quiet(w)
    other.memory[("b/0", CPU)][0] = b"z"
    other.settle()
    assert broken(other.observe) == ["Byte"]
    assert not watch.checker.violations


def test_the_state_is_plain_and_tells_histories_apart() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    before = msgspec.msgpack.encode(watch.checker.state())
    w.move("a", "b", "x")
    begun = msgspec.msgpack.encode(watch.checker.state())
    w.settle()
    assert len({before, begun, msgspec.msgpack.encode(watch.checker.state())}) == 3


def test_what_is_over_is_forgotten() -> None:
    w = Story(Rules())
    watch = attach(w)
    w.store("a/0", "x")
    for src, dst in [("a", "b"), ("b", "a")] * 4:
        w.move(src, dst, "x")
        w.settle()
    ghosts = watch.checker.ghosts
    assert not ghosts.open and len(ghosts.over) == 8
    assert not any(ghosts.standing.values())
    assert len(pickle.dumps(watch.checker)) < 4000


def test_leak_a_timer_that_nothing_waits_for() -> None:
    for node, name in (("a/0", ("lease", 1, 0)), ("ctl", ("retry", 1, 0))):
        w = Story(Rules())
        watch = attach(w)
        w.machines[node].timers.set(name, w.now + S)
        watch.quiet(w)
        assert broken(watch) == ["Leak"] and f"timer {name[0]} of" in watch.checker.violations[0].text
