"""The client plays steps in order, counts the worst of the ranks, and calls a silence info."""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.protocol.config import Config, S
from kvcore.protocol.machine import Boot, Command, Note, ProtocolError, Received, Send, TimerFired
from kvcore.protocol.messages import (
    Answer,
    CancelRequest,
    Found,
    LookupRequest,
    MoveRequest,
    StatusRequest,
    StoreRequest,
    event_id,
)
from kvcore.scenario.client import Client, ClientSpec, Op, request_name

KEY = (b"k" * 32,)
EVENT = event_id(1, 1)


def store(name: str, to: Tuple[str, ...] = ("a/0",), **more: Any) -> Op:
    return Op(name, "store", requests=(StoreRequest(name, "cpu", KEY, (256,)),), to=to, **more)


def move(name: str, idem: str = "", **more: Any) -> Op:
    request = MoveRequest(name, ("a", "cpu"), ("b", "cpu"), KEY, (256,), idem=idem)
    return Op(name, "move", requests=(request,), to=("ctl",), **more)


def plain(name: str, kind: str, **more: Any) -> Op:
    return Op(name, kind, **more)


class Play:
    """A client and the little that its driver does: says settled, fires what is due."""

    def __init__(self, *ops: Op, start: bool = True) -> None:
        self.client = Client(ClientSpec("client", ops=ops))
        self.now = 0
        self.notes: List[Tuple[str, str]] = []
        self.sent: List[Tuple[str, Any]] = []
        self.take(Boot())
        if start:
            self.take(Command("settled"))

    def take(self, item: Any) -> None:
        for effect in self.client.handle(self.now, item):
            if isinstance(effect, Send):
                self.sent.append((effect.dst, effect.msg))
            else:
                assert isinstance(effect, Note)
                self.notes.append((effect.kind, effect.detail))

    def answer(self, op: str, state: str, src: str = "ctl", **more: Any) -> None:
        self.take(Received(src, Answer(op, state, **more)))

    def until(self, now: int) -> None:
        while True:
            due = self.client.timers.next()
            if due is None or due[0] > now:
                break
            self.now = due[0]
            self.take(TimerFired(due[1]))
        self.now = now

    def op(self, name: str) -> Any:
        return self.client.by_name[name]

    def kinds(self) -> List[str]:
        return [kind for kind, _ in self.notes]


def test_it_starts_when_told_that_all_is_quiet() -> None:
    play = Play(store("s"), start=False)
    assert play.notes == [("settle", "boot")]
    assert play.client.pending() == []
    assert play.sent == []
    play.take(Command("settled"))
    assert play.notes[1:] == [("start", ""), ("invoke", "s")]
    assert [dst for dst, _ in play.sent] == ["a/0"]


def test_it_starts_at_last_without_being_told() -> None:
    play = Play(store("s"), start=False)
    config = Config()
    play.until(config.deadline_ns + 2 * config.lease_ns)
    assert "start" in play.kinds()


def test_steps_come_one_after_another_and_finish_once() -> None:
    play = Play(store("s"), move("m"))
    play.answer("s", "ok", "a/0", num_tokens=256)
    assert isinstance(play.sent[-1][1], MoveRequest)
    play.answer("m", "copying", num_tokens=256, event=EVENT)
    assert play.op("m").state == "copying" and play.op("m").event_id == "1-1"
    assert play.client.pending() == ["move m is open"]
    play.answer("m", "done", num_tokens=256, event=EVENT)
    play.answer("m", "done", num_tokens=256, event=EVENT)
    assert play.notes[-2:] == [("ok", "m"), ("finished", "")]
    assert play.kinds().count("finished") == 1
    assert play.client.pending() == []


def test_the_minimum_over_ranks_counts_and_the_worst_state() -> None:
    play = Play(store("s", to=("a/0", "a/1")))
    play.answer("s", "ok", "a/0", num_tokens=512)
    play.answer("s", "ok", "a/0", num_tokens=512)
    assert play.op("s").state == "open"
    play.answer("s", "refused", "a/1", num_tokens=256, reason="full")
    assert (play.op("s").state, play.op("s").num_tokens, play.op("s").reason) == ("refused", 256, "full")
    assert ("fail", "s") in play.notes


