"""Connections to peers, kept open: asking for a window then costs a message and not a connection.

On one line windows follow one another. Whoever moves the bytes ends a window with END, which it may say only once
whatever it has posted has ended; the other side answers OVER when nothing of that window can land any more. A line on
which anything went wrong is closed, and the end of the connection is the end of its window.
"""

from __future__ import annotations

import functools
import socket
import threading
from typing import Callable, Dict, Final, List, Optional, Tuple

import msgspec

from kvreal.transfer.frames import TransferError, ask, read_challenge, read_exactly, told
from kvreal.transfer.window import END, HELLO_TIMEOUT_S, OVER, REVOKE, Grant, Hello

KEPT: Final = 4
"""Idle lines to one process."""

_encode: Final = msgspec.msgpack.Encoder().encode
_grant: Final = msgspec.msgpack.Decoder(Grant).decode


class Endpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a process's memory is reached, and by what: ``kvmove|host|port|process|card,card:detail...``"""

    host: str
    port: int
    process: str
    cards: Tuple[Tuple[str, str], ...]

    def card(self, name: str) -> Optional[str]:
        """What the peer's transport of this name says of itself; None: it has none."""
        return next((detail for one, detail in self.cards if one == name), None)

    def text(self) -> str:
        cards = ",".join(f"{name}:{detail}" if detail else name for name, detail in self.cards)
        return f"kvmove|{self.host}|{self.port}|{self.process}|{cards}"


@functools.lru_cache(1024)
def parse(endpoint: str) -> Endpoint:
    """TransferError for anything that is no endpoint."""
    parts = endpoint.split("|")
    if len(parts) != 5 or parts[0] != "kvmove" or not parts[2].isdigit():
        raise TransferError(f"no endpoint: {endpoint!r}")
    cards = []
    for card in parts[4].split(","):
        name, _, detail = card.partition(":")
        cards.append((name, detail))
    return Endpoint(parts[1], int(parts[2]), parts[3], tuple(cards))


def unix_name(process: str) -> str:
    """The abstract Unix address on which a process listens beside its TCP port. Its network namespace is part of it."""
    return f"\0kvmove-{process}"


class Line:
    """One connection, dialled by this process."""

    def __init__(self, sock: socket.socket, process: str) -> None:
        self.sock: socket.socket = sock
        self.process: str = process
        self.unheard: bool = False
        """An OVER is on its way that nobody has read."""

    @property
    def unix(self) -> bool:
        return self.sock.family == socket.AF_UNIX

    def open(self, hello: Hello, secret: bytes, meanwhile: Callable[[], None] = lambda: None) -> Grant:
        """Ask for a window; ``meanwhile`` runs while the peer makes up its answer. TransferError if it is refused,
        OSError if the peer hangs up."""
        try:
            grant = _grant(self._asked(_encode(hello), secret, hello.to, meanwhile))
        except msgspec.MsgspecError as error:
            raise TransferError(f"no grant from {hello.to}: {error}") from error
        if not grant.ok:
            raise TransferError(f"refused by {hello.to}: {grant.why}")
        return grant

    def _asked(self, hello: bytes, secret: bytes, who: str, meanwhile: Callable[[], None]) -> bytes:
        if not secret:
            ask(self.sock, hello, b"", b"")
            meanwhile()
            self.settle()
            return told(self.sock, b"", b"", b"", who)
        self.settle()
        self.sock.settimeout(HELLO_TIMEOUT_S)
        theirs = read_challenge(self.sock, who)
        ours = ask(self.sock, hello, secret, theirs)
        meanwhile()
        body = told(self.sock, secret, theirs, ours, who)
        self.sock.settimeout(None)
        return body

    def end(self) -> None:
        """The window is over; its OVER is read when the line is next needed."""
        self.sock.sendall(END)
        self.unheard = True

    def settle(self) -> bytes:
        """Read the OVER of the window before, if it has not been read."""
        word = OVER
        while self.unheard:
            word = read_exactly(self.sock, 1)
            if word != REVOKE:  # one that came too late
                self.unheard = False
        return word

    def close(self) -> None:
        self.sock.close()


class Lines:
    """The idle lines of this process, by peer. Any thread."""

    def __init__(self) -> None:
        self.lock: threading.Lock = threading.Lock()
        self.idle: Dict[str, List[Line]] = {}

    def take(self, process: str) -> Optional[Line]:
        """An idle line that has not been hung up on."""
        while True:
            with self.lock:
                lines = self.idle.get(process)
                line = lines.pop() if lines else None
            if line is None or not _gone(line):
                return line
            line.close()

    def give(self, line: Line) -> None:
        with self.lock:
            lines = self.idle.setdefault(line.process, [])
            if len(lines) < KEPT:
                lines.append(line)
                return
        line.close()

    def forget(self, process: str = "") -> None:
        """Close what is idle, of one process or of all."""
        with self.lock:
            gone = self.idle.pop(process, []) if process else [line for some in self.idle.values() for line in some]
            if not process:
                self.idle = {}
        for line in gone:
            line.close()


def dial(endpoint: Endpoint, unix: bool) -> Line:
    """A new connection; OSError. By Unix socket where the process is on this host and ``unix`` allows it."""
    if unix:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(unix_name(endpoint.process))
            return Line(sock, endpoint.process)
        except OSError:  # not on this host, or in another network namespace
            sock.close()
    sock = socket.create_connection((endpoint.host, endpoint.port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return Line(sock, endpoint.process)


def _gone(line: Line) -> bool:
    """The peer has hung up on it."""
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
    try:
        return not line.sock.recv(1, flags)
    except BlockingIOError:
        return False
    except OSError:
        return True

