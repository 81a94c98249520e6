"""Windows: who is reading or writing this process's memory just now, and how they are told to stop.

Every copy opens one TCP connection to the process whose memory it touches and says who it is and which life of that
process it means; the copy may begin when that is granted, and the window is open for as long as the connection is. One-
sided transports (NIXL) cannot be refused by their target otherwise: memory stays writable even after it was
deregistered. The kernel closes a dead process's connections only after its last thread has gone, so the end of a
connection is proof that its writer has stopped. Messages are plain integers and strings; nothing is unpickled.

Where there are keys (``kvmove keys``) both sides prove first that they have the cluster's secret (frames.py): memory is
granted to this cluster's nodes only, and a peer's metadata, which NIXL's own Python unpickles, comes from such a node
or is not looked at. The bytes of a copy are not encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import threading
from typing import Callable, Dict, List, Optional, Tuple

import msgspec

from kvreal.memory import Place
from kvreal.transfer.frames import Answering, Stranger, TransferError, asked, read_exactly

__all__ = ["Grant", "Hello", "Info", "TransferError", "Window", "WindowServer", "read_exactly"]

HELLO_TIMEOUT_S: float = 10.0
MAX_HELLO: int = 4 << 20
MAX_STRANGERS: int = 128
"""Connections that have not been granted or refused yet; more are hung up on."""


class AddressTaken(TransferError):
    """Where copies should be listened for cannot be had."""


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``kind``: read, write or greet (a first contact that moves nothing). ``spans``: (slot, bytes) of my memory."""

    token: str
    kind: str
    peer: str
    peer_epoch: int
    to: str
    epoch: int
    location: str = ""
    spans: Tuple[Tuple[int, int], ...] = ()
    layout: int = -1


