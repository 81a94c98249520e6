"""Faults and expectations: their anchors, nodes, places and steps must exist, and the kind must fit the anchor."""

from __future__ import annotations

import math
from typing import Dict, Final, Iterator, List, Optional, Tuple, Union, get_args

from kvcore.protocol import machine
from kvcore.protocol.config import Config
from kvcore.protocol.messages import Wire
from kvcore.scenario.mistake import Mistake, Path, choices, shown, unknown
from kvcore.scenario.schema import (
    ANCHORS,
    CLIENT,
    CONTROLLER,
    FAULT_KINDS,
    NAMESPACE_FIELDS,
    CopyFault,
    Expect,
    Fault,
    Scenario,
    When,
)
from kvcore.scenario.units import Duration
from kvcore.scenario.valid_steps import bad_position, step_kinds

MESSAGES: Final[Tuple[str, ...]] = tuple([kind.__name__ for kind in get_args(Wire)])
RECORDS: Final[Tuple[str, ...]] = tuple([kind.__name__ for kind in get_args(machine.JournalRecord)])
STARTED: Final[Tuple[str, ...]] = (
    *[kind.__name__ for kind in get_args(machine.Effect) if kind.__name__ not in ("Send", "Note")],
    *RECORDS,
)
ENDED: Final[Tuple[str, ...]] = ("CopyDone", "CopyStopped", "FillDone", "ReadDone", "WindowClosed")
COPIES: Final[Tuple[str, ...]] = ("StartCopy", "StartFill")
STATES: Final[Tuple[str, ...]] = (
    "done",
    "failed",
    "ok",
    "refused",
    "info",
    "pinning",
    "reserving",
    "copying",
    "releasing",
    "clearing",
)
_MESSAGE_KINDS: Final[Tuple[str, ...]] = ("drop", "delay", "duplicate", "reorder")


def nodes(scenario: Scenario) -> List[str]:
    """Every name that a fault may give a node: instances, their ranks, controller and client."""
    names = [*scenario.instances]
    names += [f"{name}/{rank}" for name, instance in scenario.instances.items() for rank in range(instance.ranks)]
    return [*names, CONTROLLER, CLIENT]


def bad_node(scenario: Scenario, name: str) -> str:
    """Why there is no such node, or ""."""
    known = nodes(scenario)
    if name in known:
        return ""
    instance, slash, rank = name.partition("/")
    if slash and instance in scenario.instances:
        return f"instance {instance} has no rank {shown(rank)}, expected 0 to {scenario.instances[instance].ranks - 1}"
    return unknown("node", name, known)


# ---- faults ---------------------------------------------------------------------------------------------------------
def fault_mistakes(scenario: Scenario, config: Config) -> Iterator[Mistake]:
    kinds = step_kinds(scenario)
    for i, fault in enumerate(scenario.faults):
        path: Path = ("faults", i)
        if not fault.kinds:
            yield Mistake(path, f"found no kind of fault, expected {choices(FAULT_KINDS)}")
            continue
        if fault.when is not None:
            yield from _when(scenario, (*path, "when"), fault.when, tuple(kinds))
        yield from _anchored(path, fault)
        yield from _counts(path, fault)
        yield from _kinds(scenario, path, fault, kinds)
        yield from _durations(config, path, fault)


def _when(scenario: Scenario, path: Path, when: When, steps: Tuple[str, ...]) -> Iterator[Mistake]:
    given = [name for name in (*ANCHORS, "at") if getattr(when, name)]
    if len(given) != 1:
        found = " and ".join(given) or "no anchor"
        yield Mistake(path, f"found {found}, expected one of {choices((*ANCHORS, 'at'))}")
        return
    what = given[0]
    word = str(getattr(when, what))
    known = {"sent": MESSAGES, "received": MESSAGES, "started": STARTED, "ended": ENDED}.get(what)
    if what in ("started", "ended"):
        known = (*(known or ()), *steps)
    if known is not None and word not in known:
        kind = {"started": "effect or step", "ended": "input or step"}.get(what, "message")
        yield Mistake((*path, what), unknown(kind, word, known))
    for name in ("by", "to"):
        node = getattr(when, name)
        why = bad_node(scenario, node) if node else ""
        if why:
            yield Mistake((*path, name), why)
        elif node and (what == "at" or (name == "to" and what not in ("sent", "received"))):
            yield Mistake((*path, name), f"means nothing with {what}", True)
    if when.nth < 1:
        yield Mistake((*path, "nth"), f"found {when.nth}, expected 1 or more")


def _anchored(path: Path, fault: Fault) -> Iterator[Mistake]:
    """The kind must fit the anchor."""
    when = fault.when
    if when is None:
        loose = [kind for kind in fault.kinds if kind not in ("namespace", "copy")]
        if loose:
            example = "'when: {sent: Committed}' or 'when: {at: 2 leases}'"
            yield Mistake(path, f"found {loose[0]} without a when, expected one such as {example}")
        return
    if fault.namespace is not None:
        yield Mistake((*path, "when"), "found a when, but a namespace differs from the start", True)
    anchor = when.anchor
    for kind in fault.kinds:
        message = anchor in ("sent", "received") or (anchor == "ended" and when.ended in ENDED)
        if kind in _MESSAGE_KINDS and not message:
            text = f"found {kind} at {anchor or 'nothing'}, expected a message: 'when: {{sent: Committed}}'"
            yield Mistake((*path, kind), text, True)
        if kind == "copy" and (anchor != "started" or when.started not in COPIES):
            text = f"found copy at {getattr(when, anchor or 'sent')}, expected 'when: {{started: {choices(COPIES)}}}'"
            yield Mistake((*path, kind), text, True)


