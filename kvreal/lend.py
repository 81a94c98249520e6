"""``kvmove peer``: a waiting process that lends itself as a pool of node processes to runs elsewhere.

Every connection begins with a proof, both ways, that the other side has the secret (kvreal/transfer/frames.py); whoever
has it not is hung up on, unread. A borrower's first connection is its *loan*: it asks for signals, for the clock and
for what nodes have written. Each further one becomes a node: the new process has the connection as its standard input
and output, so that runner and node speak over it as over a pipe. When the loan's connection ends, however it does, all
that belongs to it is killed and removed.

The nodes' own listeners have the same secret: their control messages are encrypted (CURVE), their windows ask for the
proof, and the bytes of copies travel in the clear.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Callable, Dict, Final, List, Tuple, Union

import msgspec

from kvreal.pool import HostError, Spawner, host_command, is_stopped
from kvreal.slab import provides
from kvreal.transfer import available
from kvreal.transfer.frames import Answering, read_message, send_message

PROTOCOL: Final = 1
PROVE_TIMEOUT_S: Final = 10.0
MAX_FIRST: Final = 1 << 20
MAX_STRANGERS: Final = 32
"""Connections that have proved nothing yet; more are hung up on."""
MAX_NODES: Final = 256
"""Processes lent at a time."""
PIECE_BYTES: Final = 8 << 20
SILENCE_S: Final = 20
"""After which a connection to a machine that is not heard any more is over."""
#: What a borrower may set of a node's environment: what its transports read, by the beginning of its name.
SETTABLE: Final = ("UCX_", "NIXL_", "KVMOVE_", "MC_", "CUDA_VISIBLE_DEVICES")
FOLDER: Final = "kvmove-peer-"
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,200}")


class LendError(Exception):
    """One line: why nothing can be lent."""


class Word(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all that is said on a loan's connections."""


# ---- the first word of a connection, and its answer
class Borrow(Word, frozen=True):
    """Begin a loan."""

    protocol: int
    version: str


class Lent(Word, frozen=True):
    """``loan``: names it; ``folder``: where its nodes may write; ``address``: where this side is reached."""

    loan: str
    folder: str
    address: str
    transports: Tuple[str, ...]
    provides: Tuple[str, ...]


class Start(Word, frozen=True):
    """This connection becomes a node's, called ``number`` from now on."""

    loan: str
    number: int
    transport: str
    env: Dict[str, str] = {}


class Starting(Word, frozen=True):
    pass


class Declined(Word, frozen=True):
    why: str


# ---- what is asked on a loan's own connection, and its answers
class Clock(Word, frozen=True):
    pass


class Reading(Word, frozen=True):
    """The monotonic clock's, ns."""

    ns: int


class Signal(Word, frozen=True):
    """``reap``: answer once it has ended."""

    number: int
    signal: int
    reap: bool = False


class Look(Word, frozen=True):
    number: int


class Seen(Word, frozen=True):
    """``status``: of one that has ended. ``stopped``: by SIGSTOP."""

    alive: bool
    stopped: bool = False
    status: str = ""


class Bring(Word, frozen=True):
    """What a node wrote into its folder under ``name``, from ``offset`` on: PIECE_BYTES at most."""

    name: str
    offset: int


class Piece(Word, frozen=True):
    data: bytes


First = Union[Borrow, Start]
FirstAnswer = Union[Lent, Starting, Declined]
Asked = Union[Clock, Signal, Look, Bring]
Answered = Union[Reading, Seen, Piece, Declined]

encode: Final = msgspec.msgpack.Encoder().encode
_first: Final = msgspec.msgpack.Decoder(First).decode
_asked: Final = msgspec.msgpack.Decoder(Asked).decode


