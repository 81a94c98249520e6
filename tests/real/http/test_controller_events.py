"""Without processes: which HTTP status an answer becomes, and what the event log makes of a machine's steps."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Dict, List, Optional, Tuple

import msgspec
import pytest

from kvcore.protocol import machine as m
from kvcore.protocol.config import Config, ControllerSpec, S
from kvcore.protocol.controller import Controller
from kvcore.protocol.messages import (
    Answer,
    Beat,
    CancelRequest,
    Committed,
    Delta,
    Entry,
    Location,
    LocationSeq,
    MoveRequest,
    Namespace,
    Pinned,
    PinRequest,
    Refused,
    Register,
    Registered,
    Released,
    Reserved,
    event_id,
)
from kvcore.scenario.profile import CopyCost, Profile
from kvreal.http import models as b
from kvreal.http.dryrun import dry_run
from kvreal.http.events import STREAM_QUEUE, EventLog
from kvreal.http.models import EventView
from kvreal.http.status import REASON_HEADER, code_of, of_cancel, of_move, refusal, split_error
from kvreal.http.views import together

CPU = "LocalCPUBackend"
SPACE = Namespace(bytes_per_token=10, chunk_tokens=4)
FIRST = event_id(1, 1)


# ---- status codes
@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("unknown_instance", 404), ("unknown_location", 404), ("mismatch", 409), ("full", 507), ("deadline", 504),
        ("cancelled", 409), ("source_restarted", 409), ("destination_dead", 409), ("destination_replaced", 409),
        ("source_cleared", 409), ("controller_restarted", 409), ("copy_failed", 409), ("busy", 429),
        ("idempotency_key_reused", 422), ("not_implemented", 501), ("not_ready", 503),
    ],
)  # fmt: skip
def test_reasons_have_their_status(reason: str, code: int) -> None:
    assert code_of(reason) == code
    reply = of_move(Answer("op", "failed", 0, FIRST, reason, "why"))
    assert reply.status == code
    assert isinstance(reply.body, b.ErrorReply)
    assert (reply.body.reason, reply.body.event_id, reply.body.detail) == (reason, "1-1", "why")
    assert reply.headers[REASON_HEADER] == reason
    assert ("Retry-After" in reply.headers) == (code in (429, 503))


@pytest.mark.parametrize("state", ["copying", "releasing", "done"])
def test_a_move_whose_tokens_are_fixed_is_200(state: str) -> None:
    reply = of_move(Answer("op", state, 12, FIRST))
    assert (reply.status, reply.body) == (200, b.MoveReply(12, "1-1"))
    assert msgspec.json.encode(reply.body) == b'{"num_tokens":12,"event_id":"1-1"}'


def test_nothing_held_is_the_only_failure_with_200() -> None:
    reply = of_move(Answer("op", "failed", 0, FIRST, "nothing_held"))
    assert (reply.status, reply.body, reply.headers) == (200, b.MoveReply(0, "1-1"), {REASON_HEADER: "nothing_held"})


def test_a_cancel_is_200_only_if_it_cancelled() -> None:
    assert of_cancel(Answer("op", "failed", 0, FIRST, "cancelled")).status == 200
    for state, reason in (("done", ""), ("releasing", "too_late"), ("failed", "full")):
        reply = of_cancel(Answer("op", state, 5, FIRST, reason))
        assert reply.status == 409
        assert isinstance(reply.body, b.ErrorReply)
        assert reply.body.state == state
    assert of_cancel(Answer("op", "refused", 0, FIRST, "unknown_event")).status == 404


def test_errors_name_the_field() -> None:
    for data, field in (
        (b'{"old_position":["a","b"],"new_position":["a","b"],"x":1}', "x"),
        (b'{"old_position":["a","b"]}', "new_position"),
        (b'{"old_position":["a",1],"new_position":["a","b"]}', "old_position[1]"),
        (b'{"old_position":["a","b"],"new_position":["a","b"],"tokens":[1,2,-3]}', "tokens[2]"),
    ):
        with pytest.raises(msgspec.ValidationError) as caught:
            msgspec.json.decode(data, type=b.MoveBody)
        assert split_error(str(caught.value))[1] == field


def test_a_refusal_always_has_a_line_for_people() -> None:
    body = refusal("not_ready", "").body
    assert isinstance(body, b.ErrorReply)
    assert body.detail == "not ready"


# ---- the event log
class Play:
    """A controller's machine with two instances of one or more ranks, played by hand."""

    def __init__(self, ranks: int = 1, log: Optional[EventLog] = None) -> None:
        self.now: int = 1_000 * S
        self.machine: Controller = Controller(ControllerSpec("ctl", Config(events_kept=50)))
        self.log: EventLog = log or EventLog(self.machine)
        self.journal: List[m.JournalRecord] = []
        self.epochs: Dict[str, int] = {}
        self.give(m.Boot())
        space = msgspec.structs.replace(SPACE, ranks=ranks)
        for name in ("a", "b"):
            for rank in range(ranks):
                src = f"{name}{rank}"
                register = Register(name, rank, 7, space, (Location(CPU, 100),))
                (sent,) = [e.msg for e in self.hear(src, register) if isinstance(e, m.Send)]
                assert isinstance(sent, Registered)
                self.epochs[src] = sent.epoch
                self.hear(src, Beat(sent.epoch, (LocationSeq(CPU, (sent.epoch, 0), 0),)))

    def give(self, item: m.Input) -> List[m.Effect]:
        self.now += S // 1000
        effects = self.machine.handle(self.now, item)
        self.log.step(self.now, item, effects)
        self.journal += [effect.record for effect in effects if isinstance(effect, m.Journal)]
        return effects

    def hear(self, src: str, message: Any) -> List[m.Effect]:
        return self.give(m.Received(src, message))

    def inc(self, src: str) -> Tuple[int, int]:
        return (self.epochs[src], 0)

    def begin(self, **more: Any) -> int:
        """Ask for three chunks of 4, 4 and 2 tokens to go from a to b."""
        request = MoveRequest("op", ("a", CPU), ("b", CPU), (b"k1", b"k2", b"k3"), (4, 4, 2), **more)
        self.hear("http/1", request)
        return max(self.log.records)

    def view(self, number: int) -> EventView:
        view = self.log.get(number)
        assert view is not None
        return view

    def pinned(self, number: int, rank: int = 0, slots: Tuple[int, ...] = (0, 1, 2)) -> None:
        self.hear(f"a{rank}", Pinned(number, self.inc(f"a{rank}"), (self.epochs[f"a{rank}"], 1), slots))

    def committed(self, number: int, rank: int = 0, n: int = 3, present: Tuple[int, ...] = ()) -> None:
        src = f"b{rank}"
        self.hear(src, Reserved(number, self.inc(src), n))
        self.hear(src, Committed(number, self.inc(src), n, self.now, 1, present, "tcp"))

    def released(self, number: int, rank: int = 0, deleted: int = 3, kept_at: Tuple[int, ...] = ()) -> None:
        pid = (self.epochs[f"a{rank}"], 1)
        self.hear(f"a{rank}", Released(number, pid, deleted, len(kept_at), "child_here" if kept_at else "", kept_at))


