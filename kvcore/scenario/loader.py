"""Scenario files: YAML text to ``Scenario`` and back. Every mistake is one line: file, line, column, field."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path as FilePath
from typing import Any, Callable, Dict, Final, List, Optional, Sequence, Set, Tuple, Type, TypeVar, Union

import msgspec
import yaml

from kvcore.scenario import located, short, valid
from kvcore.scenario.editor import json_schema
from kvcore.scenario.mistake import Mistake, Path, path_text, shown
from kvcore.scenario.schema import Body, Scenario
from kvcore.scenario.units import Quantity, Tokens

__all__ = ["ScenarioError", "dump", "json_schema", "load", "load_as", "load_data", "loads"]

T = TypeVar("T", bound=msgspec.Struct)

BYTES_MAX: Final = 1 << 20
"""A scenario file says little; bigger workloads come from generators."""
DEPTH_MAX: Final = 20
_OPTION: Final = "--set "


class ScenarioError(Exception):
    """One mistake. ``line`` and ``column`` count from 1; 0: of the whole file, or of an override."""

    def __init__(self, file: str, line: int, column: int, field: str, text: str) -> None:
        where = f"{file}:{line}:{column}" if line else file
        super().__init__(f"{where}: {field}: {text}" if field else f"{where}: {text}")
        self.file: str = file
        self.line: int = line
        self.column: int = column
        self.field: str = field
        self.text: str = text


# ---- YAML as scenario files use it: no aliases, no tags; only true, false, null and decimal numbers are not text
_RESOLVERS: Final = (
    ("tag:yaml.org,2002:bool", re.compile(r"(?:true|false|True|False)\Z"), "tfTF"),
    ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z"), "~nN\0"),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9][0-9_]*\Z"), "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?\Z"),
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: Dict[str, List[Tuple[str, Any]]] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(
                None, None, "found an anchor or alias, expected each value in full", event.start_mark
            )
        if self.level >= DEPTH_MAX:
            raise yaml.MarkedYAMLError(None, None, f"nested more than {DEPTH_MAX} deep", event.start_mark)
        self.level += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.level -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes what either this loader or any other would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> Any:
        """Line breaks and what cannot be seen are escaped: folded over lines, blanks beside them would be lost."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, [letter.strip("\0") for letter in _first])
    _Dumper.add_implicit_resolver(_tag, _pattern, [letter.strip("\0") for letter in _first])


