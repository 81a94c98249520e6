"""The transition tables: nothing is missing from them, and the machines do what they say."""

from __future__ import annotations

from typing import Any, Dict, List, Set, Tuple, get_args

import pytest

from kvcore.protocol import messages
from kvcore.protocol.config import Rules
from kvcore.protocol.machine import Note, Received
from kvcore.protocol.messages import Wire
from kvcore.protocol.rows import Row
from kvcore.protocol.tables import ROWS, TABLES, kinds, state_of
from tests.core import cases_controller, cases_worker
from tests.core.drive import Story

CASES = {**cases_controller.CASES, **cases_worker.CASES}
TYPES: Tuple[type, ...] = get_args(Wire)
NODES = {"controller": "ctl", "worker": "a/0"}


def name_of(row: Row) -> str:
    return f"{row.machine}-{row.state}-{row.input}"


# ---- conformance
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_the_machine_does_what_its_row_says(row: Row) -> None:
    w, act = CASES[row.machine][row.input](row.state)
    assert now_in(row.machine, w) == row.state, "the case does not bring the row's state about"
    assert kinds(act()) == row.sends
    assert now_in(row.machine, w) == (row.next or row.state)


def now_in(machine: str, w: Story) -> str:
    return state_of(machine, w.machines[w.node], w.event, w.rid, w.who)


def test_every_case_has_its_row() -> None:
    rows = {(row.machine, row.input) for row in ROWS}
    assert {(machine, given) for machine, cases in CASES.items() for given in cases} == rows


# ---- completeness
def accepted(node: str) -> List[str]:
    machine = Story(Rules()).machines[NODES[node]]
    tables: List[Dict[Any, Any]] = [machine.on_message, getattr(machine, "on_birth", {})]  # type: ignore[attr-defined]
    return [kind.__name__ for table in tables for kind in table]


def rows_of(node: str) -> List[Row]:
    return [row for table in TABLES if table.node == node for row in table.rows]


@pytest.mark.parametrize("node", NODES)
def test_every_message_that_a_node_takes_is_in_its_tables(node: str) -> None:
    assert set(accepted(node)) - {row.kind for row in rows_of(node)} == set()


@pytest.mark.parametrize("node", NODES)
def test_the_tables_speak_of_no_message_that_a_node_does_not_take(node: str) -> None:
    spoken = {row.kind for row in rows_of(node)} & {kind.__name__ for kind in TYPES}
    assert spoken - set(accepted(node)) == set()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.machine)
def test_every_message_of_a_table_is_there_in_every_state(table: Any) -> None:
    messages_of: Set[str] = {row.kind for row in table.rows} & {kind.__name__ for kind in TYPES}
    there = {(row.state, row.kind) for row in table.rows}
    assert {(state, kind) for state in table.states() for kind in messages_of} - there == set()


@pytest.mark.parametrize("node", NODES)
def test_every_timer_of_a_node_is_in_its_tables(node: str) -> None:
    machine = Story(Rules()).machines[NODES[node]]
    timers = {f"{kind} timer" for kind in machine.on_timer}  # type: ignore[attr-defined]
    assert timers == {row.kind for row in rows_of(node) if row.kind.endswith(" timer")}


def test_rows_are_told_apart_by_state_and_input() -> None:
    assert len({name_of(row) for row in ROWS}) == len(ROWS)


def test_every_state_that_a_row_leads_to_has_rows() -> None:
    for table in TABLES:
        assert {row.next for row in table.rows if row.next} <= set(table.states())


def test_what_is_ignored_says_why_and_does_nothing() -> None:
    for row in ROWS:
        if row.does.startswith("ignored"):
            assert row.does.startswith("ignored: ") and not row.sends and not row.next, name_of(row)


# ---- what a node does not take is refused by name
def sample(kind: Any) -> Any:
    """A message of a type, filled with nothing in particular."""
    values: Dict[str, Any] = {"int": 1, "str": "cpu", "bool": False, "Key": b"x", "Namespace": messages.Namespace()}
    values.update({"Pid": (1, 1), "Rid": (1, 1), "Inc": (1, 1), "Position": ("a", "cpu")})
    names = kind.__struct_fields__
    return kind(*[values.get(kind.__annotations__[name], ()) for name in names])


UNEXPECTED = [(node, kind) for node in NODES for kind in TYPES if kind.__name__ not in accepted(node)]
BIRTH = {row.kind for row in rows_of("worker") if row.machine in ("birth", "engine") and row.state in ("new", "any")}
NEEDS_AN_EPOCH = [kind for kind in TYPES if kind.__name__ not in BIRTH - {"Resync", "Clear", "PeerGone"}]


@pytest.mark.parametrize(("node", "kind"), UNEXPECTED, ids=lambda value: getattr(value, "__name__", value))
def test_what_a_node_does_not_take_is_refused_by_name(node: str, kind: type) -> None:
    w = Story(Rules())
    before = [machine.pending() for machine in w.machines.values()]
    effects = w.give(NODES[node], Received("b/0", sample(kind)))
    assert effects == [Note("unexpected", 0, f"{kind.__name__} from b/0")]
    assert [machine.pending() for machine in w.machines.values()] == before


@pytest.mark.parametrize("kind", NEEDS_AN_EPOCH, ids=lambda kind: kind.__name__)
def test_a_worker_without_an_epoch_does_nothing_but_register(kind: type) -> None:
    """Engines may store and use: they need no controller."""
    w = cases_worker.born("expelled")
    (effect,) = w.give(w.node, Received("ctl", sample(kind)))
    assert isinstance(effect, Note) and effect.kind in ("no_epoch", "unexpected") and kind.__name__ in effect.detail


# ---- holes
def test_every_rule_has_a_run_that_shows_its_hole() -> None:
    from tests.core import test_holes_1, test_holes_2, test_holes_3

    stories = [name for module in (test_holes_1, test_holes_2, test_holes_3) for name in vars(module)]
    told = {name.split("_")[1] for name in stories if name.startswith("test_h")}
    assert set(Rules.__struct_fields__) - told == set()


def test_rows_name_only_holes_that_there_are() -> None:
    named = {hole for row in ROWS for hole in row.holes}
    assert named <= set(Rules.__struct_fields__)
