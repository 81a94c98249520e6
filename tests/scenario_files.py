"""The scenario files in the tree, and what each of their faults must have done by the end of a run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from kvcore.scenario.result import Result
from kvcore.scenario.schema import CopyFault, Fault

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("smoke", "faults", "field", "regress", "prior-art")


def files(*folders: str) -> list[str]:
    """Paths of the scenario files in these folders (default: all), from the root of the tree, in order."""
    found = []
    for folder in folders or FOLDERS:
        found += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scenarios" / folder).rglob("*.yaml"))
    return found


def idle_faults(faults: tuple[Fault, ...], result: Result) -> list[str]:
    """Those that never fired: a scenario whose fault does nothing tests nothing. A namespace that differs needs no
    anchor, and always differs."""
    wanted = Counter(label for fault in faults for label in labels(fault))
    return [
        f"{label}: fired {result.fired.get(label, 0)} times, expected {least} or more"
        for label, least in sorted(wanted.items())
        if result.fired.get(label, 0) < least
    ]


def labels(fault: Fault) -> list[str]:
    """``kind at anchor``, as Result.fired counts it."""
    when = fault.when
    where = "started StartCopy" if when is None else f"{when.anchor} {getattr(when, when.anchor)}"
    if when is not None and when.at is not None:
        where = "a time"
    kinds = [kind for kind in fault.kinds if kind != "namespace"]
    return [f"{_copy(fault.copy) if kind == 'copy' and fault.copy else kind} at {where}" for kind in kinds]


def _copy(copy: CopyFault) -> str:
    for kind in ("fail", "corrupt", "stuck"):
        if getattr(copy, kind):
            return f"copy {kind}"
    return "copy slow" if copy.slow > 1.0 else "copy delay"
