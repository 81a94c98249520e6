"""Which transport really carried the bytes: asked of what carried them, never of the setting.

NIXL names only its backend (UCX). UCX itself prints, when it first carries out an operation towards a kind of peer,
the table of protocols and lanes that it uses for it (``UCX_PROTO_INFO``); the rows of that table decide every later
operation, by size. A host sends its standard output, to which UCX writes, into a nameless file (memfd) and reads the
table from there: no file is left behind, and a killed process's table is not needed. tests/real holds two independent
witnesses against it: UCX's own count of used protocols (``UCX_PROTO_INFO=used``, printed when an agent ends), and the
kernel's count of bytes that went through this process's TCP sockets (``tcp_bytes``).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
import struct
import sys
from typing import Dict, Final, List, Optional, Tuple

PATTERN: Final = "*remote memory*"
"""As UCX_PROTO_INFO: print the tables of one-sided reads and writes only."""

_LINE = re.compile(r"^\[[^\]]*\] \[[^\]]*\]\s+(.*)$")
_TITLE = re.compile(r"^\| \S+ (self|intra-node|inter-node)\b.* cfg#(\d+)")
_OPERATION = re.compile(r"^\| remote memory (read|write) by")
_ROW = re.compile(r"^\|\s+(?:\d+\s+\|\s+)?(\d+)(?:\.\.(\d+|inf))?\s+\|\s+(.*?)\s+\|\s+(.*?)\s+\|$")

KNOWN_MAX: Final = 256

Row = Tuple[int, float, str]
"""(smallest bytes, largest bytes, lanes) of one protocol's range."""


def redirect_stdout() -> Tuple[int, int]:
    """(the old standard output, a memfd that takes its place). Call before UCX is loaded."""
    sys.stdout.flush()
    old = os.dup(1)
    sink = os.memfd_create("kvreal-ucx")
    os.dup2(sink, 1)
    os.environ.setdefault("UCX_PROTO_INFO", PATTERN)
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")  # what fails is reported as the end of a copy, once
    return old, sink


class Tables:
    """The protocol tables that UCX has printed into ``fd`` so far."""

    def __init__(self, fd: int = -1) -> None:
        self.fd: int = fd
        self.offset: int = 0
        self.rest: str = ""
        self.tables: Dict[Tuple[str, str, str], List[Row]] = {}
        self.known: Dict[Tuple[str, int], str] = {}
        """Answers given since another peer was met: reading what UCX has printed costs more than a small copy."""
        self._where: str = ""
        self._config: str = ""
        self._rows: Optional[List[Row]] = None

    def feed(self, text: str) -> None:
        """Parse what was printed since the last call."""
        self.known.clear()
        lines = (self.rest + text).split("\n")
        self.rest = lines.pop()
        for line in lines:
            match = _LINE.match(line)
            if match is not None:
                self._line(match.group(1))

    def _line(self, line: str) -> None:
        title = _TITLE.match(line)
        if title is not None:
            self._where, self._config, self._rows = title.group(1), title.group(2), None
            return
        operation = _OPERATION.match(line)
        if operation is not None:
            self._rows = self.tables[(self._where, operation.group(1), self._config)] = []
            return
        row = _ROW.match(line)
        if row is not None and self._rows is not None:
            low, high, _, lanes = row.groups()
            top = float("inf") if high == "inf" else float(high or low)
            self._rows.append((int(low), top, lanes))

    def read(self) -> None:
        """Take in what UCX has printed meanwhile: into a file, which C's library writes in large blocks."""
        if self.fd < 0:
            return
        ctypes.CDLL(None).fflush(None)
        size = os.fstat(self.fd).st_size
        if size > self.offset:
            data = os.pread(self.fd, size - self.offset, self.offset)
            self.offset += len(data)
            self.feed(data.decode(errors="replace"))

    def lanes(self, operation: str, nbytes: int) -> str:
        """What carries a ``read`` or ``write`` of ``nbytes`` (one descriptor) to another process: ``cma``, ``tcp``,
        ``rc_mlx5``... ``unknown`` if UCX has said nothing. Peers reached in different ways are all named."""
        known = self.known.get((operation, nbytes))
        if known is not None:
            return known
        self.read()
        found: List[str] = []
        for (where, kind, _), rows in sorted(self.tables.items()):
            if kind != operation or where == "self":
                continue
            for low, high, lanes in rows:
                if low <= nbytes <= high:
                    found += [name for name in _names(lanes) if name not in found]
        text = "+".join(found) or "unknown"
        if len(self.known) > KNOWN_MAX:
            self.known.clear()
        if found:
            self.known[(operation, nbytes)] = text
        return text

    def forget(self) -> None:
        """Another peer is there: it may be reached in another way."""
        self.known.clear()


def _names(lanes: str) -> List[str]:
    """``52% on tcp/lo and 48% on tcp/eth0`` -> [tcp]; ``cma/memory`` -> [cma]."""
    names: List[str] = []
    for name in re.findall(r"([A-Za-z0-9_]+)/[A-Za-z0-9_:.\-]+", lanes):
        if name not in names:
            names.append(name)
    return names


def tcp_bytes() -> int:
    """Bytes that have gone through this process's open TCP sockets, both ways, as the kernel counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError, ValueError, struct.error):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                if sock.type != socket.SOCK_STREAM or sock.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += sum(struct.unpack_from("<QQ", info, 120))  # tcpi_bytes_acked, tcpi_bytes_received
    return total
