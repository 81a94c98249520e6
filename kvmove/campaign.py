"""Many generated scenarios: what is wrong with one that has run, and which faults they met, in which phase of a move.

A campaign that never saw some kind of fault has not tested it: an empty row of the table is a failure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from kvcore.scenario.result import Result, Violation
from kvcore.scenario.schema import FAULT_KINDS, Scenario

COPY_KINDS: Final = ("copy fail", "copy corrupt", "copy stuck", "copy slow", "copy delay")
#: The rows: every kind of fault that a scenario may have.
KINDS: Final = tuple(name for kind in FAULT_KINDS for name in (COPY_KINDS if kind == "copy" else (kind,)))
#: The columns: in which phase of a move a fault's anchor stands. ``any``: at a time; ``start``: from the start on.
PHASES: Final[dict[str, tuple[str, ...]]] = {
    "start": (),
    "register": (
        *("Register", "Registered", "RegisterRefused", "Probe", "Alive", "Expelled"),
        *("Incarnation", "EpochIssued"),
    ),
    "view": ("Beat", "Delta", "Resync", "Snap"),
    "pin": ("MoveRequest", "Begin", "Pin", "Pinned", "Renew"),
    "reserve": ("Fetch", "Reserved", "Refused", "Promised"),
    "copy": (
        *("StartCopy", "CopyDone", "CopyMoved", "Push", "Moved", "Pushed", "Fence", "Fenced", "Stop", "Stopped"),
        *("AbortCopy", "CopyStopped", "Suspect", "PeerGone", "CloseWindow", "WindowClosed"),
    ),
    "commit": ("Committed", "Retain", "Decide"),
    "release": ("Release", "Released", "End", "Outcome"),
    "users": (
        *("StoreRequest", "UseRequest", "LookupRequest", "PinRequest", "UnpinRequest", "ClearRequest"),
        *("CancelRequest", "StatusRequest", "Answer", "Hold", "Held", "Unhold", "Clear", "Cleared"),
        *("StartFill", "FillDone", "StartRead", "ReadDone", "Journal"),
    ),
    "any": (),
}
PHASE_OF: Final = {name: phase for phase, names in PHASES.items() for name in names}
OUTCOMES: Final = ("done", "failed", "other")


def phase_of(label: str) -> str:
    """Of an anchor as a fault plan names it: ``sent Pin``, ``a time``. A step's name is the users'."""
    return "any" if label == "a time" else PHASE_OF.get(label.partition(" ")[2], "users")


# ---- what is wrong with one -----------------------------------------------------------------------------------------
def unexpected(scenario: Scenario, result: Result) -> list[Violation]:
    """Violations but those that a fault is for: where the transport delivers wrong bytes, or a tier goes while an
    engine reads there, wrong bytes are found."""
    return [one for one in result.violations if not _meant(scenario, result, one)]


def _meant(scenario: Scenario, result: Result, violation: Violation) -> bool:
    if violation.property in scenario.violates:
        return True
    if violation.property.lower() != "byte":
        return False
    fired = [label.partition(" at ")[0] for label in result.fired]
    # A read fails at wrong bytes, and Byte says so: the engine loads nothing. Bytes of a tier that goes meanwhile are.
    return "copy corrupt" in fired or ("unmount" in fired and violation.text.startswith("an engine"))


def troubles(scenario: Scenario, result: Result) -> list[str]:
    """One line for each thing that must not be; empty for a good run."""
    lines = [f"{one.property} at {one.node}: {one.text}" for one in unexpected(scenario, result)]
    return lines + [f"hung: {why}" for why in result.hung]


# ---- coverage -------------------------------------------------------------------------------------------------------
class Coverage(msgspec.Struct):
    """``counts``: kind of fault -> phase of its anchor -> outcome of a move in a run where it fired -> moves."""

    runs: int = 0
    counts: dict[str, dict[str, dict[str, int]]] = {}

    def add(self, scenario: Scenario, result: Result) -> None:
        self.runs += 1
        outcomes = [_outcome(one.state) for one in result.operations if one.what == "move"]
        for kind, phase in sorted(_fired(scenario, result)):
            cell = self.counts.setdefault(kind, {}).setdefault(phase, {})
            for outcome in outcomes or ["other"]:
                cell[outcome] = cell.get(outcome, 0) + 1

    def merge(self, other: Coverage) -> None:
        self.runs += other.runs
        for kind, phases in other.counts.items():
            for phase, cell in phases.items():
                mine = self.counts.setdefault(kind, {}).setdefault(phase, {})
                for outcome, count in cell.items():
                    mine[outcome] = mine.get(outcome, 0) + count

    def empty(self, kinds: Iterable[str] = KINDS) -> list[str]:
        """The kinds of fault that never fired: a campaign with one has failed."""
        return [kind for kind in kinds if not self.counts.get(kind)]

    def lines(self, kinds: Iterable[str] = KINDS) -> Iterator[str]:
        """The table: moves done / failed / other (refused, not known) in runs where such a fault fired there."""
        yield f"moves {' / '.join(OUTCOMES)} in {self.runs:,} runs, by kind of fault and phase of its anchor"
        yield " ".join([f"{'':13}", *(f"{phase:>13}" for phase in PHASES)])
        for kind in kinds:
            row = self.counts.get(kind, {})
            yield " ".join([f"{kind:13}", *(f"{_cell(row.get(phase)):>13}" for phase in PHASES)]).rstrip()
        for kind in self.empty(kinds):
            yield f"EMPTY ROW: no run met {kind}"


def _cell(counts: dict[str, int] | None) -> str:
    return "/".join(str(counts.get(outcome, 0)) for outcome in OUTCOMES) if counts else "-"


def _outcome(state: str) -> str:
    return state if state in OUTCOMES else "other"


def _fired(scenario: Scenario, result: Result) -> set[tuple[str, str]]:
    found = {("namespace", "start") for fault in scenario.faults if fault.namespace is not None}
    for label in result.fired:
        kind, _, anchor = label.partition(" at ")
        found.add((kind, phase_of(anchor)))
    return found