def _counts(path: Path, fault: Fault) -> Iterator[Mistake]:
    if fault.times < 1:
        yield Mistake((*path, "times"), f"found {fault.times}, expected 1 or more")
    if isinstance(fault.drop, int) and fault.drop < 1:
        yield Mistake((*path, "drop"), f"found {fault.drop}, expected 1 or more, or all")
    if not 0 <= fault.duplicate <= 1000:
        yield Mistake((*path, "duplicate"), f"found {fault.duplicate}, expected 1 to 1000 copies more")


def _kinds(scenario: Scenario, path: Path, fault: Fault, steps: Dict[str, str]) -> Iterator[Mistake]:
    for kind in ("crash", "pause", "slow", "namespace"):
        part = getattr(fault, kind)
        if part is None:
            continue
        why = bad_node(scenario, part.node)
        if not why and kind == "namespace" and part.node in (CONTROLLER, CLIENT):
            why = f"{part.node} has no namespace, expected an instance or one of its ranks"
        if why:
            yield Mistake((*path, kind, "node"), why)
    if fault.namespace is not None and not fault.namespace.changes():
        text = f"found no field, expected the one that differs: {choices(NAMESPACE_FIELDS)}"
        yield Mistake((*path, "namespace"), text)
    if fault.slow is not None and not (math.isfinite(fault.slow.factor) and fault.slow.factor >= 1):
        yield Mistake((*path, "slow", "factor"), f"found {fault.slow.factor}, expected 1 or more")
    if fault.partition is not None:
        part = fault.partition
        for name, side in (("between", part.between), ("and", part.others)):
            yield from _side(scenario, (*path, "partition", name), side)
    if fault.copy is not None:
        yield from _copy((*path, "copy"), fault.copy)
    for kind, tier in (("full", fault.full), ("unmount", fault.unmount)):
        why = bad_position(scenario, tier.at) if tier is not None else ""
        if why:
            yield Mistake((*path, kind, "at"), why)
    if fault.cancel:
        kind_of = steps.get(fault.cancel)
        moves = [step for step, kind in steps.items() if kind == "move"]
        if kind_of is None:
            yield Mistake((*path, "cancel"), unknown("step", fault.cancel, moves))
        elif kind_of != "move":
            yield Mistake((*path, "cancel"), f"{fault.cancel} is a {kind_of}, expected a move")


def _side(scenario: Scenario, path: Path, side: Union[str, Tuple[str, ...]]) -> Iterator[Mistake]:
    if not side:
        yield Mistake(path, "found no node, expected one at least")
    for i, name in enumerate((side,) if isinstance(side, str) else side):
        why = bad_node(scenario, name)
        if why:
            yield Mistake(path if isinstance(side, str) else (*path, i), why)


def _copy(path: Path, copy: CopyFault) -> Iterator[Mistake]:
    if sum((copy.fail, copy.corrupt, copy.stuck)) > 1:
        yield Mistake(path, "found more than one of fail, corrupt and stuck, expected one")
    elif not (copy.fail or copy.corrupt or copy.stuck or copy.delay) and copy.slow == 1.0:
        yield Mistake(path, "found nothing that goes wrong, expected fail, corrupt, stuck, slow or delay")
    if not (math.isfinite(copy.slow) and copy.slow >= 1):
        yield Mistake((*path, "slow"), f"found {copy.slow}, expected 1 or more")
    if not 0 <= copy.fraction <= 1:
        yield Mistake((*path, "fraction"), f"found {copy.fraction}, expected 0 to 1")


def _durations(config: Config, path: Path, fault: Fault) -> Iterator[Mistake]:
    """What lasts must last; ``restart_after: 0 s`` is at once."""
    lasting: List[Tuple[Path, Optional[Duration]]] = [((*path, "delay"), fault.delay)]
    if fault.copy is not None:
        lasting.append(((*path, "copy", "delay"), fault.copy.delay))
    for kind in ("partition", "pause", "slow", "full", "unmount"):
        part = getattr(fault, kind)
        if part is not None:
            lasting.append(((*path, kind, "for"), part.duration))
    for where, duration in lasting:
        if duration is not None and duration.ns(config) <= 0:
            yield Mistake(where, f"found {duration}, expected a duration above 0")


# ---- expectations ---------------------------------------------------------------------------------------------------
def expect_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    steps = step_kinds(scenario)
    for name, expect in scenario.expect.items():
        path: Path = ("expect", name)
        if name not in steps:
            yield Mistake(path, unknown("step", name, tuple(steps)), True)
            continue
        yield from _expect(scenario, path, expect, steps[name])


def _expect(scenario: Scenario, path: Path, expect: Expect, kind: str) -> Iterator[Mistake]:
    states = (expect.state,) if isinstance(expect.state, str) else expect.state or ()
    for i, state in enumerate(states):
        if state not in STATES:
            at = (*path, "state") if isinstance(expect.state, str) else (*path, "state", i)
            yield Mistake(at, unknown("state", state, STATES))
    for name in ("num_tokens", "promised"):
        value = getattr(expect, name)
        for number in (value,) if isinstance(value, int) else value or ():
            if number < 0:
                yield Mistake((*path, name), f"found {number}, expected 0 or more")
    if expect.found is not None and kind != "lookup":
        yield Mistake((*path, "found"), f"is what a lookup says, and this is a {kind}", True)
    for place, tokens in (expect.found or {}).items():
        why = bad_position(scenario, place)
        if why:
            yield Mistake((*path, "found", place), why, True)
        elif tokens < 0:
            yield Mistake((*path, "found", place), f"found {tokens}, expected 0 or more")
