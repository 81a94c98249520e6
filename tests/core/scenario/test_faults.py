"""The fault plan says the same in both worlds: whom it concerns, how often, and what happens to nodes."""

from __future__ import annotations

from typing import Any, List

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.protocol.config import Config, S
from kvcore.protocol.machine import CopyDone, Effect, Incarnation, Journal, Note, Received, Send, StartCopy, StartFill
from kvcore.protocol.messages import Committed, End, Pin, Released
from kvcore.scenario.faults import (
    FINE,
    Action,
    CancelOp,
    ClientDies,
    Crash,
    FaultPlan,
    Full,
    Partition,
    Pause,
    Slow,
    Verdict,
)
from kvcore.scenario.schema import Fault
from kvcore.scenario.units import dec_hook

NODES = ("ctl", "a/0", "a/1", "b/0", "b/1", "client")
CONFIG = Config()
COMMITTED = Committed(1, (1, 0), 1)


def plan(*faults: Any, **more: Any) -> FaultPlan:
    return FaultPlan(msgspec.convert(faults, List[Fault], dec_hook=dec_hook), CONFIG, NODES, **more)


def sent(of: FaultPlan, node: str = "b/0", message: Any = COMMITTED, to: str = "ctl") -> Verdict:
    return of.effect(0, node, Send(to, message))


def copying(of: FaultPlan, node: str) -> Any:
    return of.copy(0, node, StartCopy((1, 1), True, "a/0", 1, "cpu", (0,), "cpu", (0,), (1,)))


def drops(of: FaultPlan, count: int, node: str = "b/0") -> List[bool]:
    return [sent(of, node).drop for _ in range(count)]


def test_no_faults_is_not_active() -> None:
    assert not plan().active
    assert not plan({"namespace": {"node": "a", "dtype": "fp8"}}).active
    assert sent(plan()) is FINE


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"when": {"sent": "Committed"}, "drop": 1}, [True, False, False, False, False]),
        ({"when": {"sent": "Committed", "nth": 2}, "drop": 1}, [False, True, False, False, False]),
        ({"when": {"sent": "Committed", "nth": 2}, "drop": 2}, [False, True, True, False, False]),
        ({"when": {"sent": "Committed"}, "times": 3, "drop": 1}, [True, True, True, False, False]),
        ({"when": {"sent": "Committed", "nth": 3}, "drop": "all"}, [False, False, True, True, True]),
    ],
)
def test_what_is_dropped(fault: Any, expected: List[bool]) -> None:
    assert drops(plan(fault), 5) == expected


def test_counting_is_per_sender_and_other_messages_do_not_count() -> None:
    of = plan({"when": {"sent": "Committed", "nth": 2}, "drop": 1})
    assert drops(of, 1) == [False]
    assert sent(of, message=Released(1, (1, 1))) == FINE
    assert drops(of, 2, "b/1") == [False, True]
    assert drops(of, 1) == [True]


def test_by_and_to_name_an_instance_or_a_node() -> None:
    of = plan({"when": {"sent": "Pin", "by": "ctl", "to": "a"}, "drop": "all"})
    pin = Pin(1, 1, "cpu", (), True, 1)
    assert [sent(of, "ctl", pin, to).drop for to in ("a/0", "a/1", "b/0")] == [True, True, False]
    one = plan({"when": {"sent": "Committed", "by": "b/1"}, "drop": "all"})
    assert (drops(one, 1, "b/0"), drops(one, 1, "b/1")) == ([False], [True])
    nobody = plan({"when": {"sent": "Committed", "by": "z"}, "drop": "all"})
    assert drops(nobody, 1) == [False]


def test_a_new_life_counts_anew_but_what_has_fired_has_fired() -> None:
    once = plan({"when": {"sent": "Committed"}, "drop": 1})
    assert drops(once, 1) == [True]
    once.restarted("b/0")
    assert drops(once, 2) == [False, False]
    later = plan({"when": {"sent": "Committed", "nth": 2}, "drop": 1})
    drops(later, 1)
    later.restarted("b/0")
    assert drops(later, 3) == [False, True, False]
    ever = plan({"when": {"sent": "Committed", "nth": 2}, "drop": "all"})
    drops(ever, 2)
    ever.restarted("b/0")
    assert drops(ever, 3) == [False, True, True]


def test_the_process_that_takes_over_knows_what_has_fired() -> None:
    fault = {"when": {"sent": "Committed"}, "drop": 1}
    first = plan(fault)
    drops(first, 1)
    assert drops(plan(fault, spent=first.spendings()), 2) == [False, False]


