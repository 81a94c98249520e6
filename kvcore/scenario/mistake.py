"""A mistake in a scenario: where it is, and in one line what was found and what is expected."""

from __future__ import annotations

import difflib
from typing import Final, Iterable, List, Sequence, Tuple, Union

import msgspec

Path = Tuple[Union[str, int], ...]
"""Where in the file: names of fields (as they are written) and numbers of list items, from the top."""

_LISTED_MAX: Final = 14


class Mistake(msgspec.Struct, frozen=True, gc=False):
    """``at_key``: it is the name before the value that is wrong."""

    path: Path
    text: str
    at_key: bool = False


def nearest(word: str, known: Iterable[str]) -> str:
    """The known name that ``word`` most likely stands for, or ""."""
    names = list(known)
    lower = {name.lower(): name for name in reversed(names)}
    if word.lower() in lower:
        return lower[word.lower()]
    found = difflib.get_close_matches(word, names, 1, 0.6) or difflib.get_close_matches(
        word.lower(), list(lower), 1, 0.6
    )
    return lower.get(found[0].lower(), found[0]) if found else ""


def choices(known: Iterable[str]) -> str:
    """``a, b or c``, cut where there are too many."""
    names: List[str] = list(known)
    if len(names) > _LISTED_MAX:
        names = [*names[: _LISTED_MAX - 1], f"{len(names) - _LISTED_MAX + 1} more"]
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} or {names[-1]}"


def unknown(what: str, word: str, known: Sequence[str]) -> str:
    """``unknown instance 'aa' (did you mean 'a'?)``, else with what is known."""
    near = nearest(word, known)
    if near and len(known) > _LISTED_MAX:
        return f"unknown {what} {shown(word)} (did you mean {shown(near)}?)"
    if near:
        return f"unknown {what} {shown(word)}, expected {choices(known)} (did you mean {shown(near)}?)"
    if not known:
        return f"unknown {what} {shown(word)}: there is none"
    return f"unknown {what} {shown(word)}, expected {choices(known)}"


def shown(value: object) -> str:
    """A value from the file as an error shows it: short, on one line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, (int, float)):
        return str(value)[:40]
    text = str(value)
    return repr(text if len(text) <= 40 else text[:37] + "...")


def path_text(path: Path) -> str:
    """``steps[1].move.from``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if part.isprintable() and len(part) <= 60 else shown(part)
            text += f".{name}" if text else name
    return text