def watch_over(sock: socket.socket) -> None:
    """A connection of a loan ends also when the other machine, or the way to it, goes without a word."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S // 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)  # with words under way


def version() -> str:
    try:
        return importlib.metadata.version("kvmove")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def needs(transport: str) -> str:
    """What must be ``available`` for it."""
    return "socket" if transport == "tcp" else transport


class Loan:
    """One borrower's: its nodes and its folder."""

    def __init__(self, spawner: Spawner, secret: bytes, address: str) -> None:
        self.name: str = uuid.uuid4().hex
        self.spawner: Spawner = spawner
        self.secret: bytes = secret
        self.address: str = address
        self.folder: Path = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-"))
        self.lock: threading.Lock = threading.Lock()
        self.nodes: Dict[int, subprocess.Popen[bytes]] = {}
        self.over: bool = False

    def start(self, asked: Start, sock: socket.socket) -> None:
        """A node at the other end of ``sock``. HostError if there can be none."""
        process = self.spawner.popen(
            host_command(asked.transport, self.address), dict(asked.env), self.secret, sock.fileno(), sock.fileno()
        )
        with self.lock:
            self.nodes[asked.number] = process
            late = self.over
        if late:
            self.end()

    def answer(self, asked: Word) -> Word:
        if isinstance(asked, Clock):
            return Reading(time.monotonic_ns())
        if isinstance(asked, Bring):
            return self._piece(asked)
        process = self.nodes.get(getattr(asked, "number", -1))
        if process is None:
            return Declined(f"no node {getattr(asked, 'number', -1)} was lent")
        if isinstance(asked, Signal):
            if process.poll() is None:
                process.send_signal(asked.signal)
            if asked.reap:
                process.wait()
        if process.poll() is None:
            return Seen(True, is_stopped(process.pid))
        return Seen(False, False, f"exit status {process.returncode}")

    def _piece(self, asked: Bring) -> Word:
        """Of its own folder only."""
        if not _NAME.fullmatch(asked.name) or asked.name.startswith("."):
            return Declined(f"{asked.name!r} is no file's name")
        try:
            with (self.folder / asked.name).open("rb") as file:
                file.seek(asked.offset)
                return Piece(file.read(PIECE_BYTES))
        except FileNotFoundError:
            return Piece(b"")
        except (OSError, ValueError, OverflowError) as error:
            return Declined(f"cannot read {asked.name}: {error}")

    def end(self) -> None:
        """Kill and reap all nodes, remove the folder. May be called again."""
        with self.lock:
            self.over = True
            nodes = list(self.nodes.values())
        for process in nodes:
            if process.poll() is None:
                process.kill()
        for process in nodes:
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _sweep() -> None:
    """Remove the folders of peers that were killed, which could not do it themselves."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*-*"):
        pid = folder.name.removeprefix(FOLDER).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


class Peer:
    """Listens, and lends. ``secret``: what borrowers must have; never empty."""

    def __init__(self, host: str, port: int, secret: bytes, say: Callable[[str], None] = lambda text: None) -> None:
        if not secret:
            raise LendError("nothing is lent without a secret")
        self.secret: bytes = secret
        self.say: Callable[[str], None] = say
        self.spawner: Spawner = Spawner()
        self.lock: threading.Lock = threading.Lock()
        self.loans: Dict[str, Loan] = {}
        self.strangers: int = 0
        try:
            self.listener: socket.socket = socket.create_server((host, port), backlog=64)
        except OSError as error:
            raise LendError(f"cannot listen at {host}:{port}: {os.strerror(error.errno or 0)}") from error
        self.address: Tuple[str, int] = self.listener.getsockname()[:2]
        _sweep()
        self.wake: Tuple[int, int] = os.pipe()

    def serve(self, also: int = -1) -> None:
        """Until ``stop``, or until ``also`` (a file descriptor) can be read."""
        watched: List[int] = [self.listener.fileno(), self.wake[0], *([also] if also >= 0 else [])]
        while True:
            ready, _, _ = select.select(watched, [], [])
            if self.wake[0] in ready or (also >= 0 and also in ready):
                return
            with contextlib.suppress(OSError):
                sock, who = self.listener.accept()
                self._admit(sock, f"{who[0]}:{who[1]}")

    def _admit(self, sock: socket.socket, who: str) -> None:
        with self.lock:
            full = self.strangers >= MAX_STRANGERS
            self.strangers += not full
        if full:
            sock.close()
            return
        threading.Thread(target=self._introduce, args=(sock, who), name=f"peer {who}", daemon=True).start()

    def _introduce(self, sock: socket.socket, who: str) -> None:
        with sock:
            try:
                sock.settimeout(PROVE_TIMEOUT_S)
                watch_over(sock)
                dialled = Answering(self.secret, sock, MAX_FIRST)
                first = _first(dialled.read())
                sock.settimeout(None)
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                self.say(f"refused {who}: {error}")
                return
            finally:
                with self.lock:
                    self.strangers -= 1
            try:
                if isinstance(first, Borrow):
                    self._lend(dialled, first, who)
                else:
                    self._start(dialled, first)
            except (OSError, HostError) as error:
                self.say(f"{who}: {error}")

    def _start(self, dialled: Answering, asked: Start) -> None:
        loan = self.loans.get(asked.loan)
        unset = [name for name in asked.env if not name.startswith(SETTABLE)]
        if loan is None:
            dialled.send(encode(Declined("that loan is over")))
        elif unset:
            dialled.send(encode(Declined(f"{', '.join(unset)} may not be set here")))
        elif asked.number in loan.nodes or sum(len(one.nodes) for one in self.loans.values()) >= MAX_NODES:
            dialled.send(encode(Declined(f"node {asked.number} was lent already, or {MAX_NODES} are")))
        else:
            dialled.send(encode(Starting()))  # before it can say anything itself
            loan.start(asked, dialled.sock)

    def _lend(self, dialled: Answering, asked: Borrow, who: str) -> None:
        if (asked.protocol, asked.version) != (PROTOCOL, version()):
            dialled.send(encode(Declined(f"it has kvmove {version()}, this is kvmove {asked.version}")))
            return
        loan = Loan(self.spawner, self.secret, dialled.sock.getsockname()[0])
        with self.lock:
            self.loans[loan.name] = loan
        self.say(f"lent to {who}")
        try:
            dialled.send(
                encode(Lent(loan.name, str(loan.folder), loan.address, tuple(available()), tuple(provides())))
            )
            while True:
                send_message(dialled.sock, encode(loan.answer(_asked(read_message(dialled.sock, MAX_FIRST)))))
        except (OSError, msgspec.MsgspecError):
            pass  # however a loan ends, what follows is the same
        finally:
            loan.end()
            with self.lock:
                del self.loans[loan.name]
            self.say(f"{who} is done, with {len(loan.nodes)} processes")

    def stop(self) -> None:
        """From anywhere, a signal's handler too."""
        with contextlib.suppress(OSError):
            os.write(self.wake[1], b"x")

    def close(self) -> None:
        """Everything lent is killed and removed."""
        self.listener.close()
        with self.lock:
            loans = list(self.loans.values())
        for loan in loans:
            loan.end()
        self.spawner.close()


def serve(peer: Peer, also: int = -1) -> None:
    """Lend until SIGTERM, SIGHUP or Ctrl-C, or until ``also`` can be read; then take everything back."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: peer.stop())
    try:
        peer.serve(also)
    finally:
        peer.close()