def test_a_silence_is_info_and_the_next_step_comes() -> None:
    play = Play(store("s", timeout_ns=5 * S), store("t"))
    play.until(5 * S)
    assert play.op("s").state == "info"
    assert ("info", "s") in play.notes and ("invoke", "t") in play.notes
    play.answer("s", "ok", "a/0")
    assert play.op("s").state == "info", "a late answer changes nothing"


def test_the_final_answer_may_overtake_the_first() -> None:
    play = Play(move("m"))
    play.answer("m", "done", num_tokens=256, event=EVENT)
    play.answer("m", "copying", num_tokens=256, event=EVENT)
    assert play.op("m").state == "done"


def test_background_steps_do_not_block_and_wait_does() -> None:
    play = Play(move("m", background=True), store("s", background=True), plain("w", "wait", refers=("m",)), store("t"))
    assert len(play.sent) == 2
    play.answer("s", "ok", "a/0")
    assert len(play.sent) == 2
    play.answer("m", "failed", reason="full", event=EVENT)
    assert len(play.sent) == 3
    assert ("ok", "w") in play.notes and ("fail", "m") in play.notes


def test_wait_without_names_waits_for_all_before_it() -> None:
    play = Play(store("s", background=True), store("t", background=True), plain("w", "wait"), store("u"))
    play.answer("t", "ok", "a/0")
    assert play.op("w").state == "open"
    play.answer("s", "ok", "a/0")
    assert play.op("w").state == "ok" and len(play.sent) == 3


def test_a_window_bounds_what_is_open() -> None:
    play = Play(*[store(f"s{i}", background=True, window=2) for i in range(5)])
    assert len(play.sent) == 2
    play.answer("s1", "ok", "a/0")
    assert len(play.sent) == 3


def test_after_counts_from_the_end_of_the_step_before() -> None:
    play = Play(store("s"), store("t", after_ns=2 * S))
    play.until(1 * S)
    play.answer("s", "ok", "a/0")
    play.until(3 * S - 1)
    assert len(play.sent) == 1
    play.until(3 * S)
    assert len(play.sent) == 2 and play.op("t").start_ns == 3 * S


def test_sleep_and_settle() -> None:
    play = Play(plain("z", "sleep", sleep_ns=S), plain("q", "settle"), store("s"))
    play.until(S)
    assert play.notes[-1] == ("settle", "q")
    assert play.client.pending() == [], "a settle does not wait for itself"
    play.take(Command("settled"))
    assert play.notes[-1] == ("invoke", "s")


def test_a_fill_plays_its_parts_and_sums() -> None:
    requests = tuple(StoreRequest(request_name("f", i, 3), "cpu", KEY, (256,)) for i in range(3))
    play = Play(Op("f", "fill", requests=requests, to=("a/0",)))
    play.answer("f#0", "ok", "a/0", num_tokens=256)
    play.answer("f#0", "ok", "a/0", num_tokens=256)
    play.answer("f#1", "ok", "a/0", num_tokens=256)
    assert play.op("f").state == "ok" and play.op("f").end_ns == -1
    play.answer("f#2", "refused", "a/0", reason="full")
    assert (play.op("f").state, play.op("f").num_tokens) == ("refused", 512)


def cancel(name: str, of: str) -> Op:
    return Op(name, "cancel", requests=(CancelRequest(name, 0),), to=("ctl",), refers=(of,))


def test_a_cancel_waits_until_the_event_is_known() -> None:
    play = Play(move("m", background=True), cancel("c", "m"))
    assert len(play.sent) == 1
    play.answer("m", "copying", num_tokens=256, event=EVENT)
    assert play.sent[-1] == ("ctl", CancelRequest("c", EVENT))
    play.answer("c", "refused", reason="too late")
    assert play.op("c").reason == "too late"


