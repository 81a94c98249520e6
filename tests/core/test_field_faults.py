"""Field faults that are seen best at one machine: F10, F16, F24, F31, F45. The others are scenarios/field."""

from __future__ import annotations

from typing import List

import pytest

from kvcore.protocol.config import ALL_RULES, Config, ControllerSpec, Rules, WorkerSpec
from kvcore.protocol.machine import FillDone, ReadDone, Received, Send
from kvcore.protocol.messages import (
    NO_ID,
    Beat,
    Committed,
    Delta,
    End,
    Entry,
    Expelled,
    Fence,
    Fenced,
    Fetch,
    Held,
    Location,
    Namespace,
    Pin,
    Pinned,
    PinRequest,
    Refused,
    Release,
    Released,
    Renew,
    Reserved,
    Retain,
    Stop,
    Stopped,
    Unhold,
    UnpinRequest,
    Wire,
)
from kvcore.protocol.worker import Worker
from kvcore.scenario.check_world import Watch, attach
from kvcore.scenario.world import Letter, World
from tests.core.drive import CPU, Story, keys, lens

E = 77  # an event that nobody has begun


def answers(w: World, node: str, src: str, message: Wire) -> List[Wire]:
    """What a node sends when it hears this."""
    return [effect.msg for effect in w.give(node, Received(src, message)) if isinstance(effect, Send)]


def clean(watch: Watch, w: Story) -> None:
    w.settle()
    for node in [name for name in w.machines if name != "ctl"]:
        w.beat(node)
    w.settle()
    assert [str(violation) for violation in watch.quiet(w)] == []


# ---- F16: what names an unknown event, pin or reservation is answered, never ignored
@pytest.mark.parametrize(
    ("message", "answer"),
    [
        (Release(1, E, (9, 9), 2, True), Released(E, (9, 9), 0, 0, "pin_gone")),
        (Release(1, E, NO_ID, 2, False), Released(E, NO_ID, 0, 0, "pin_gone")),
        (Renew(1, E, (9, 9)), Pinned(E, NO_ID)),
        (Fence((9, 9), (9, 9)), Fenced((9, 9), False)),
        (Stop((9, 9)), Stopped((9, 9))),
        (Unhold(1, E), Held(E, 0)),
    ],
    ids=lambda one: type(one).__name__,
)
def test_f16_a_worker_answers_what_it_does_not_know(message: Wire, answer: Wire) -> None:
    w = Story(Rules())
    w.store("a/0", "xy")
    w.mail()
    assert answers(w, "a/0", "ctl", message) == [answer]
    assert w.at("a/0") == "xy", "and deletes nothing for it"


def test_f16_a_destination_that_retains_nothing_says_so() -> None:
    w = Story(Rules())
    inc = w.worker("b/0").pools[CPU].inc
    assert answers(w, "b/0", "ctl", Retain(1, E, CPU, 5)) == [Committed(E, inc, 0, 5, 1)]


@pytest.mark.parametrize("kind", ["Pinned", "Reserved", "Committed"])
def test_f16_a_controller_ends_what_it_does_not_know(kind: str) -> None:
    """So that a worker's pin or reservation of a forgotten event does not wait for its lease."""
    w = Story(Rules())
    inc = w.worker("b/0").pools[CPU].inc
    message: Wire = {"Pinned": Pinned(E, inc, (9, 9), (0,)), "Reserved": Reserved(E, inc, 1)}.get(
        kind, Committed(E, inc, 1)
    )
    told = answers(w, "ctl", "b/0", message)
    assert [type(one) for one in told] == [Release if kind == "Pinned" else End]
    assert not getattr(told[0], "delete", False)


def test_f16_a_heartbeat_under_a_wrong_epoch_is_answered() -> None:
    w = Story(Rules())
    assert answers(w, "ctl", "a/0", Beat(999, ())) == [Expelled(1, 999)]


def test_f16_a_status_of_an_unknown_event_is_not_running() -> None:
    w = Story(Rules())
    answer = w.status(E)
    assert answer.state == "refused" and "unknown" in answer.reason


