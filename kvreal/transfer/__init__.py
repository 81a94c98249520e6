"""Transports: what carries the bytes of a copy. All stand behind ``base.Transfer``; ``make`` picks one by name."""

from __future__ import annotations

import importlib.util
from typing import List, Tuple

from kvreal.memory import Memory
from kvreal.transfer.base import Transfer, TransferError

__all__ = ["NAMES", "Transfer", "TransferError", "available", "make", "resolve"]

NAMES: Tuple[str, ...] = ("auto", "nixl", "tcp")


def available() -> List[str]:
    """The transports that can run here, fastest first. Looks for nixl without importing it."""
    found = ["tcp"]
    if importlib.util.find_spec("nixl") is not None and importlib.util.find_spec("nixl_meta_utils") is not None:
        found.insert(0, "nixl")
    return found


def resolve(name: str) -> str:
    """``auto`` -> the fastest that can run here. TransferError names what is missing."""
    if name not in NAMES:
        raise TransferError(f"unknown transport {name!r}, expected one of {', '.join(NAMES)}")
    here = available()
    if name == "auto":
        return here[0]
    if name not in here:
        raise TransferError(f"transport {name} asked for, but the package {name} is not installed (pip install nixl)")
    return name


def make(name: str, memory: Memory, at: Tuple[str, int] = ("127.0.0.1", 0)) -> Transfer:
    """A transport of this process over ``memory``; peers reach it ``at`` (host, port; 0: any).

    NIXL's agent takes about half a second to create."""
    if resolve(name) == "nixl":
        from kvreal.transfer.nixl import NixlTransfer

        return NixlTransfer(memory, at=at)
    from kvreal.transfer.tcp import TcpTransfer

    return TcpTransfer(memory, at)