def test_delay_duplicate_reorder() -> None:
    assert sent(plan({"when": {"sent": "Committed"}, "delay": "2 leases"})).delay_ns == 2 * CONFIG.lease_ns
    assert sent(plan({"when": {"sent": "Committed"}, "duplicate": 2})).copies == 3
    late = sent(plan({"when": {"sent": "Committed"}, "duplicate": 1, "delay": "1 s"}))
    assert (late.delay_ns, late.copies, late.copy_gap_ns) == (0, 2, S)
    turned = sent(plan({"when": {"sent": "Committed"}, "reorder": True}))
    assert turned.reorder and turned.delay_ns == CONFIG.retry_ns


def test_faults_at_one_message_add_up() -> None:
    at = {"sent": "Committed"}
    both = sent(plan({"when": at, "delay": "1 s"}, {"when": at, "delay": "2 s"}, {"when": at, "cancel": "m"}))
    assert both.delay_ns == 3 * S and both.actions == (CancelOp("m", 2),)


def test_what_happens_to_nodes_happens_once_whoever_is_first() -> None:
    of = plan({"when": {"sent": "Committed"}, "times": 9, "drop": 1, "crash": {"node": "b", "restart_after": "1 s"}})
    first = sent(of, "b/1")
    assert first.drop and first.actions == (Crash("b/0", S, 0), Crash("b/1", S, 0))
    assert sent(of, "b/0") == Verdict(drop=True)
    assert of.fired == {"drop at sent Committed": 2, "crash at sent Committed": 1}


@pytest.mark.parametrize(
    ("fault", "action"),
    [
        ({"pause": {"node": "a/1", "for": "3 beats"}}, Pause("a/1", 3 * CONFIG.beat_ns, 0)),
        ({"pause": {"node": "ctl"}}, Pause("ctl", -1, 0)),
        ({"slow": {"node": "a/0", "factor": 20}}, Slow("a/0", 20.0, -1, 0)),
        ({"full": {"at": "b/cpu", "for": "1 s"}}, Full("b/0", "cpu", S, 0)),
        ({"crash": {"node": "client"}}, ClientDies(-1, 0)),
        ({"cancel": "m"}, CancelOp("m", 0)),
        (
            {"partition": {"between": "a", "and": ["b", "ctl"], "one_way": True, "for": "1 s"}},
            Partition(("a/0", "a/1"), ("ctl", "b/0", "b/1"), True, S, 0),
        ),
    ],
)
def test_actions_at_a_message_and_at_a_time(fault: Any, action: Action) -> None:
    assert sent(plan({"when": {"sent": "Committed"}, **fault})).actions[0] == action
    timed = plan({"when": {"at": "2 leases"}, **fault})
    assert timed.active and timed.timed()[0] == (2 * CONFIG.lease_ns, action)
    timed.begin(action)
    assert list(timed.fired.values()) == [1]
    data = msgspec.msgpack.encode(action)
    assert msgspec.msgpack.decode(data, type=Action) == action


def test_partitions_are_one_way_or_both() -> None:
    of = plan({"when": {"at": "1 s"}, "partition": {"between": "a", "and": "b", "one_way": True}})
    action = of.timed()[0][1]
    assert not of.blocked("a/0", "b/0")
    of.begin(action)
    assert of.blocked("a/0", "b/1") and not of.blocked("b/1", "a/0") and not of.blocked("a/0", "ctl")
    of.end(action)
    assert not of.blocked("a/0", "b/1")
    both = plan({"when": {"at": "1 s"}, "partition": {"between": "a", "and": "b"}})
    both.begin(both.timed()[0][1])
    assert both.blocked("b/1", "a/0")
    both.stop()
    assert not both.blocked("b/1", "a/0") and not both.active


def test_slowness_multiplies_and_ends() -> None:
    of = plan()
    one, two = Slow("a/0", 2.0), Slow("a/0", 3.0)
    of.begin(one)
    of.begin(two)
    assert (of.slowness("a/0"), of.slowness("a/1")) == (6.0, 1.0)
    of.end(one)
    assert of.slowness("a/0") == 3.0


def test_copies() -> None:
    of = plan({"when": {"started": "StartCopy", "by": "b/1", "nth": 2}, "copy": {"fail": True, "fraction": 0.5}})
    assert [copying(of, "b/1").fail for _ in range(3)] == [False, True, False]
    assert not copying(of, "b/0").fail
    assert not of.copy(0, "b/1", StartFill(1, "cpu", (0,), (b"",), (1,))).fail
    assert copying(plan({"copy": {"stuck": True}}), "b/0").stuck, "no anchor: the first copy of each node"
    fills = plan({"when": {"started": "StartFill"}, "copy": {"corrupt": True}})
    assert fills.copy(0, "a/0", StartFill(1, "cpu", (0,), (b"",), (1,))).corrupt