def test_a_move_is_followed_through_every_state() -> None:
    play = Play()
    number = play.begin()
    assert (play.view(number).state, play.view(number).num_tokens) == ("pinning", 0)
    play.pinned(number)
    assert play.view(number).state == "reserving"
    play.hear("b0", Reserved(number, play.inc("b0"), 3))
    assert (play.view(number).state, play.view(number).num_tokens) == ("copying", 10)
    play.committed(number)
    assert play.view(number).state == "releasing"
    play.released(number)
    view = play.view(number)
    assert (view.state, view.num_tokens, view.bytes, view.transport) == ("done", 10, 100, "tcp")
    assert isinstance(view.phases_s, dict)
    assert list(view.phases_s) == ["pinning", "reserving", "copying", "releasing"]
    assert sum(view.phases_s.values()) == pytest.approx(view.duration_s)
    assert [(c.destination, c.source) for c in view.chunks] == [("copied", "deleted")] * 3  # type: ignore[union-attr]


def test_a_move_that_copies_says_how_far_it_is_and_whoever_follows_is_told() -> None:
    play = Play(ranks=2)
    queue = play.log.open_stream()
    number = play.begin(step=1)
    for rank in (0, 1):
        play.pinned(number, rank)
        play.hear(f"b{rank}", Reserved(number, play.inc(f"b{rank}"), 3))
    _all(queue)
    play.hear("b0", Reserved(number, play.inc("b0"), 3, 1, 9, 5))  # 4 of its 9 were there before
    view = play.view(number)
    assert view.progress == b.Progress(planned_tokens=10, moved_tokens=0, moved_chunks=0, visible_tokens=0)
    play.hear("b1", Reserved(number, play.inc("b1"), 3, 2, 8, 8))
    play.hear("b1", Reserved(number, play.inc("b1"), 3, 1, 4, 4))  # an older word
    view = play.view(number)
    assert (view.state, view.bytes) == ("copying", 130)
    assert view.progress == b.Progress(planned_tokens=10, moved_tokens=8, moved_chunks=2, visible_tokens=4)
    assert [what.progress.moved_tokens for _, what in _all(queue)] == [0, 8]
    for rank in (0, 1):
        play.committed(number, rank)
    assert play.view(number).progress is msgspec.UNSET