class _Text:
    """Plain data of a YAML text, and where each value and each name stands in it."""

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.values: Dict[Path, Tuple[int, int]] = {}
        self.keys: Dict[Path, Tuple[int, int]] = {}

    def parse(self, text: str) -> Any:
        """ScenarioError for what is not YAML, or is a part of it that scenario files do without."""
        try:
            loader = _Loader(text)
            try:
                node = loader.get_single_node()
            finally:
                loader.dispose()
        except yaml.reader.ReaderError as error:
            before = text[: error.position]
            line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
            raise ScenarioError(self.name, line, column, "", f"not YAML: the character U+{_code(error):04X}") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
            what = " ".join(str(error.problem or error.context or "cannot be read").split())
            raise ScenarioError(self.name, line, column, "", f"not YAML as scenarios use it: {what}") from None
        return None if node is None else self._plain(node, ())

    def _plain(self, node: Any, path: Path) -> Any:
        mark = node.start_mark
        self.values[path] = (mark.line + 1, mark.column + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self._plain(item, (*path, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        raise self._error(node, path, f"unknown tag {shown(node.tag)}, expected a plain value")

    def _mapping(self, node: Any, path: Path) -> Dict[str, Any]:
        data: Dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, path, "found a list or mapping as a name, expected text")
            key = key_node.value
            where = (*path, key)
            if key_node.tag != "tag:yaml.org,2002:str":
                raise self._error(
                    key_node, where, f"found {key_node.value or 'nothing'} as a name, expected text (quote it)"
                )
            if key in data:
                line, _ = self.keys[where]
                raise self._error(key_node, where, f"is given twice, first in line {line}")
            self.keys[where] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            data[key] = self._plain(value_node, where)
        return data

    def _scalar(self, node: Any, path: Path) -> Any:
        kind = node.tag.rpartition(":")[2]
        text = node.value
        if kind == "str":
            return text
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind == "int" and re.fullmatch(r"[-+]?[0-9][0-9_]*", text):
            if len(text) > 24:
                raise self._error(node, path, f"found a number of {len(text)} digits, expected at most 24")
            return int(text.replace("_", "").rstrip() or "0")
        if kind == "float":
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if math.isfinite(number):
                return number
            raise self._error(node, path, f"found {shown(text)}, expected a number")
        raise self._error(node, path, f"unknown tag {shown(node.tag)}, expected a plain value")

    def _error(self, node: Any, path: Path, text: str) -> ScenarioError:
        mark = node.start_mark
        return ScenarioError(self.name, mark.line + 1, mark.column + 1, path_text(path), text)


def _code(error: Any) -> int:
    return error.character if isinstance(error.character, int) else ord(error.character)


# ---- reading --------------------------------------------------------------------------------------------------------
def load(path: Union[str, FilePath], overrides: Sequence[str] = ()) -> Scenario:
    """Read a file. ``overrides``: ``path=value``, as ``--set kv.chunk='128 tokens'`` has it."""
    return loads(_read(path), str(path), overrides)


def load_data(path: Union[str, FilePath]) -> Any:
    """The plain data of another YAML file (a profile), under the same rules. ScenarioError if it cannot be read."""
    return _Text(str(path)).parse(_read(path).removeprefix("\ufeff"))


def _read(path: Union[str, FilePath]) -> str:
    name = str(path)
    try:
        with open(path, "rb") as file:
            data = file.read(BYTES_MAX + 1)
    except OSError as error:
        raise ScenarioError(name, 0, 0, "", f"cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise ScenarioError(shown(name), 0, 0, "", "cannot be read: not a file's name") from None
    if len(data) > BYTES_MAX:
        raise ScenarioError(name, 0, 0, "", f"is larger than {BYTES_MAX} bytes, expected a scenario; use a workload")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        raise ScenarioError(name, line, column, "", f"not text in UTF-8: the byte 0x{data[error.start]:02X}") from None


def load_as(
    path: Union[str, FilePath],
    kind: Type[T],
    sift: Callable[[Dict[str, Any]], Optional[Mistake]],
    added: Optional[Set[Path]] = None,
) -> T:
    """Another YAML file (an instance's) under the same rules, as a struct. ``sift`` takes out what ``kind`` does not
    know, or says what is wrong there; ``added``: what it has put in. ScenarioError names file, line, column and field.
    """
    source = _Text(str(path))
    data = source.parse(_read(path).removeprefix("\ufeff"))
    if not isinstance(data, dict):
        raise ScenarioError(source.name, 1, 1, "", f"found {shown(data)}, expected a mapping")
    result = sift(data) or located.convert_as(data, kind)
    if isinstance(result, Mistake):
        raise _placed(source, result, {}, added or set())
    return result


def loads(text: str, name: str = "scenario", overrides: Sequence[str] = ()) -> Scenario:
    """Read a text; ``name`` stands for the file's in errors."""
    source = _Text(name)
    data = source.parse(text.removeprefix("\ufeff"))
    if data is None:
        raise ScenarioError(name, 1, 1, "", "is empty, expected a scenario: name, instances, steps")
    if not isinstance(data, dict):
        raise ScenarioError(name, 1, 1, "", f"found {shown(data)}, expected a scenario: name, instances, steps")
    said: Dict[Path, str] = {}
    for override in overrides:
        said[_override(data, override)] = override
    added = short.lengthen(data)
    result = located.convert(data)
    if isinstance(result, Scenario):
        mistake = valid.check(result)
        if mistake is None:
            return result
    else:
        mistake = result
    raise _placed(source, mistake, said, added)


def _placed(source: _Text, mistake: Mistake, said: Dict[Path, str], added: Set[Path]) -> ScenarioError:
    """Where a mistake is: in an override, or at the nearest thing around it that is in the file."""
    path = mistake.path
    field = path_text(tuple([part for i, part in enumerate(path) if path[: i + 1] not in added]))
    for end in range(len(path), 0, -1):
        if path[:end] in said:
            return ScenarioError(_OPTION + _said(said[path[:end]]), 0, 0, field, mistake.text)
    inside = [override for at, override in said.items() if at[: len(path)] == path]
    seen = tuple([part for i, part in enumerate(path) if path[: i + 1] not in added])
    tables = (source.keys, source.values) if mistake.at_key else (source.values, source.keys)
    for end in range(len(seen), -1, -1):
        for table in tables:
            if seen[:end] in table:
                if end < len(seen) and inside:
                    return ScenarioError(_OPTION + _said(inside[-1]), 0, 0, field, mistake.text)
                line, column = table[seen[:end]]
                return ScenarioError(source.name, line, column, field, mistake.text)
    return ScenarioError(source.name, 1, 1, field, mistake.text)


def _said(override: str) -> str:
    """An override as the user wrote it, in quotes and on one line."""
    return repr(override if len(override) <= 120 else override[:117] + "...")


def _override(data: Dict[str, Any], override: str) -> Path:
    """Put the value in; returns the path it has. ScenarioError names the override."""
    name = _OPTION + _said(override)
    left, equals, right = override.partition("=")
    left = left.strip()
    if not equals or not left:
        raise ScenarioError(name, 0, 0, "", "expected path=value such as kv.chunk='128 tokens'")
    try:
        value = _Text(name).parse(right)
    except ScenarioError as error:
        raise ScenarioError(name, 0, 0, left, error.text) from None
    container: Any = data
    path: Path = ()
    rest = left
    while True:
        key, rest = _segment(container, rest)
        try:
            step: Any = _item(container, key) if isinstance(container, list) else key
        except IndexError as error:
            raise ScenarioError(name, 0, 0, path_text(path), str(error)) from None
        path = (*path, step)
        if not rest:
            container[step] = value
            return path
        inner = container.get(step) if isinstance(container, dict) else container[step]
        if inner is None:
            inner = container[step] = {}
        if not isinstance(inner, (dict, list)):
            raise ScenarioError(name, 0, 0, path_text(path), f"is {shown(inner)} in the file and has no fields")
        container = inner


def _item(items: List[Any], key: str) -> int:
    """The number of an item that is there; IndexError in words otherwise."""
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    expected = f"expected 0 to {len(items) - 1}" if items else "the list is empty"
    raise IndexError(f"has no item {shown(key)}, {expected}")


def _segment(container: Any, rest: str) -> Tuple[str, str]:
    """(name, what follows it). A name that is there may have dots inside; ``steps[0]`` is ``steps.0``."""
    rest = re.sub(r"^\[(\d+)\](?:\.|$|(?=\[))", r"\1.", rest).removesuffix(".") if rest.startswith("[") else rest
    if isinstance(container, dict):
        for key in sorted(container, key=len, reverse=True):
            if rest == key:
                return key, ""
            if rest.startswith((f"{key}.", f"{key}[")):
                return key, rest[len(key) :].removeprefix(".")
    match = re.match(r"([^.\[]*)(?:\.|(?=\[)|$)", rest)
    cut = match.end() if match else len(rest)
    return (match.group(1) if match else rest), rest[cut:]


# ---- writing --------------------------------------------------------------------------------------------------------
def dump(scenario: Scenario) -> str:
    """A scenario as YAML that a person can read: short forms, one line a step. ``loads(dump(x)) == x``."""
    node = _Dumper(io.StringIO(), sort_keys=False).represent_data(short.shorten(_plain(scenario)))
    _lay_out(node, 0)
    return str(yaml.serialize(node, Dumper=_Dumper, width=118, allow_unicode=True))


def _plain(value: Any) -> Any:
    """Structs as mappings without what is as usual, what every step may say last; quantities as text."""
    if isinstance(value, msgspec.Struct):
        fields = msgspec.structs.fields(value)
        if isinstance(value, Body):
            common = Body.__struct_fields__
            fields = (*[f for f in fields if f.name not in common], *[f for f in fields if f.name in common])
        data: Dict[str, Any] = {}
        for field in fields:
            inner = getattr(value, field.name)
            if field.required or inner != _default(field):
                data[field.encode_name] = _plain(inner)
        return data
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Tokens) and not value.chunks:
        return value.number
    return str(value) if isinstance(value, Quantity) else value


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default


def _lay_out(node: Any, depth: int) -> None:
    """Top level, and its entries, on lines of their own; what is inside them in braces."""
    if isinstance(node, yaml.MappingNode):
        node.flow_style = depth >= 2
        for key, value in node.value:
            _lay_out(value, depth + (1 if key.value not in ("kv", "constants", "workload") else 2))
    elif isinstance(node, yaml.SequenceNode):
        node.flow_style = depth >= 2 or all(isinstance(item, yaml.ScalarNode) for item in node.value)
        for item in node.value:
            _lay_out(item, depth)
