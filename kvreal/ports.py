"""Ports for processes that are told theirs before they start."""

from __future__ import annotations

import contextlib
import random
import socket
from typing import Dict, Final, List

LOWEST: Final = 20_000
HIGHEST: Final = 32_000
"""Below those that the system gives to outgoing connections and to whoever asks: a process may bind its own half
a minute later, and again in its next life."""


def free_ports(count: int) -> List[int]:
    """Different ones of this host that nobody listens at now."""
    found: Dict[int, None] = {}
    while len(found) < count:
        port = random.randrange(LOWEST, HIGHEST)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found[port] = None
    return list(found)


def free_port() -> int:
    return free_ports(1)[0]
