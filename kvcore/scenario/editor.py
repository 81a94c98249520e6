"""The JSON Schema of scenario files, so that editors complete and check them while they are written."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any, Dict, Final, List, Literal, Tuple, Type, Union

import msgspec

from kvcore.scenario import short
from kvcore.scenario.mistake import Path
from kvcore.scenario.schema import MODELS, STEP_KINDS, Scenario
from kvcore.scenario.units import QUANTITIES, known_units
from kvcore.scenario.valid_faults import ENDED, MESSAGES, STARTED

Schema = Dict[str, Any]

_PLAIN: Final[Dict[Any, str]] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_VALUES: Final = "additionalProperties"
#: Names that are good in one field: offered, and checked by valid.py.
_NAMES: Final[Dict[Tuple[str, str], Tuple[str, ...]]] = {
    ("When", "sent"): MESSAGES,
    ("When", "received"): MESSAGES,
    ("When", "started"): STARTED,
    ("When", "ended"): ENDED,
}


def json_schema() -> Schema:
    """JSON Schema (2020-12) of a scenario, with the short forms that files may use."""
    defs: Dict[str, Schema] = {}
    top = _of(Scenario, defs)
    for pattern, field in short.RULES:
        _allow_short(top, defs, pattern, field)
    step = defs["Step"]
    step["maxProperties"] = 1
    defs["Step"] = {"anyOf": [step, {"enum": list(STEP_KINDS)}]}
    defs["Kv"]["properties"]["model"]["examples"] = list(MODELS)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "kvmove scenario",
        **top,
        "$defs": defs,
    }


def _of(kind: Any, defs: Dict[str, Schema]) -> Schema:
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(member, defs) for member in typing.get_args(kind)]}
    if origin is Literal:
        return {"enum": list(typing.get_args(kind))}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(typing.get_args(kind)[1], defs)}
    if origin is tuple:
        return {"type": "array", "items": _of(typing.get_args(kind)[0], defs)}
    if kind in QUANTITIES:
        bare = ["string", "integer"] if kind.__name__ == "Tokens" else ["string"]
        return {"type": bare, "description": f"A number and its unit: {', '.join(known_units(kind))}."}
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if kind.__name__ not in defs:
            defs[kind.__name__] = {}
            defs[kind.__name__] = _of_struct(kind, defs)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    return {"type": _PLAIN[kind]}


def _of_struct(struct: Type[msgspec.Struct], defs: Dict[str, Schema]) -> Schema:
    hints = typing.get_type_hints(struct)
    properties: Dict[str, Schema] = {}
    required: List[str] = []
    for field in msgspec.structs.fields(struct):
        schema = _of(hints[field.name], defs)
        names = _NAMES.get((struct.__name__, field.name))
        properties[field.encode_name] = {"enum": list(names)} if names else schema
        if field.required:
            required.append(field.encode_name)
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    if required:
        schema["required"] = required
    about = inspect.getdoc(struct)
    if about:
        schema["description"] = " ".join(about.replace("``", "`").split())
    return schema


def _allow_short(schema: Schema, defs: Dict[str, Schema], pattern: Path, field: str) -> None:
    """Where ``pattern`` points a plain value will do too."""
    holder = _holder(schema, defs)
    for part in pattern[:-1]:
        holder = _holder(_inside(holder, str(part)), defs)
    name = str(pattern[-1])
    table = holder["properties"] if name != "*" else holder
    key = name if name != "*" else "items" if _is_list(holder) else _VALUES
    kinds = ["string", "integer", "array"] if field == "op" else ["string", "integer"]
    table[key] = {"anyOf": [table[key], {"type": kinds, "description": f"Short for {{{field}: ...}}."}]}


def _inside(holder: Schema, part: str) -> Schema:
    """The schema of a field, of a mapping's values or of a list's items; itself, no copy, as it will be changed."""
    inside: Schema = holder["properties"][part] if part != "*" else holder["items" if _is_list(holder) else _VALUES]
    return inside


def _is_list(holder: Schema) -> bool:
    return bool(holder.get("type") == "array")


def _holder(schema: Schema, defs: Dict[str, Schema]) -> Schema:
    """Follow references and alternatives to the mapping or list itself."""
    if "$ref" in schema:
        return _holder(defs[schema["$ref"].rpartition("/")[2]], defs)
    for choice in schema.get("anyOf", ()):
        found = _holder(choice, defs)
        if found.get("type") in ("object", "array"):
            return found
    return schema