def test_chunks_that_were_there_and_chunks_that_stay_are_told_apart() -> None:
    play = Play(ranks=2)
    number = play.begin()
    for rank in (0, 1):
        play.pinned(number, rank)
    for rank in (0, 1):
        play.committed(number, rank, present=(0,) if rank else (0, 1))
    for rank in (0, 1):
        play.released(number, rank, 2, (0,) if rank else ())
    view = play.view(number)
    assert [(c.destination, c.source) for c in view.chunks] == [  # type: ignore[union-attr]
        ("present", "kept"), ("copied", "deleted"), ("copied", "deleted"),
    ]  # fmt: skip
    assert [(rank.present, rank.bytes) for rank in view.ranks] == [(2, 20), (1, 60)]  # type: ignore[union-attr]
    assert view.bytes == 80


def test_a_copy_and_a_failure_touch_nothing_at_the_source() -> None:
    play = Play()
    copy = play.begin(copy=True)
    play.pinned(copy)
    play.committed(copy)
    play.released(copy, deleted=0)
    assert play.view(copy).kind == "copy"
    assert [c.source for c in play.view(copy).chunks] == ["kept"] * 3  # type: ignore[union-attr]
    failed = play.begin()
    play.hear("http/2", CancelRequest("op2", failed))
    view = play.view(failed)
    assert (view.state, view.reason, view.num_tokens, view.bytes) == ("failed", "cancelled", 0, 0)
    assert [(c.destination, c.source) for c in view.chunks] == [("none", "untouched")] * 3  # type: ignore[union-attr]


# ---- chunks of events that failed
@pytest.mark.parametrize(
    ("said", "chunks"),
    [
        ((), "unknown unknown unknown"),
        (((0, 3),), "partial partial partial"),
        (((1, 1),), "partial unknown unknown"),
        (((0, 3), (1, 1)), "copied partial partial"),
    ],
)
def test_a_chunk_of_a_failed_move_is_where_some_rank_has_said_that_it_is(
    said: Tuple[Tuple[int, int], ...], chunks: str
) -> None:
    """Both ranks have reserved everything; then each of ``said`` (rank, n) commits, and the move is cancelled."""
    play = Play(ranks=2)
    number = play.begin()
    for rank in (0, 1):
        play.pinned(number, rank)
    for rank in (0, 1):
        play.hear(f"b{rank}", Reserved(number, play.inc(f"b{rank}"), 3))
    for rank, n in said:
        play.hear(f"b{rank}", Committed(number, play.inc(f"b{rank}"), n, play.now, 1, (), "tcp"))
    play.hear("http/2", CancelRequest("op2", number))
    view = play.view(number)
    assert (view.state, view.reason) == ("failed", "cancelled")
    assert " ".join(c.destination for c in view.chunks) == chunks  # type: ignore[union-attr]
    assert {c.source for c in view.chunks} == {"untouched"}  # type: ignore[union-attr]
    assert view.bytes == sum((0, 40, 80, 100)[n] for _, n in said)


