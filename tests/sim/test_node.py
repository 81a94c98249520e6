"""Nodes: the order of inputs, service times, alarms, lives, and what faults make of messages."""

from __future__ import annotations

from typing import List, Tuple

from kvcore.protocol.config import Config
from kvcore.protocol.machine import (
    Begin,
    EpochIssued,
    FillDone,
    Incarnation,
    Journal,
    JournalRecord,
    Note,
    Outcome,
    ReadDone,
    Received,
    Send,
    StartFill,
    StartRead,
)
from kvcore.protocol.messages import MoveRequest, Namespace, Register, Stop, Stopped
from kvcore.scenario.faults import Crash, Partition, Pause
from kvcore.scenario.schema import CrashFault, Fault, PauseFault, When
from kvcore.scenario.units import Duration
from kvsim.journal import Journal as JournalFile
from kvsim.journal import compacted
from tests.sim.stubs import CPU, Stage


def message(number: int) -> Stopped:
    return Stopped((1, number))


def numbers(stage: Stage, name: str) -> List[Tuple[int, int]]:
    return [(now, item.msg.rid[1]) for now, item in stage.puppet(name).seen]  # type: ignore[union-attr]


def test_a_message_leaves_after_the_service_time_and_arrives_after_the_latency() -> None:
    stage = Stage()
    start = stage.loop.now_ns
    stage.do("a/0", Send("b/0", message(1)))
    stage.loop.advance(10**9)
    assert stage.puppet("b/0").seen == [(start + 1100, Received("a/0", message(1)))]


def test_a_busy_node_takes_its_inputs_one_by_one_in_order() -> None:
    stage = Stage()
    start = stage.loop.now_ns
    for i in range(3):
        stage.do("a/0", Send("c/0", message(i)), Send("c/0", message(10 + i)))
    stage.loop.advance(10**9)
    # a works for 100 ns on each order and sends two messages at its end, each of which takes c 100 ns.
    first = start + 1100
    assert numbers(stage, "c/0") == [
        (first, 0),
        (first + 100, 10),
        (first + 200, 1),
        (first + 300, 11),
        (first + 400, 2),
        (first + 500, 12),
    ]


def test_what_follows_a_journal_waits_for_it() -> None:
    stage = Stage()
    start = stage.loop.now_ns
    stage.do("ctl", Send("a/0", message(1)), Journal(Incarnation(7)), Send("a/0", message(2)))
    stage.loop.advance(10**9)
    assert numbers(stage, "a/0") == [(start + 1100, 1), (start + 1200, 2)]  # 1110, but a is busy until 1200
    assert stage.node("ctl").journal.records == [Incarnation(7)]
    stage.node("ctl").crash()
    stage.node("ctl").boot()
    assert stage.node("ctl").journal.records == [Incarnation(7)]


def test_the_alarm_follows_the_earliest_deadline() -> None:
    stage = Stage()
    puppet = stage.puppet("a/0")
    now = stage.loop.now_ns
    puppet.timers.set(("late", 0, 0), now + 5000)
    stage.do("a/0")
    puppet.timers.set(("early", 0, 0), now + 3000)
    puppet.timers.set(("never", 0, 0), now + 2000)
    stage.do("a/0")
    stage.loop.advance(now + 1000)
    puppet.timers.cancel(("never", 0, 0))
    stage.loop.advance(10**9)
    assert puppet.fired == [(now + 3000, ("early", 0, 0)), (now + 5000, ("late", 0, 0))]


def test_a_dead_node_loses_what_it_is_sent() -> None:
    stage = Stage()
    stage.do("a/0", Send("b/0", message(1)))
    stage.node("b/0").crash()
    stage.loop.advance(stage.loop.now_ns + 5000)
    stage.node("b/0").boot()
    stage.do("a/0", Send("b/0", message(2)))
    stage.loop.advance(10**9)
    assert [number for _, number in numbers(stage, "b/0")] == [2]


def test_a_paused_node_finds_its_messages_when_it_goes_on_and_its_overdue_timers_before_them() -> None:
    stage = Stage()
    puppet = stage.puppet("b/0")
    puppet.timers.set(("lease", 0, 0), stage.loop.now_ns + 2000)
    stage.do("b/0")
    stage.do("a/0", Send("b/0", message(1)), Send("b/0", message(2)))
    stage.node("b/0").pause()
    stage.loop.advance(stage.loop.now_ns + 10_000)
    assert puppet.seen == [] and puppet.fired == []
    resumed = stage.loop.now_ns
    stage.node("b/0").resume()
    stage.loop.advance(10**9)
    assert puppet.fired == [(resumed, ("lease", 0, 0))]
    assert numbers(stage, "b/0") == [(resumed, 1), (resumed + 100, 2)]


def test_fills_and_reads() -> None:
    stage = Stage()
    start = stage.loop.now_ns
    stage.do("a/0", StartFill(1, CPU, (0, 1), (b"x", b"y"), (1000, 500)))
    stage.loop.advance(stage.loop.now_ns + 10_000)
    assert stage.puppet("a/0").seen == [(start + 100 + 5 + 750, FillDone(1, True))]
    start = stage.loop.now_ns
    stage.do("a/0", StartRead(2, CPU, (0, 1), (b"x", b"y"), (1000, 500), 7000))
    stage.loop.advance(stage.loop.now_ns + 10_000)
    assert stage.puppet("a/0").seen[1:] == [(start + 100 + 7000, ReadDone(2, True))]
    stage.do("a/0", StartRead(3, CPU, (0, 1), (b"x", b"z"), (1000, 500)))
    stage.do("a/0", StartRead(4, CPU, (0,), (b"x",), (1000,), 7000))
    stage.loop.advance(stage.loop.now_ns + 3000)
    stage.put("a/0", 0, b"else")  # someone writes where an engine reads
    stage.loop.advance(10**9)
    assert stage.seen("a/0")[2:] == [ReadDone(3, False), ReadDone(4, False)]