class Info(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to reach this process's memory. ``layout`` rises with every change of it, ``generation`` with those that
    make new metadata necessary."""

    layout: int
    generation: int
    agent: str
    metadata: bytes
    places: Tuple[Place, ...]
    scratch: int


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ok: bool
    why: str = ""
    info: Optional[Info] = None


_encode = msgspec.msgpack.Encoder().encode
_hello = msgspec.msgpack.Decoder(Hello).decode
_grant = msgspec.msgpack.Decoder(Grant).decode


class Window:
    """One open connection, seen from the side whose memory is touched."""

    def __init__(self, hello: Hello, sock: socket.socket) -> None:
        self.hello: Hello = hello
        self.sock: socket.socket = sock
        self.granted: bool = False
        self.revoked: bool = False


Serve = Callable[[Window], None]


class WindowServer:
    """Accepts windows, one thread each. ``prepare`` runs before one is granted, ``serve`` while it is open, ``ended``
    after each end."""

    def __init__(
        self,
        prepare: Serve,
        serve: Serve,
        revoke: Serve,
        info: Callable[[int], Optional[Info]],
        ended: Callable[[], None],
        at: Tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        self.prepare: Serve = prepare
        self.serve: Serve = serve
        self.revoke: Serve = revoke
        self.info: Callable[[int], Optional[Info]] = info
        self.ended: Callable[[], None] = ended
        self.lock: threading.Lock = threading.Lock()
        self.windows: List[Window] = []
        self.closed: Dict[str, int] = {}
        self.token: str = ""
        #: what whoever opens a window must have; b"": nothing but the token
        self.secret: bytes = b""
        self.address: str = ""
        self.epoch: int = 0
        self.refused: int = 0
        self.strangers: int = 0
        self.host: str = at[0]
        try:
            self.listener: socket.socket = socket.create_server(at, backlog=128)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise AddressTaken(f"cannot listen for copies at {at[0]}:{at[1]}: {why}") from error
        self.port: int = self.listener.getsockname()[1]
        self.thread: threading.Thread = threading.Thread(target=self._accept, name="windows", daemon=True)
        self.thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with self.lock:
                if self.strangers >= MAX_STRANGERS:
                    self.refused += 1
                    sock.close()
                    continue
                self.strangers += 1
            threading.Thread(target=self._handle, args=(sock,), name="window", daemon=True).start()

    def _handle(self, sock: socket.socket) -> None:
        with sock:
            try:
                dialled = Answering(self.secret, sock, MAX_HELLO)
                window = self._introduced(dialled)
            finally:
                with self.lock:
                    self.strangers -= 1
            if window is None:
                return
            try:
                self._granted(dialled, window)
            except (OSError, TransferError):
                pass  # the other side sees the end of the connection
            finally:
                with self.lock:
                    self.windows.remove(window)
        self.ended()  # however it ended: whoever closes the window waits for this

    def _granted(self, dialled: Answering, window: Window) -> None:
        try:
            self.prepare(window)
        except Exception as error:
            self.refused += 1
            dialled.send(_encode(Grant(False, str(error))))
            return
        dialled.send(_encode(Grant(True, "", self.info(window.hello.layout))))
        with self.lock:
            window.granted = True
            if window.revoked:  # meanwhile: the word must not come before the grant, or into the middle of it
                self.revoke(window)
        self.serve(window)

    def _introduced(self, dialled: Answering) -> Optional[Window]:
        """The window that is asked for, open; None: refused, whatever was said."""
        sock = dialled.sock
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(HELLO_TIMEOUT_S)
            window = Window(_hello(dialled.read()), sock)
            sock.settimeout(None)
            if dialled.secret != self.secret:
                raise Stranger("came before there was a secret")
            why = self._open(window)
            if not why:
                return window
            dialled.send(_encode(Grant(False, why)))
        except (OSError, ValueError, msgspec.MsgspecError):
            pass
        self.refused += 1
        return None

    def _open(self, window: Window) -> str:
        """Why it is refused, or "" and it is open."""
        hello = window.hello
        with self.lock:
            if not self.token or not hmac.compare_digest(hello.token.encode(), self.token.encode()):
                return "another run's copy"
            if hello.to != self.address:
                return f"this is {self.address}, not {hello.to}"
            if hello.kind != "greet":
                if hello.epoch != self.epoch or not self.epoch:
                    return f"epoch {hello.epoch} of {hello.to} is over"
                if hello.kind == "write" and hello.peer_epoch <= self.closed.get(hello.peer, 0):
                    return f"the window of {hello.peer} is closed"
            self.windows.append(window)
        return ""

    def begin(self, token: str, address: str) -> None:
        """A new run: whoever still comes from an older one is refused."""
        with self.lock:
            self.token, self.address, self.epoch, self.closed = token, address, 0, {}

    def set_epoch(self, epoch: int) -> None:
        """Windows that were opened to an older life of this process are revoked."""
        with self.lock:
            self.epoch = epoch
            for window in self.windows:
                if window.hello.kind != "greet" and window.hello.epoch != epoch:
                    self._revoke(window)

    def close(self, peer: str, epoch: int) -> None:
        """Refuse every further write of (peer, epoch) and revoke those that are open; see ``writers``."""
        with self.lock:
            self.closed[peer] = max(epoch, self.closed.get(peer, 0))
            for window in self.windows:
                if _writes(window, peer, epoch):
                    self._revoke(window)

    def _revoke(self, window: Window) -> None:
        if not window.revoked:
            window.revoked = True
            if window.granted:
                self.revoke(window)

    def writers(self, peer: str, epoch: int) -> int:
        """How many windows through which (peer, epoch) may still write are open."""
        with self.lock:
            return sum(_writes(window, peer, epoch) for window in self.windows)

    def stop(self) -> None:
        hang_up(self.listener)
        with self.lock:
            windows = list(self.windows)
        for window in windows:
            hang_up(window.sock, close=False)


def _writes(window: Window, peer: str, epoch: int) -> bool:
    hello = window.hello
    return hello.kind == "write" and hello.peer == peer and hello.peer_epoch <= epoch


def hang_up(sock: socket.socket, close: bool = True) -> None:
    """End a connection under whoever is blocked on it."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    if close:
        sock.close()


def split_endpoint(endpoint: str) -> Tuple[str, str, int, str]:
    """(transport, host, port, process) of an endpoint string; TransferError for anything else."""
    parts = endpoint.split("|")
    if len(parts) != 4 or not parts[2].isdigit():
        raise TransferError(f"no endpoint: {endpoint!r}")
    return parts[0], parts[1], int(parts[2]), parts[3]


def open_window(sock: socket.socket, hello: Hello, secret: bytes = b"") -> Grant:
    """Ask for a window on a connected socket. TransferError if it is refused, OSError if the peer hangs up."""
    try:
        grant = _grant(asked(sock, _encode(hello), secret, hello.to, HELLO_TIMEOUT_S))
    except msgspec.MsgspecError as error:
        raise TransferError(f"no grant from {hello.to}: {error}") from error
    if not grant.ok:
        raise TransferError(f"refused by {hello.to}: {grant.why}")
    return grant