def test_a_cancel_of_a_step_without_event_is_refused() -> None:
    play = Play(move("m", background=True), cancel("c", "m"))
    play.answer("m", "refused", reason="no such instance")
    assert (play.op("c").state, play.op("c").reason) == ("refused", "m has no event")


def test_a_status_asks_by_idempotency_key_when_the_event_is_unknown() -> None:
    status = Op("st", "status", requests=(StatusRequest("st", idem="i"),), to=("ctl",), refers=("m",))
    play = Play(move("m", idem="i", timeout_ns=S), status)
    play.until(S)
    assert play.sent[-1][1] == StatusRequest("st", idem="i")
    play.answer("st", "copying", num_tokens=3)
    assert play.op("st").state == "copying" and ("ok", "st") in play.notes


def test_a_faults_cancel_comes_as_a_command() -> None:
    play = Play(move("m"))
    play.take(Command("cancel", ("m",)))
    assert len(play.sent) == 1
    play.answer("m", "copying", event=EVENT)
    assert play.sent[-1][1] == CancelRequest("m!cancel", EVENT)
    play.answer("m!cancel", "ok")
    play.answer("m", "failed", event=EVENT, reason="cancelled")
    assert play.op("m").reason == "cancelled"


@pytest.mark.parametrize("back", [-1, S])
def test_a_client_that_dies_knows_nothing_any_more(back: int) -> None:
    play = Play(move("m", background=True), store("s"), store("t"))
    play.take(Command("die", (str(back),)))
    assert [play.op(name).state for name in ("m", "s")] == ["info", "info"]
    play.answer("m", "done", event=EVENT)
    assert play.op("m").state == "info"
    play.until(2 * S)
    assert ("t" in play.client.by_name) == (back > 0)
    assert ("finished" in play.kinds()) == (back < 0)


def test_lookup_keeps_what_was_found() -> None:
    play = Play(Op("l", "lookup", requests=(LookupRequest("l", KEY, (256,)),), to=("ctl",)))
    play.answer("l", "ok", num_tokens=256, found=(Found("a", "cpu", 256),))
    assert play.op("l").found == (Found("a", "cpu", 256),)


def test_what_is_not_for_a_client_raises() -> None:
    play = Play()
    with pytest.raises(ProtocolError):
        play.take(Received("ctl", CancelRequest("x", 1)))
    with pytest.raises(ProtocolError):
        play.take(Command("dance"))


def test_the_spec_survives_the_wire() -> None:
    spec = ClientSpec("client", ops=(store("s"), move("m", background=True), cancel("c", "m")))
    for module in (msgspec.json, msgspec.msgpack):
        assert module.decode(module.encode(spec), type=ClientSpec) == spec


ANSWERS = st.tuples(
    st.sampled_from(["s", "m", "n", "c", "w", "zzz", "m!cancel"]),
    st.sampled_from(["ok", "done", "failed", "refused", "copying", "pinning"]),
    st.sampled_from(["a/0", "a/1", "ctl"]),
    st.sampled_from([0, EVENT]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(ANSWERS, st.sampled_from([1 * S, 50 * S]), st.just("die")), max_size=30))
def test_any_answers_in_any_order_leave_every_step_ended(items: List[Any]) -> None:
    play = Play(
        store("s", to=("a/0", "a/1")),
        move("m", background=True),
        cancel("c", "m"),
        move("n", background=True, after_ns=S),
        plain("w", "wait"),
        store("last"),
    )
    for item in items:
        if isinstance(item, int):
            play.until(play.now + item)
        elif item == "die":
            play.take(Command("die", (str(S),)))
        else:
            op, state, src, event = item
            play.answer(op, state, src, event=event)
    play.until(play.now + 2000 * S)
    assert play.kinds().count("finished") == 1
    assert play.client.pending() == []
    assert play.client.timers.next() is None
    ended: Optional[int] = min(operation.end_ns for operation in play.client.operations)
    assert ended is not None and ended >= 0
    assert play.kinds().count("invoke") == sum(play.kinds().count(kind) for kind in ("ok", "fail", "info")) == 6