def test_f16_every_rank_is_released() -> None:
    """Four ranks read, four are released; nothing stays pinned at any of them."""
    w = Story(Rules(), ranks=4)
    watch = attach(w)
    for rank in range(4):
        w.store(f"a/{rank}", "xy")
    w.mail()
    w.move("a", "b", "xy")
    w.settle()
    released = [one for one in w.sent if isinstance(one[2], Released)]
    assert sorted(src for src, _, _ in released) == [f"a/{rank}" for rank in range(4)]
    assert all(not w.worker(f"a/{rank}").source.pins for rank in range(4))
    clean(watch, w)


# ---- F10: a reference to memory is good for one read of one life
def test_f10_a_reference_is_good_once() -> None:
    """The same Fetch again once its pin is gone and its slots hold z: nothing of z becomes visible as x."""
    w = Story(Rules(), {"a": 1, "b": 1})
    watch = attach(w)
    w.store("a/0", "x")
    w.mail()
    w.move("a", "b", "x")
    w.settle()
    fetch = w.ever(Fetch)
    w.store("a/0", "z")
    w.store("b/0", "w")
    w.mail()
    assert w.at("a/0") + w.at("b/0") == "zw"
    w.deliver(fetch)
    w.lose(w.take(Reserved))  # or the controller would end it at once
    w.settle()
    assert w.at("b/0") == ""
    assert [one[2].why for one in w.sent if isinstance(one[2], Refused)] == ["source_changed"]
    clean(watch, w)


def test_f10_a_reference_of_an_earlier_life_is_refused() -> None:
    w = Story(Rules())
    w.store("a/0", "x")
    w.mail()
    w.move("a", "b", "x")
    w.settle()
    fetch = w.ever(Fetch)
    w.boot("b/0")
    w.settle()
    assert [type(one) for one in answers(w, "b/0", "ctl", fetch[2])] == [Refused]
    assert not w.copies


# ---- F24: a new epoch voids all that was known of the old one
def restarted() -> Story:
    w = Story(Rules())
    w.store("b/0", "xy")
    w.mail()
    assert [found.num_tokens for found in w.lookup("xy")] == [2]
    w.boot("b/0")
    w.settle()
    return w


def test_f24_the_index_forgets_what_a_dead_process_had() -> None:
    w = restarted()
    assert w.lookup("xy") == ()
    event = w.move("b", "a", "xy")
    w.settle()
    answer = w.status(event)
    assert (answer.state, answer.reason, answer.num_tokens) == ("failed", "nothing_held", 0)


def test_f24_news_of_the_old_process_come_too_late() -> None:
    """Its inventory numbers and those of its successor both begin at 1: the incarnation tells them apart."""
    w = Story(Rules())
    watch = attach(w)
    w.store("b/0", "x")
    late: Letter = w.hold(Delta)
    w.boot("b/0")
    w.settle()
    w.store("b/0", "z")
    w.mail()
    w.deliver(late)
    w.mail()
    assert w.lookup("x") == () and [found.num_tokens for found in w.lookup("z")] == [1]
    clean(watch, w)


def test_f24_the_same_numbers_again_are_no_double() -> None:
    w = Story(Rules())
    old = w.worker("b/0").pools[CPU].inc
    w.boot("b/0")
    w.settle()
    assert w.worker("b/0").pools[CPU].inc > old
    w.deliver(("b/0", "ctl", Delta(CPU, old, 1, (Entry(b"q", b"", 1, 0),))))
    w.mail()
    assert w.lookup("q") == (), "it is the first of an epoch that is over"


# ---- F31: counts never go below 0, and one owner's release leaves the other's pin
def pin(w: Story, op: str) -> int:
    w.request(PinRequest(op, ("a", CPU), keys("xy"), lens("xy")))
    w.mail()
    return w.answers[op][-1].event


