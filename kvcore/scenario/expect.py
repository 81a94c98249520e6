"""What a scenario expects of its steps, held against what came of them."""

from __future__ import annotations

from typing import Any, List, Mapping, Optional, Protocol, Tuple, Union

from kvcore.scenario.result import Operation, Result
from kvcore.scenario.schema import Expect


class Expecting(Protocol):
    """A Scenario or a Built."""

    @property
    def expect(self) -> Mapping[str, Expect]: ...


def expectations(scenario: Expecting, result: Result) -> List[str]:
    """One line for each expectation that is not met: ``op: field: expected this, got that``. Empty if all are."""
    failures: List[str] = []
    operations = {operation.op: operation for operation in result.operations}
    for name, expect in scenario.expect.items():
        operation = operations.get(name)
        if operation is None:
            failures.append(f"{name}: expected it to be asked, but the run ended before it")
        else:
            failures.extend(f"{name}: {line}" for line in unmet(expect, operation))
    return failures


#: The same by its longer name.
check_expectations = expectations


def unmet(expect: Expect, operation: Operation) -> List[str]:
    """``field: expected this, got that`` for each field of ``expect`` that the operation does not meet."""
    lines: List[str] = []
    for field, got in (
        ("state", operation.state),
        ("num_tokens", operation.num_tokens),
        ("promised", operation.promised),
    ):
        _one_of(lines, field, getattr(expect, field), got)
    said = f"{operation.reason} {operation.detail}" if operation.reason else ""
    _part_of(lines, "reason", expect.reason, said)
    if expect.why is not None:
        _part_of(lines, "why", expect.why, ", ".join(dict.fromkeys(one.why for one in operation.source)))
    for field in ("deleted", "kept"):
        _every_rank(lines, field, getattr(expect, field), operation)
    if expect.found is not None:
        got_found = {f"{one.instance}/{one.location}": one.num_tokens for one in operation.found if one.num_tokens}
        wanted = {place: tokens for place, tokens in expect.found.items() if tokens}
        if got_found != wanted:
            lines.append(f"found: expected {_places(wanted)}, got {_places(got_found)}")
    return lines


def _one_of(lines: List[str], field: str, expected: Any, got: Union[str, int]) -> None:
    if expected is None:
        return
    choices = expected if isinstance(expected, tuple) else (expected,)
    if got not in choices:
        lines.append(f"{field}: expected {_either(choices)}, got {got}")


def _part_of(lines: List[str], field: str, expected: Union[str, Tuple[str, ...], None], got: str) -> None:
    """Whole words count, their separators do not: ``destination restarted`` is in ``destination_restarted``."""
    if expected is None:
        return
    choices = expected if isinstance(expected, tuple) else (expected,)
    if not any(_plain(choice) in _plain(got) if choice else not got for choice in choices):
        lines.append(f"{field}: expected {_either(choices)}, got {got or 'none'}")


def _plain(text: str) -> str:
    return " ".join(text.replace("_", " ").replace("-", " ").lower().split())


def _every_rank(lines: List[str], field: str, expected: Optional[int], operation: Operation) -> None:
    """At every source rank. A move that did not get as far has no ranks to ask: that is 0."""
    if expected is None:
        return
    got = [getattr(one, field) for one in operation.source] or [0]
    if any(value != expected for value in got):
        text = ", ".join("unknown" if value < 0 else str(value) for value in got)
        lines.append(f"{field}: expected {expected} at every source rank, got {text}")


def _either(choices: Tuple[Any, ...]) -> str:
    return " or ".join(str(choice) if choice != "" else "none" for choice in choices)


def _places(found: Mapping[str, int]) -> str:
    return ", ".join(f"{tokens} tokens at {place}" for place, tokens in sorted(found.items())) or "nothing anywhere"
