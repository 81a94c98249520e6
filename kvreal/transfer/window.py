"""The window: how a process knows who may touch its memory, and when nobody does any more.

Whoever moves bytes asks for a window on a connection to the process whose memory it touches: it says who it is and
which life of that process it means; the copy may begin when that is granted. The window is open until its owner says
END, which it does once nothing of it is in flight, or until the connection ends. One-sided transports (NIXL) cannot be
refused by their target otherwise: memory stays writable even after it was deregistered. The kernel closes a dead
process's connections only after its last thread has gone, so the end of a connection is proof that its writer has
stopped. Windows follow one another on a connection, so that the next copy need not make one. Messages are plain
integers and strings; nothing is unpickled.

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
from typing import Callable, Dict, Final, List, Optional, Tuple

import msgspec

from kvreal.slab import Place
from kvreal.spans import Ints, unpacked
from kvreal.transfer.frames import Answering, Stranger, TransferError
from kvreal.transfer.workers import punctual

END: Final = b"E"
"""From who moves the bytes: nothing of this window is in flight any more."""
OVER: Final = b"K"
"""From who is touched: nothing of it can land any more; the next Hello may come."""
WRONG: Final = b"X"
"""Instead of OVER: what was written is not what its checksums say."""
REVOKE: Final = b"R"
"""From who is touched: stop."""
HELLO_TIMEOUT_S: float = 10.0
MAX_HELLO: int = 4 << 20
MAX_STRANGERS: int = 128
"""Connections that have not been granted or refused yet; more are hung up on."""


class AddressTaken(TransferError):
    """Where copies should be listened for cannot be had."""


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``kind``: read, write or greet (a first contact that moves nothing). ``slots`` and ``sizes``: of the target's
    memory, and bytes of each, packed (kvreal/spans.py). ``by``: the transport that carries them. ``layout``: what the
    asker knows of where that memory lies. ``part`` of ``parts``: which of a copy's windows it is, if it has several.
    ``keys``: the chunks', where the memory is a disk or sums are asked for. ``check``: what is summed, all bytes or
    samples, empty for nothing; ``sums``: of what a writer writes, chunk by chunk."""

    token: str
    kind: str
    peer: str
    peer_epoch: int
    to: str
    epoch: int
    location: str = ""
    slots: bytes = b""
    sizes: bytes = b""
    layout: int = -1
    by: str = ""
    part: int = 0
    parts: int = 1
    keys: Tuple[bytes, ...] = ()
    check: str = ""
    sums: Tuple[int, ...] = ()


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
    at: bytes = b""
    """Addresses of the slots, packed, where their location has no order that could be computed with."""
    sums: Tuple[int, ...] = ()
    """Of what is about to be read, where they were asked for."""


_encode = msgspec.msgpack.Encoder().encode
_hello = msgspec.msgpack.Decoder(Hello).decode


class Window:
    """One open connection, seen from the side whose memory is touched: so many bytes of each of its ``slots``."""

    def __init__(self, hello: Hello, sock: socket.socket) -> None:
        """ValueError if there are not as many sizes as slots."""
        self.hello: Hello = hello
        self.slots: Ints = unpacked(hello.slots)
        self.sizes: Ints = unpacked(hello.sizes)
        if len(self.slots) != len(self.sizes):
            raise ValueError(f"{len(self.sizes)} sizes of {len(self.slots)} slots")
        self.sock: socket.socket = sock
        self.granted: bool = False
        self.revoked: bool = False

    def ended(self) -> bool:
        """Wait for its end: True if its owner has said so, False if the connection is gone."""
        while word := self.sock.recv(1):
            if word == END:
                return True
        return False


Prepare = Callable[[Window], Grant]
Serve = Callable[[Window], bytes]
Revoke = Callable[[Window], None]


