"""From plain data to structs by msgspec, and from its errors to a place in the file and words for people.

msgspec writes ``$.instances[...].ranks`` for "some entry of that mapping"; the entry is found by converting each alone.
"""

from __future__ import annotations

import re
import types
import typing
from typing import Any, Dict, Final, List, Literal, Optional, Tuple, Type, TypeVar, Union

import msgspec

from kvcore.scenario.mistake import Mistake, Path, choices, nearest, shown, unknown
from kvcore.scenario.schema import Body, Fault, Scenario, Step
from kvcore.scenario.units import UnitError, dec_hook

T = TypeVar("T", bound=msgspec.Struct)

_AT: Final = re.compile(r" - at `(.*)`\Z", re.DOTALL)
_TOKEN: Final = re.compile(r"\.(?P<name>\w+)|\[(?P<index>\d+)\]|(?P<some>\[\.\.\.\])", re.ASCII)
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`\Z", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(.*)`\Z", re.DOTALL)
_WRONG: Final = re.compile(r"Expected `(.*)`, got `(.*)`\Z", re.DOTALL)
_LENGTH: Final = re.compile(r"Expected `array` of length (\d+)(?:, got (\d+))?\Z")
_BOUND: Final = re.compile(r"Expected `(\w+)` (<=|>=|<|>) (.+)\Z")
_BOUNDS: Final[Dict[str, str]] = {"<=": "at most", ">=": "at least", "<": "less than", ">": "more than"}
_ENUM: Final = re.compile(r"Invalid enum value .*\Z", re.DOTALL)
_WORDS: Final[Dict[str, str]] = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "object": "a mapping",
    "array": "a list",
    "null": "nothing",
}


def convert(data: Any) -> Union[Scenario, Mistake]:
    """The scenario that ``data`` says, or the first mistake of its form."""
    return convert_as(data, Scenario)


def convert_as(data: Any, kind: Type[T]) -> Union[T, Mistake]:
    """The same for any struct."""
    try:
        return msgspec.convert(data, kind, dec_hook=dec_hook)
    except msgspec.ValidationError as error:
        return _locate(error, data, kind, ())


def in_words(text: str) -> str:
    """msgspec's own words for people, where there is no file to point into: ``$.a.b`` is then named in front."""
    match = _AT.search(text)
    if match:
        where = match.group(1).removeprefix("$").removeprefix(".")
        return f"{where}: {in_words(text[: match.start()])}" if where else in_words(text[: match.start()])
    if match := _UNKNOWN.match(text):
        return f"unknown field {shown(match.group(1))}"
    if match := _MISSING.match(text):
        return f"{match.group(1)} is missing"
    if match := _LENGTH.match(text):
        return f"found a list of {match.group(2) or 'another length'}, expected one of {match.group(1)}"
    if match := _BOUND.match(text):
        return f"expected {_bounded(match)}"
    if match := _WRONG.match(text):
        expected = [_WORDS.get(word, word) for word in match.group(1).split(" | ")]
        return f"found {_WORDS.get(match.group(2), match.group(2))}, expected {' or '.join(expected)}"
    return " ".join(text.replace("`", "").split())


def _bounded(match: re.Match[str]) -> str:
    kind, sign, bound = match.groups()
    return f"{_WORDS.get(kind, kind)}, {_BOUNDS[sign]} {bound}"


def _locate(error: msgspec.ValidationError, data: Any, kind: Any, path: Path) -> Mistake:
    text = str(error)
    match = _AT.search(text)
    where = match.group(1) if match else "$"
    text = text[: match.start()] if match else text
    for token in _TOKEN.finditer(where):
        if token["some"] is not None:
            return _entry(error, text, data, kind, path)
        step: Union[str, int] = token["name"] if token["name"] is not None else int(token["index"])
        kind = _child(kind, step)
        path = (*path, step)
        data = data[step]
    return _explain(error, text, data, kind, path)


def _entry(error: msgspec.ValidationError, text: str, data: Any, kind: Any, path: Path) -> Mistake:
    """The first entry of a mapping that does not convert by itself."""
    value_kind = _child(kind, None)
    for key, value in data.items():
        try:
            msgspec.convert(value, value_kind, dec_hook=dec_hook)
        except msgspec.ValidationError as inner:
            return _locate(inner, value, value_kind, (*path, key))
    return Mistake(path, text)