def test_notes_cost_nothing() -> None:
    stage = Stage()
    stage.do("a/0", Note("x"))
    stage.loop.advance(10**9)
    assert stage.seen("a/0") == []


# ---- faults
def on_stopped(**what: object) -> Fault:
    return Fault(when=When(sent="Stopped", by="a", nth=2), **what)  # type: ignore[arg-type]


def played(fault: Fault) -> Stage:
    stage = Stage(faults=(fault,), config=Config())
    for i in range(1, 5):
        stage.do("a/0", Send("b/0", message(i)))
    stage.loop.advance(10**9)
    return stage


def test_drop() -> None:
    assert [n for _, n in numbers(played(on_stopped(drop=1)), "b/0")] == [1, 3, 4]


def test_drop_of_an_effect_that_is_no_message() -> None:
    stage = Stage(faults=(Fault(when=When(started="StartFill"), drop=1),))
    stage.do("a/0", StartFill(1, CPU, (0,), (b"x",), (1000,)), Send("b/0", message(1)))
    stage.loop.advance(10**9)
    assert stage.seen("a/0") == [] and len(stage.seen("b/0")) == 1


def test_delay() -> None:
    fault = on_stopped(delay=Duration.parse("1 us"))
    assert [n for _, n in numbers(played(fault), "b/0")] == [1, 3, 4, 2]


def test_duplicate() -> None:
    fault = on_stopped(duplicate=1, delay=Duration.parse("1 us"))
    assert [n for _, n in numbers(played(fault), "b/0")] == [1, 2, 3, 4, 2]


def test_reorder() -> None:
    assert [n for _, n in numbers(played(on_stopped(reorder=True)), "b/0")] == [1, 3, 2, 4]


def test_reorder_of_the_last_message_lets_it_go_in_the_end() -> None:
    stage = Stage(faults=(Fault(when=When(sent="Stopped", by="a"), reorder=True),))
    start = stage.loop.now_ns
    stage.do("a/0", Send("b/0", message(1)))
    stage.loop.advance(10**12)
    assert numbers(stage, "b/0") == [(start + 1100 + Config().retry_ns, 1)]


def test_a_crash_loses_what_follows_it() -> None:
    stage = Stage(faults=(Fault(when=When(sent="Stopped", by="a"), crash=CrashFault(node="a")),))
    stage.cluster.on_action = lambda action: stage.node(action.node).crash()
    stage.do("a/0", Send("b/0", message(1)), Send("b/0", message(2)))
    stage.loop.advance(10**9)
    assert [n for _, n in numbers(stage, "b/0")] == [1]
    assert not stage.node("a/0").alive


def test_actions_are_handed_to_the_run() -> None:
    fault = Fault(
        when=When(received="Stop", by="b"),
        pause=PauseFault(node="a", duration=Duration.parse("2 s")),
        crash=CrashFault(node="c"),
    )
    stage = Stage(faults=(fault,))
    stage.do("a/0", Send("b/0", Stop((1, 1))))
    stage.loop.advance(10**9)
    assert stage.actions == [Crash("c/0", -1, 0), Pause("a/0", 2 * 10**9, 0)]


def test_a_partition_lets_nothing_through() -> None:
    stage = Stage(faults=(Fault(when=When(sent="Stop", nth=99), drop=1),))  # any: so that the plan is asked
    part = Partition(("a/0",), ("b/0",), one_way=True)
    stage.plan.begin(part)
    stage.do("a/0", Send("b/0", message(1)))
    stage.do("b/0", Send("a/0", message(2)))
    stage.loop.advance(10**6)
    assert stage.seen("b/0") == [] and len(stage.seen("a/0")) == 1
    stage.plan.end(part)
    stage.do("a/0", Send("b/0", message(3)))
    stage.loop.advance(10**9)
    assert [n for _, n in numbers(stage, "b/0")] == [3]


def test_a_journal_drops_what_no_restart_asks_for() -> None:
    register = Register("a", 0, 1, Namespace(), ())
    records: List[JournalRecord] = [Incarnation(1)]
    records += [EpochIssued("a/0", 1, register), EpochIssued("a/0", 2, register), Incarnation(2)]
    request = MoveRequest("m", ("a", CPU), ("b", CPU))
    for event in range(1, 6):
        records.append(Begin(event, request))
        if event != 2:  # still open
            records.append(Outcome(event, "done"))
    kept = compacted(records, 2)
    assert kept == [
        EpochIssued("a/0", 2, register),
        Incarnation(2),
        Begin(2, request),
        Begin(4, request),
        Outcome(4, "done"),
        Begin(5, request),
        Outcome(5, "done"),
    ]
    journal = JournalFile(2)
    for event in range(30_000):
        journal.append(Outcome(event, "done"))
    assert len(journal.all()) < 10_100