def test_f31_a_user_pin_released_twice_leaves_the_others() -> None:
    w = Story(Rules(), {"a": 2, "b": 2})
    watch = attach(w)
    w.store("a/0", "xy")
    w.mail()
    mine, yours = pin(w, "mine"), pin(w, "yours")
    w.request(UnpinRequest("once", mine))
    w.mail()
    assert w.ask(UnpinRequest("twice", mine), "twice").reason == "unknown_event"
    pool = w.worker("a/0").pools[CPU]
    for _ in range(3):
        w.give("a/0", Received("ctl", Unhold(1, mine)))  # and even if the worker hears it again
    assert sorted(pool.user.values()) == [1, 1]
    assert w.store("a/0", "z") == "refused" and w.at("a/0") == "xy"
    w.request(UnpinRequest("last", yours))
    w.mail()
    assert pool.user == {} and sorted(pool.refs.values()) == [1, 1]
    assert w.store("a/0", "z") == "ok"
    clean(watch, w)


def test_f31_two_readers_of_one_prompt_hold_it_twice() -> None:
    """One that ends twice (its end was told twice) gives back what it took, once."""
    w = Story(Rules(), {"a": 2, "b": 2})
    watch = attach(w)
    w.store("a/0", "xy")
    w.mail()
    w.use("a/0", "xy")
    w.use("a/0", "xy")
    first, second = sorted(fid for _, fid in w.reads)
    pool = w.worker("a/0").pools[CPU]
    assert sorted(pool.refs.values()) == [3, 3]
    w.finish_read("a/0", first)
    w.give("a/0", ReadDone(first, True))
    w.give("a/0", FillDone(first, True))
    assert sorted(pool.refs.values()) == [2, 2]
    assert w.store("a/0", "z") == "refused"
    w.finish_read("a/0", second)
    assert w.store("a/0", "z") == "ok"
    clean(watch, w)


def test_f31_a_lookup_promises_nothing() -> None:
    """What was evicted between lookup and pin is missing from the pin, and the answer says how much is left."""
    w = Story(Rules(), {"a": 3, "b": 3})
    watch = attach(w)
    w.store("a/0", "xyz")
    w.mail()
    assert [found.num_tokens for found in w.lookup("xyz")] == [3]
    w.request(PinRequest("p", ("a", CPU), keys("x"), lens("x")))
    w.mail()
    event = w.move("a", "b", "xyz", op="m")
    late = w.hold(Pin)
    w.store("a/0", "v")
    w.store("a/0", "w")
    w.mail()
    w.deliver(late)
    w.settle()
    copying, done = w.answers["m"]
    assert (copying.state, copying.num_tokens) == ("copying", 1)
    assert (done.state, done.num_tokens) == ("done", 1)
    assert w.status(event).num_tokens == 1 and w.at("b/0") == "x"
    w.request(UnpinRequest("u", w.answers["p"][-1].event))
    clean(watch, w)


# ---- F45: two processes with one id
def twins() -> World:
    """a/0 and twin/0 both claim to be rank 0 of a, and register before either has been heard to beat."""
    config = Config(rules=ALL_RULES)
    space = Namespace(ranks=1, chunk_tokens=1, bytes_per_token=1)
    places = (Location(CPU, 2),)
    return World(
        [
            ControllerSpec("ctl", config),
            WorkerSpec("a/0", "a", 0, "ctl", space, places, config),
            WorkerSpec("twin/0", "a", 0, "ctl", space, places, config),
        ]
    )


def test_f45_of_two_that_register_at_once_the_first_stays_and_the_second_is_refused() -> None:
    w = twins()
    believed = [note.detail for name, note in w.notes if name == "ctl" and note.kind == "believed"]
    assert believed == ["a/0"], "a living process was displaced without being asked"
    twin = w.machines["twin/0"]
    assert isinstance(twin, Worker) and not twin.epoch
    assert "duplicate_id" in twin.refused and "twin/0" in twin.refused and "a/0" in twin.refused


def test_f45_the_second_has_the_place_once_the_first_is_dead() -> None:
    w = twins()
    w.crash("a/0")
    w.boot("twin/0")
    for _ in range(8):
        w.settle()
        w.pause(w.specs["ctl"].config.retry_ns)
        for name in ("ctl", "twin/0"):
            timer = w.machines[name].timers.next()
            if timer is not None and timer[0] <= w.now:
                w.fire(name, timer[1])
    w.settle()
    assert w.worker("twin/0").epoch
    assert [note.detail for name, note in w.notes if name == "ctl" and note.kind == "believed"] == ["a/0", "twin/0"]