def test_what_a_rank_refused_is_not_there_and_what_was_cleared_is_not_known() -> None:
    play = Play()
    full = play.begin()
    play.pinned(full)
    play.hear("b0", Refused(full, "Fetch", "full", play.inc("b0")))
    assert {c.destination for c in play.view(full).chunks} == {"none"}  # type: ignore[union-attr]
    play = Play(ranks=2)
    cleared = play.begin()
    for rank in (0, 1):
        play.pinned(cleared, rank)
    for rank in (0, 1):
        play.hear(f"b{rank}", Reserved(cleared, play.inc(f"b{rank}"), 3))
    play.hear("b0", Committed(cleared, play.inc("b0"), 3, play.now, 1))
    play.hear("b0", Delta(CPU, (play.epochs["b0"], 1), 0))
    view = play.view(cleared)
    assert (view.state, view.reason) == ("failed", "destination_cleared")
    assert {c.destination for c in view.chunks} == {"unknown"}  # type: ignore[union-attr]


def test_a_word_of_another_incarnation_says_nothing_of_this_one() -> None:
    play = Play(ranks=2)
    number = play.begin()
    for rank in (0, 1):
        play.pinned(number, rank)
    play.hear("b0", Committed(number, (play.epochs["b0"], 7), 3, play.now, 1))
    play.hear("http/2", CancelRequest("op2", number))
    assert {c.destination for c in play.view(number).chunks} == {"unknown"}  # type: ignore[union-attr]


# ---- drains
def drained(play: Play) -> int:
    """All of a goes to b: two chains that share their head. The first ends, and the second is begun."""
    entries = (Entry(b"h", b"", 4, 1), Entry(b"x", b"h", 4, 9), Entry(b"y", b"h", 2, 5))
    play.hear("a0", Delta(CPU, play.inc("a0"), 1, entries))
    play.hear("http/1", MoveRequest("op", ("a", CPU), ("b", CPU)))
    number = min(number for number, record in play.log.records.items() if record.kind == "drain")
    view = play.view(number)
    assert (view.bytes, view.transport) == (0, msgspec.UNSET)
    assert view.progress == b.Progress(chains=2, chains_begun=1, planned_tokens=10, moved_tokens=0)
    play.pinned(number + 1, slots=(0, 1))
    play.committed(number + 1, n=2)
    play.released(number + 1, deleted=1, kept_at=(0,))
    return number


def test_a_drain_has_what_its_children_have_brought_as_they_end() -> None:
    play = Play()
    queue = play.log.open_stream()
    number = drained(play)
    first, half = play.view(number + 1), play.view(number)
    assert (half.state, half.bytes, half.transport) == ("copying", 80, "tcp")
    assert half.progress == b.Progress(chains=2, chains_begun=2, planned_tokens=10, moved_tokens=8)
    assert half.phases_s == first.phases_s
    told = [what for kind, what in _all(queue) if kind == "event" and what.event_id == "1-1"]
    assert told[-1].bytes == 80, "whoever follows is told when a child ends"
    play.pinned(number + 2, slots=(0, 2))
    play.committed(number + 2, n=2, present=(0,))
    play.released(number + 2, deleted=2)
    second, whole = play.view(number + 2), play.view(number)
    assert (whole.state, whole.num_tokens, whole.bytes, whole.transport) == ("done", 10, 100, "tcp")
    assert whole.progress == b.Progress(chains=2, chains_begun=2, planned_tokens=10, moved_tokens=10)
    assert isinstance(first.phases_s, dict) and isinstance(second.phases_s, dict) and isinstance(whole.phases_s, dict)
    assert whole.phases_s == {name: took + second.phases_s[name] for name, took in first.phases_s.items()}
    (listed,) = play.log.newest(1, kind="drain")
    assert (listed.bytes, listed.transport) == (100, "tcp")


