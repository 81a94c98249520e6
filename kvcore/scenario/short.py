"""Short forms that a scenario file may use, to and from the long ones that the structs have.

``LocalCPUBackend: 2 GiB`` is ``{size: 2 GiB}``; ``{a/LocalCPUBackend: 4096}`` as an expectation is ``{found: ...}``;
``- settle:`` is ``{settle: {}}``; ``- clear: a/LocalCPUBackend`` is ``{clear: {at: ...}}``; and so on, see ``RULES``.
"""

from __future__ import annotations

from typing import Any, Dict, Final, Iterator, List, Set, Tuple

from kvcore.scenario.mistake import Path
from kvcore.scenario.schema import STEP_KINDS

#: Where a plain value stands for a mapping with this one field; ``*`` is any name or number.
RULES: Final[Tuple[Tuple[Path, str], ...]] = (
    (("prompts", "*"), "tokens"),
    (("instances", "*", "locations", "*"), "size"),
    (("steps", "*", "lookup"), "prompt"),
    (("steps", "*", "unpin"), "pin"),
    (("steps", "*", "clear"), "at"),
    (("steps", "*", "cancel"), "op"),
    (("steps", "*", "status"), "op"),
    (("steps", "*", "sleep"), "for"),
    (("steps", "*", "wait"), "op"),
    (("faults", "*", "crash"), "node"),
    (("faults", "*", "pause"), "node"),
    (("faults", "*", "full"), "at"),
    (("expect", "*"), "state"),
    (("workload", "prompt_tokens"), "fixed"),
)


def _places(data: Any, pattern: Path, path: Path = ()) -> Iterator[Tuple[Any, Any, Path]]:
    """(container, key, path) of every value that ``pattern`` names."""
    if not pattern:
        return
    if isinstance(data, dict):
        keys: List[Any] = list(data) if pattern[0] == "*" else [pattern[0]] if pattern[0] in data else []
    elif isinstance(data, list) and pattern[0] == "*":
        keys = list(range(len(data)))
    else:
        return
    for key in keys:
        if len(pattern) == 1:
            yield data, key, (*path, key)
        else:
            yield from _places(data[key], pattern[1:], (*path, key))


def lengthen(data: Any) -> Set[Path]:
    """Replace the short forms in place; returns the paths that are in no file, as they were put in here."""
    added: Set[Path] = set()
    for container, key, path in _places(data, ("steps", "*")):
        step = container[key]
        if isinstance(step, str) and step in STEP_KINDS:
            container[key] = step = {step: None}  # "- settle"
            added.add((*path, next(iter(step))))
        if isinstance(step, dict):
            for kind in STEP_KINDS:
                if kind in step and step[kind] is None:
                    step[kind] = {}
    for pattern, field in RULES:
        for container, key, path in _places(data, pattern):
            value = container[key]
            listed = isinstance(value, list) and field == "op"
            if listed or (value is not None and not isinstance(value, (dict, list))):
                container[key] = {field: value}
                added.add((*path, field))
    for container, key, path in _places(data, ("expect", "*")):
        _gather_found(container, key, path, added)
    return added


def _gather_found(container: Dict[str, Any], key: str, path: Path, added: Set[Path]) -> None:
    """Fields called instance/location go into ``found``."""
    expect = container[key]
    if not isinstance(expect, dict):
        return
    found = {name: value for name, value in expect.items() if "/" in name}
    if found and "found" not in expect:
        container[key] = {name: value for name, value in expect.items() if name not in found}
        container[key]["found"] = found
        added.add((*path, "found"))


def shorten(data: Dict[str, Any]) -> Dict[str, Any]:
    """The inverse, in place, where a mapping has nothing but the one field."""
    for container, key, _ in _places(data, ("expect", "*")):
        expect = container[key]
        if list(expect) == ["found"] and expect["found"] and all("/" in name for name in expect["found"]):
            container[key] = expect["found"]
    for pattern, field in RULES:
        for container, key, _ in _places(data, pattern):
            value = container[key]
            if isinstance(value, dict) and list(value) == [field] and not isinstance(value[field], (dict, list, tuple)):
                container[key] = value[field]
    for container, key, _ in _places(data, ("steps", "*")):
        for kind, body in container[key].items():
            if body == {}:
                container[key] = kind
    return data