def _members(kind: Any) -> Tuple[Any, ...]:
    if typing.get_origin(kind) in (Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _child(kind: Any, step: Union[str, int, None]) -> Any:
    """The type of a field (by its name in the file), of a list's items (by number), of a mapping's values (None)."""
    for member in _members(kind):
        if isinstance(step, str):
            if isinstance(member, type) and issubclass(member, msgspec.Struct):
                names = dict(zip(member.__struct_encode_fields__, member.__struct_fields__))
                return typing.get_type_hints(member)[names[step]]
        elif typing.get_origin(member) is (dict if step is None else tuple):
            return typing.get_args(member)[1 if step is None else 0]
    return Any


def _struct(kind: Any) -> Optional[typing.Type[msgspec.Struct]]:
    for member in _members(kind):
        if isinstance(member, type) and issubclass(member, msgspec.Struct):
            return member
    return None


def _explain(error: msgspec.ValidationError, text: str, data: Any, kind: Any, path: Path) -> Mistake:
    struct = _struct(kind)
    match = _UNKNOWN.match(text)
    if match and struct is not None:
        return Mistake((*path, match.group(1)), _unknown_field(struct, match.group(1)), True)
    match = _MISSING.match(text)
    if match and struct is not None:
        return Mistake((*path, match.group(1)), f"missing{_example(struct, match.group(1))}")
    match = _WRONG.match(text)
    if match:
        expected = [_WORDS.get(word, word) for word in match.group(1).split(" | ") if word != "null"]
        quote = " (quote it)" if expected == ["text"] and isinstance(data, (int, float)) else ""
        if data is None:
            fields = f" of {choices(struct.__struct_encode_fields__)}" if struct is not None else ""
            return Mistake(path, f"found nothing, expected {' or '.join(expected)}{fields}")
        return Mistake(path, f"found {shown(data)}, expected {' or '.join(expected)}{quote}")
    match = _BOUND.match(text)
    if match:
        return Mistake(path, f"found {shown(data)}, expected {_bounded(match)}")
    match = _LENGTH.match(text)
    if match:
        return Mistake(path, in_words(text))
    if _ENUM.match(text):
        known = [str(value) for value in _literals(kind) if value != ""]
        if int in _members(kind):
            return Mistake(path, f"found {shown(data)}, expected a whole number or {choices(known)}")
        return Mistake(path, unknown("value", str(data), known))
    cause = error.__cause__
    if isinstance(cause, UnitError):
        near = nearest(cause.unit, cause.known) if cause.unit else ""
        return Mistake(path, f"{cause}{f' (did you mean {shown(near)}?)' if near else ''}")
    return Mistake(path, " ".join(text.replace("`", "").split()))


def _literals(kind: Any) -> List[Any]:
    return [
        value for member in _members(kind) if typing.get_origin(member) is Literal for value in typing.get_args(member)
    ]


def _unknown_field(struct: typing.Type[msgspec.Struct], name: str) -> str:
    known = struct.__struct_encode_fields__
    what = "kind of step" if struct is Step else "kind of fault" if struct is Fault else "field"
    if struct is Step and name in Body.__struct_encode_fields__:
        return f"{name} belongs inside the step: '- move: {{..., {name}: ...}}'"
    return unknown(what, name, known)


def _example(struct: typing.Type[msgspec.Struct], name: str) -> str:
    """What the missing field should be, if its type says so."""
    kind = _child(struct, name)
    words = {
        "Duration": ", expected a duration such as '2 leases'",
        "Size": ", expected a size such as '2 GiB'",
        "Tokens": ", expected a number of tokens such as '4096 tokens'",
        "str": ", expected text",
        "int": ", expected a whole number",
        "float": ", expected a number",
    }
    if struct is Scenario and name == "instances":
        return ", expected at least one instance such as 'a: {locations: {LocalCPUBackend: 2 GiB}}'"
    if name in ("at", "from", "to"):
        return ", expected instance/location such as 'a/LocalCPUBackend'"
    return words.get(getattr(kind, "__name__", ""), "")
