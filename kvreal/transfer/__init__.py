"""Transports: what carries the bytes of a copy. ``make`` gives a process those it asks for, behind one Transfer.

Others add theirs under the entry point group ``kvmove.transports``: a name, and what makes a Carrier from (memory,
process, flow), which a Carrier's class itself does. ``kvreal.transfer.conformance`` tests one; docs/transports.md.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Dict, Final, List, Tuple, cast

from kvreal.memory import Memory
from kvreal.transfer.base import Make, Transfer
from kvreal.transfer.carrier import Carrier
from kvreal.transfer.choice import profile_from
from kvreal.transfer.flow import Flow
from kvreal.transfer.frames import TransferError

__all__ = ["GROUP", "NAMES", "Transfer", "TransferError", "available", "here", "lacking", "make", "names", "resolve"]

GROUP: Final = "kvmove.transports"
NAMES: Final[Tuple[str, ...]] = ("auto", "arena", "nixl", "mooncake", "socket", "tcp")
"""Ours. ``tcp`` is ``socket`` that uses no Unix sockets."""
PACKAGES: Final[Dict[str, str]] = {"nixl": "pip install nixl", "mooncake": "pip install 'kvmove[mooncake]'"}
"""What some of them need, and what adds it."""
ALONE: Final = ("socket", "tcp")
"""These reach every location; any other takes ``socket`` along for those that it does not reach, such as disks."""


@lru_cache(maxsize=1)
def _others() -> Dict[str, EntryPoint]:
    """Transports that other packages bring. One that has a name of ours is left out: a file means ours by it."""
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in NAMES}


def names() -> Tuple[str, ...]:
    """All that a file may name: ours, and those of other packages that are installed."""
    return (*NAMES, *sorted(_others()))


def available() -> List[str]:
    """The transports that can run here, the preferred one first. Looks for their libraries without importing them."""
    found = []
    if importlib.util.find_spec("nixl") is not None and importlib.util.find_spec("nixl_meta_utils") is not None:
        found.append("nixl")
    return [*found, *sorted(_others()), "socket"]


def resolve(name: str) -> List[str]:
    """The transports that a process has which is told ``name``: all that can run here for ``auto``, else that one.
    ``module:name`` is one that no package brings yet. TransferError names what is missing."""
    if ":" not in name and name not in names():
        raise TransferError(f"unknown transport {name!r}, expected one of {', '.join(names())}")
    here = available()
    if name == "auto":
        return here
    if (name == "nixl" and name not in here) or (name == "mooncake" and importlib.util.find_spec(name) is None):
        raise TransferError(f"transport {name} asked for, but the package {name} is not installed ({PACKAGES[name]})")
    return [name] if name in ALONE else [name, "socket"]


def lacking(name: str) -> str:
    """What ``name`` lacks to run here; empty: nothing that can be told without trying it."""
    try:
        resolve(name)
    except TransferError as error:
        return str(error)
    return ""


def here() -> Dict[str, str]:
    """Every transport but ``auto`` -> what it lacks here; what ``auto`` takes first comes first."""
    every = dict.fromkeys((*available(), *names()))
    return {name: lacking(name) for name in every if name != "auto"}


def _arena(memory: Memory, process: str, flow: Flow) -> Carrier:
    from kvreal.transfer.arena import ArenaCarrier

    return ArenaCarrier(memory, process, flow)


def _nixl(memory: Memory, process: str, flow: Flow) -> Carrier:
    from kvreal.transfer.nixl import NixlCarrier

    return NixlCarrier(memory, process, flow)


def _mooncake(memory: Memory, process: str, flow: Flow, host: str = "127.0.0.1") -> Carrier:
    from kvreal.transfer.mooncake import MooncakeCarrier

    return MooncakeCarrier(memory, process, flow, host)


def _socket(memory: Memory, process: str, flow: Flow) -> Carrier:
    from kvreal.transfer.sockets import SocketCarrier

    return SocketCarrier(memory, process, flow)


def _tcp(memory: Memory, process: str, flow: Flow) -> Carrier:
    carrier = _socket(memory, process, flow)
    carrier.unix = False
    return carrier


_OURS: Final[Dict[str, Make]] = {"arena": _arena, "nixl": _nixl, "mooncake": _mooncake, "socket": _socket, "tcp": _tcp}


def _make_of(name: str) -> Make:
    """What makes the carrier of this name; whatever is wrong with another package's is said when it is called."""
    if name in _OURS:
        return _OURS[name]

    def make(memory: Memory, process: str, flow: Flow) -> Carrier:
        carrier = _loaded(name)(memory, process, flow)
        if not isinstance(carrier, Carrier) or not carrier.name:
            raise TransferError(f"transport {name}: found {type(carrier).__name__}, expected a Carrier with a name")
        return carrier

    return make


def _loaded(name: str) -> Make:
    module, _, attribute = name.partition(":")
    try:
        made: Any = getattr(importlib.import_module(module), attribute) if attribute else _others()[name].load()
    except Exception as error:
        raise TransferError(f"transport {name} cannot be loaded: {type(error).__name__}: {error}") from error
    return cast(Make, made)


def make(name: str, memory: Memory, at: Tuple[str, int] = ("127.0.0.1", 0), profile: str = "") -> Transfer:
    """The transports of this process over ``memory``; peers reach it ``at`` (host, port; 0: any). ``profile``: the path
    of the one that says which is the fastest, and in which direction; none: what KVMOVE_PROFILE names.

    NIXL's agent takes about half a second to create."""
    wanted = [*(["arena"] if name == "auto" and memory.arena else []), *resolve(name)]
    measured = profile_from(profile)
    makes = {one: _make_of(one) for one in wanted}
    if name == "mooncake":
        makes[name] = partial(_mooncake, host=at[0])
    made = Transfer(memory, makes, at)
    if name != "auto" and wanted[0] in made.lacking:
        made.stop()
        raise TransferError(made.lacking[wanted[0]])
    made.auto = name == "auto"
    made.profile = measured
    return made