class WindowServer:
    """Accepts connections, one thread each. ``prepare`` runs before a window is granted (what it raises refuses it) and
    says what is granted; ``serve`` while it is open: the word that answers its END, b"" if the connection is no good
    any more. ``ended`` is called after each end."""

    def __init__(
        self,
        prepare: Prepare,
        serve: Serve,
        revoke: Revoke,
        ended: Callable[[], None],
        at: Tuple[str, int] = ("127.0.0.1", 0),
        unix: str = "",
    ) -> None:
        self.prepare: Prepare = prepare
        self.serve: Serve = serve
        self.revoke: Revoke = revoke
        self.ended: Callable[[], None] = ended
        self.lock: threading.Lock = threading.Lock()
        self.windows: List[Window] = []
        self.socks: List[socket.socket] = []
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
        self.listeners: List[socket.socket] = [self.listener]
        if unix:
            beside = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            beside.bind(unix)
            beside.listen(128)
            self.listeners.append(beside)
        for listener in self.listeners:
            threading.Thread(target=self._accept, args=(listener,), name="windows", daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with self.lock:
                if self.strangers >= MAX_STRANGERS:
                    self.refused += 1
                    sock.close()
                    continue
                secret = self.secret  # as of when it came
                self.strangers += 1
                self.socks.append(sock)
            threading.Thread(target=self._handle, args=(sock, secret), name="window", daemon=True).start()

    def _handle(self, sock: socket.socket, secret: bytes) -> None:
        """One connection: window after window, until something is wrong with it."""
        strange = True
        punctual()
        try:
            with sock:
                dialled = Answering(secret, sock, MAX_HELLO)
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(HELLO_TIMEOUT_S)
                while (window := self._introduced(dialled, strange)) is not None:
                    if strange:
                        self._known()
                        strange = False
                    if not self._one(dialled, window):
                        return
        finally:
            if strange:
                self._known()
            with self.lock:
                self.socks.remove(sock)

    def _known(self) -> None:
        with self.lock:
            self.strangers -= 1

    def _one(self, dialled: Answering, window: Window) -> bool:
        """Carry one window through. True if another may follow on its connection."""
        word = b""
        try:
            word = self._granted(dialled, window)
        except (OSError, TransferError):
            pass  # the other side sees the end of the connection
        finally:
            with self.lock:
                self.windows.remove(window)
            self.ended()  # however it ended: whoever closes the window waits for this
        if word:
            with contextlib.suppress(OSError):
                window.sock.sendall(word)
        return bool(word)

    def _granted(self, dialled: Answering, window: Window) -> bytes:
        try:
            grant = self.prepare(window)
        except Exception as error:
            self.refused += 1
            dialled.send(_encode(Grant(False, str(error))))
            return b""
        dialled.send(_encode(grant))
        with self.lock:
            window.granted = True
            if window.revoked:  # meanwhile: the word must not come before the grant, or into the middle of it
                self.revoke(window)
        return self.serve(window)

    def _introduced(self, dialled: Answering, strange: bool) -> Optional[Window]:
        """The window that is asked for, open; None: refused, whatever was said, or the other side has had enough."""
        sock = dialled.sock
        why = ""
        try:
            if not strange and not self.secret:
                sock.settimeout(None)
                if not sock.recv(1, socket.MSG_PEEK):
                    return None
                sock.settimeout(HELLO_TIMEOUT_S)
            elif not strange:
                sock.settimeout(None)  # it may take its time to answer a challenge
            window = Window(_hello(dialled.read()), sock)
            sock.settimeout(None)
            if dialled.secret != self.secret:
                raise Stranger("came before there was a secret")
            why = self._open(window)
            if not why:
                return window
            dialled.send(_encode(Grant(False, why)))
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            if not strange and isinstance(error, OSError):
                return None
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
        for listener in self.listeners:
            hang_up(listener)
        with self.lock:
            socks = list(self.socks)
        for sock in socks:
            hang_up(sock, close=False)


def _writes(window: Window, peer: str, epoch: int) -> bool:
    hello = window.hello
    return hello.kind == "write" and hello.peer == peer and hello.peer_epoch <= epoch


def hang_up(sock: socket.socket, close: bool = True) -> None:
    """End a connection under whoever is blocked on it."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    if close:
        sock.close()
