"""The few events that show why a check or an expectation failed, out of a history that may be long."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from kvcore.scenario.history import HistoryError, read
from kvcore.scenario.render import diagram
from kvcore.scenario.result import Violation

#: Rows shown: the last ones are those that matter.
ROWS: Final = 12

_EVENT: Final = re.compile(r"\b\d+-\d+\b")


def of_violation(history: Path, violation: Violation) -> list[str]:
    """What led to it: of the event that it names, else at its node."""
    events = _EVENT.findall(violation.text)
    found = _last(history, events=events, before=violation.t) if events else []
    return found or _last(history, nodes=[violation.node], before=violation.t)


def of_step(history: Path, step: str) -> list[str]:
    """What became of a step of the scenario."""
    return _last(history, events=[step])


def _last(history: Path, **which: Any) -> list[str]:
    """The last rows of the diagram under its head; nothing if there is no history that can be read."""
    try:
        header, lines = read(history, lambda text: None)
        drawn = list(diagram(header, lines, **which))
    except HistoryError:
        return []
    if len(drawn) < 3:  # the title, and that nothing matches
        return []
    head = drawn[1]
    rows = [row for row in drawn[2:] if row != head]
    left_out = [f"... {len(rows) - ROWS} rows before"] if len(rows) > ROWS else []
    return [head, *left_out, *rows[-ROWS:]]