def _all(queue: asyncio.Queue[Any]) -> List[Any]:
    return [queue.get_nowait() for _ in range(queue.qsize())]


@pytest.mark.parametrize("with_details", [True, False])
def test_a_drain_that_a_restart_ended_has_what_it_had_moved(with_details: bool) -> None:
    play = Play()
    play.log.keeper = keeper = Kept() if with_details else None
    number = drained(play)
    play.pinned(number + 2, slots=(0, 2))
    machine = Controller(play.machine.spec)
    log = EventLog(machine, keeper)
    boot = m.Boot(journal=tuple(play.journal))
    log.step(play.now, boot, machine.handle(play.now, boot))
    view = log.get(number)
    assert view is not None
    assert (view.state, view.reason, view.num_tokens) == ("failed", "controller_restarted", 8)
    assert (view.bytes, view.transport) == ((80, "tcp") if with_details else (msgspec.UNSET, msgspec.UNSET))


class Kept:
    def __init__(self) -> None:
        self.rows: Dict[int, bytes] = {}
        self.times: Dict[int, int] = {}

    def keep(self, event: int, record: bytes) -> None:
        self.rows[event] = record

    def kept(self) -> List[Tuple[int, bytes]]:
        return list(self.rows.items())

    def began(self) -> Dict[int, int]:
        return self.times


@pytest.mark.parametrize("with_details", [True, False])
def test_a_restarted_log_knows_what_the_journal_knows(with_details: bool) -> None:
    play = Play()
    keeper = Kept() if with_details else None
    play.log.keeper = keeper
    done = play.begin(idem="k")
    play.pinned(done)
    play.committed(done)
    play.released(done)
    decided = play.begin()
    play.pinned(decided)
    play.committed(decided)
    begun = play.begin()
    before = play.view(done)
    machine = Controller(play.machine.spec)
    log = EventLog(machine, keeper)
    boot = m.Boot(journal=tuple(play.journal))
    log.step(play.now, boot, machine.handle(play.now, boot))
    after = log.get(done)
    assert after is not None
    assert (after == before) is with_details
    assert (after.state, after.num_tokens, after.idempotency_key, after.transport) == ("done", 10, "k", "tcp")
    assert [c.source for c in after.chunks] == ["deleted" if with_details else "unknown"] * 3  # type: ignore[union-attr]
    releasing = log.get(decided)
    assert releasing is not None
    assert releasing.state == "releasing"
    assert [c.destination for c in releasing.chunks] == ["copied"] * 3  # type: ignore[union-attr]
    assert releasing.bytes is msgspec.UNSET  # how many of them were there before was not journaled
    failed = log.get(begun)
    assert failed is not None
    assert (failed.state, failed.reason) == ("failed", "controller_restarted")
    assert failed.chunks
    assert {(c.destination, c.source) for c in failed.chunks} == {("unknown", "untouched")}
    assert failed.bytes is msgspec.UNSET


def test_a_pin_that_a_restart_found_has_when_it_began_and_when_it_ends_at_the_least() -> None:
    now = time.time_ns()
    request = PinRequest("op", ("a", CPU), (b"k1",), (4,), 60 * S)
    machine = Controller(ControllerSpec("ctl", Config()))
    keeper = Kept()
    keeper.times = {FIRST: now - 20 * S}
    log = EventLog(machine, keeper)
    boot = m.Boot(journal=(m.Begin(FIRST, request),))
    log.step(now, boot, machine.handle(now, boot))
    view = log.get(FIRST)
    assert view is not None
    assert (view.state, view.begun) == ("held", (now - 20 * S) / 1e9)
    assert isinstance(view.expires_in_s, float)
    assert view.expires_in_s <= 40, "it began 20 s before the restart"
    machine.fanouts.keep(now + S, FIRST, request)
    assert log.expires_in_s(FIRST) > 50


def test_ended_events_are_kept_by_count() -> None:
    play = Play()
    for _ in range(300):
        number = play.begin()
        play.hear("http/2", CancelRequest("op2", number))
    assert len(play.log.records) <= 50 + 64
    assert max(play.log.records) == number
    assert [view.event_id for view in play.log.newest(2)] == [f"1-{number & 0xFFFF}", f"1-{(number & 0xFFFF) - 1}"]


