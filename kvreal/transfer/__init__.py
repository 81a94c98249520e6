"""Transports: what carries the bytes of a copy. ``make`` gives a process those it asks for, behind one Transfer."""

from __future__ import annotations

import importlib.util
from typing import Dict, Final, List, Tuple

from kvreal.memory import Memory
from kvreal.transfer.base import Make, Transfer
from kvreal.transfer.carrier import Carrier
from kvreal.transfer.flow import Flow
from kvreal.transfer.frames import TransferError

__all__ = ["NAMES", "Transfer", "TransferError", "available", "make", "resolve"]

NAMES: Final[Tuple[str, ...]] = ("auto", "nixl", "socket", "tcp")
"""``tcp`` is ``socket`` that uses no Unix sockets."""


def available() -> List[str]:
    """The transports that can run here, the preferred one first. Looks for nixl without importing it."""
    found = ["socket"]
    if importlib.util.find_spec("nixl") is not None and importlib.util.find_spec("nixl_meta_utils") is not None:
        found.insert(0, "nixl")
    return found


def resolve(name: str) -> List[str]:
    """The transports that a process has which is told ``name``: all that can run here for ``auto``, else that one.
    TransferError names what is missing."""
    if name not in NAMES:
        raise TransferError(f"unknown transport {name!r}, expected one of {', '.join(NAMES)}")
    here = available()
    if name == "auto":
        return here
    if name != "tcp" and name not in here:
        raise TransferError(f"transport {name} asked for, but the package {name} is not installed (pip install nixl)")
    return [name]


def _nixl(memory: Memory, process: str, flow: Flow) -> Carrier:
    from kvreal.transfer.nixl import NixlCarrier

    return NixlCarrier(memory, process, flow)


def _socket(memory: Memory, process: str, flow: Flow) -> Carrier:
    from kvreal.transfer.sockets import SocketCarrier

    return SocketCarrier(memory, process, flow)


def _tcp(memory: Memory, process: str, flow: Flow) -> Carrier:
    carrier = _socket(memory, process, flow)
    carrier.unix = False
    return carrier


_MAKES: Final[Dict[str, Make]] = {"nixl": _nixl, "socket": _socket, "tcp": _tcp}


def make(name: str, memory: Memory, at: Tuple[str, int] = ("127.0.0.1", 0)) -> Transfer:
    """The transports of this process over ``memory``; peers reach it ``at`` (host, port; 0: any).

    NIXL's agent takes about half a second to create."""
    return Transfer(memory, {one: _MAKES[one] for one in resolve(name)}, at)