def test_a_copy_and_a_crash_at_one_anchor_are_counted_once_each() -> None:
    of = plan({"when": {"started": "StartCopy", "nth": 2}, "copy": {"slow": 20}, "crash": {"node": "a/0"}})
    start = StartCopy((1, 1), True, "a/0", 1, "cpu", (0,), "cpu", (0,), (1,))
    seen = [(of.effect(0, "b/0", start).actions, of.copy(0, "b/0", start).slow) for _ in range(3)]
    assert seen == [((), 1.0), ((Crash("a/0", -1, 0),), 20.0), ((), 1.0)]


def test_effects_inputs_journal_records_and_steps_are_anchors() -> None:
    crash = {"crash": {"node": "ctl"}}
    record = Journal(Incarnation(1))
    assert plan({"when": {"started": "Incarnation"}, **crash}).effect(0, "ctl", record).actions
    assert plan({"when": {"started": "Journal"}, **crash}).effect(0, "ctl", record).actions
    assert plan({"when": {"ended": "CopyDone"}, **crash}).input(0, "b/0", CopyDone((1, 1), True)).actions
    assert plan({"when": {"ended": "CopyDone"}, "drop": 1}).input(0, "b/0", CopyDone((1, 1), True)).drop
    received = plan({"when": {"received": "End", "by": "b", "to": "ctl"}, "drop": 1})
    assert received.watches_inputs
    assert received.input(0, "b/0", Received("ctl", End(1, 1))).drop
    assert not received.input(0, "b/1", Received("a/0", End(1, 1))).drop
    assert plan({"when": {"started": "m"}, **crash}).effect(0, "client", Note("invoke", 0, "m")).actions
    assert not plan({"when": {"started": "m"}, **crash}).effect(0, "client", Note("ok", 0, "m")).actions
    assert plan({"when": {"ended": "m"}, **crash}).effect(0, "client", Note("info", 0, "m")).actions
    assert not plan({"when": {"ended": "m"}, **crash}).effect(0, "ctl", Note("info", 0, "m")).actions


def test_nothing_goes_wrong_any_more_after_stop() -> None:
    of = plan({"when": {"sent": "Committed"}, "drop": "all"}, {"copy": {"fail": True}})
    of.stop()
    assert sent(of) == FINE and not copying(of, "b/0").fail


MESSAGES: List[Any] = [COMMITTED, Released(1, (1, 1)), End(1, 1)]
FAULTS = st.fixed_dictionaries(
    {
        "when": st.fixed_dictionaries(
            {"sent": st.sampled_from(["Committed", "Released", "End"]), "nth": st.integers(1, 3)},
            optional={"by": st.sampled_from(["a", "b/0", "ctl"])},
        ),
        "times": st.integers(1, 3),
    },
    optional={
        "drop": st.one_of(st.integers(1, 2), st.just("all")),
        "duplicate": st.integers(1, 3),
        "crash": st.just({"node": "b"}),
    },
).filter(lambda fault: len(fault) > 2)
STEPS = st.lists(st.tuples(st.sampled_from(NODES), st.sampled_from(range(3)), st.booleans()), max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(FAULTS, max_size=3), STEPS)
def test_one_plan_for_all_nodes_says_what_a_plan_for_each_says(faults: Any, steps: Any) -> None:
    """The simulator has one plan, each real process its own: verdicts on messages must not differ."""
    together = plan(*faults)
    apart = {node: plan(*faults) for node in NODES}
    for node, which, restart in steps:
        if restart:
            together.restarted(node)
            apart[node] = plan(*faults, spent=apart[node].spendings())
        effect: Effect = Send("ctl", MESSAGES[which])
        one, other = together.effect(0, node, effect), apart[node].effect(0, node, effect)
        assert msgspec.structs.replace(one, actions=()) == msgspec.structs.replace(other, actions=())
        assert set(one.actions) <= set(other.actions) or not one.actions


def test_a_partition_that_is_begun_twice_ends_once() -> None:
    """A real node that notices it is told of it as well."""
    plan = FaultPlan((), Config(), ("a/0", "b/0"))
    for action in (Partition(("a/0",), ("b/0",), fault=0), Slow("a/0", 2.0, fault=1)):
        plan.begin(action)
        plan.begin(action)
        plan.end(action)
    assert not plan.blocked("a/0", "b/0") and plan.slowness("a/0") == 1.0