def test_whoever_waits_is_told_at_the_end_and_leaves_nothing_behind() -> None:
    async def whole() -> None:
        play = Play()
        number = play.begin()
        await play.log.ended(number, 0.01)
        assert not play.log.waiting
        waiting = asyncio.create_task(play.log.ended(number, 30))
        await asyncio.sleep(0)
        play.hear("http/2", CancelRequest("op2", number))
        await asyncio.wait_for(waiting, 5)
        assert not play.log.waiting
        await play.log.ended(number, 30)

    asyncio.run(whole())


def test_a_stream_that_cannot_follow_is_told_so_and_ended() -> None:
    async def whole() -> None:
        play = Play()
        queue = play.log.open_stream()
        for _ in range(STREAM_QUEUE):
            play.hear("http/2", CancelRequest("op2", play.begin()))
        told = []
        while (item := queue.get_nowait()) is not None:
            told.append(item[0])
        assert told == ["lagged"]
        assert not play.log.streams

    asyncio.run(whole())


def test_several_events_as_one_go_on_while_one_does() -> None:
    def view(name: str, state: str, tokens: int, reason: str = "") -> EventView:
        return EventView(event_id=name, kind="drain", state=state, num_tokens=tokens, reason=reason)

    assert together("x", [view("1", "done", 3), view("2", "copying", 4)]).state == "copying"
    assert together("x", [view("1", "done", 3), view("2", "failed", 0, "full")]).reason == "full"
    both = together("x", [view("1", "done", 3), view("2", "failed", 0, "nothing_held")])
    assert (both.state, both.num_tokens, both.children) == ("done", 3, ["1", "2"])
    assert together("x", [view("1", "failed", 0, "nothing_held")]).reason == "nothing_held"


def test_several_events_as_one_have_the_sum_of_what_they_brought() -> None:
    def view(nbytes: int, via: str, begun: float, ended: float) -> EventView:
        return EventView(
            event_id="x", kind="drain", state="done", num_tokens=1, bytes=nbytes, transport=via,
            begun=begun, ended=ended, phases_s={"copying": 0.5},
        )  # fmt: skip

    both = together("x", [view(5, "tcp", 10.0, 11.0), view(7, "nixl, tcp", 10.5, 14.0)])
    assert (both.bytes, both.transport, both.begun, both.ended, both.duration_s) == (12, "tcp, nixl", 10.0, 14.0, 4.0)
    assert both.phases_s == {"copying": 1.0}


def test_a_dry_run_reckons_with_the_profile() -> None:
    play = Play()
    entries = tuple(Entry(key, b"", 4) for key in (b"k1", b"k2"))
    play.hear("a0", Delta(CPU, play.inc("a0"), 1, entries))
    play.hear("b0", Delta(CPU, play.inc("b0"), 1, entries[:1]))
    profile = Profile(copy_bytes_per_s=40.0, host_bytes_per_s=80.0)

    def reply(prefill: float, keys: Tuple[bytes, ...] = (b"k1", b"k2", b"k3")) -> b.DryRunReply:
        lens = (4,) * len(keys)
        found = dry_run(play.machine, ("a", CPU), ("b", CPU), keys, lens, False, profile, prefill).body
        assert isinstance(found, b.DryRunReply)
        return found

    slow = reply(1.0)
    assert (slow.num_tokens, slow.present_tokens, slow.bytes, slow.fits) == (8, 4, 40, True)
    assert slow.move_s == pytest.approx(1.0, abs=0.01)
    assert (slow.recompute_s, slow.recompute_is_quicker) == (8.0, False)
    assert reply(1000.0).recompute_is_quicker
    assert reply(1.0, (b"absent",)).num_tokens == 0
    profile = Profile(copies=(CopyCost(transport="t", rates=((1, 20.0),)),))
    assert reply(1.0).move_s == pytest.approx(2.0, abs=0.01), "what was measured of such copies counts"
