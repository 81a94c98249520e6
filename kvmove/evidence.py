"""The few events that show why a check or an expectation failed."""

from __future__ import annotations

from pathlib import Path

from kvcore.scenario.result import Result, Violation


def of_violation(history: Path, violation: Violation) -> list[str]:
    """What led to it."""
    return []


def of_failure(history: Path, result: Result, failure: str) -> list[str]:
    """What became of the operation that it names."""
    return []
