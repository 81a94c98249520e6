"""Node processes on another machine: the runner's side of ``kvmove peer`` (kvreal/lend.py).

    with Borrowed(("10.0.0.2", 7000), secret) as there:
        run(built, pool=Pool(bind=there.mine, secret=secret), elsewhere={"b": there})

Histories carry the runner's clock: the other machine's is compared once, over the fastest of some exchanges, which is
as exact as that exchange's two ways were equally long.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Dict, Final, Iterable, Iterator, List, Optional, Tuple, Type
from urllib.parse import urlsplit

import msgspec

from kvreal import control as c
from kvreal import lend
from kvreal.pool import Host, HostError, Lender
from kvreal.transfer import available
from kvreal.transfer.frames import TransferError, ask, read_challenge, read_message, send_message, told

TIMEOUT_S: Final = 10.0
SSH_TIMEOUT_S: Final = 60.0
EXCHANGES: Final = 20
SSH: Final = "KVMOVE_SSH"
"""In the environment: the command that stands for ssh."""

_ADDRESS: Final = re.compile(rb"([0-9A-Za-z.-]+):([0-9]{1,5})")

_first_answer: Final = msgspec.msgpack.Decoder(lend.FirstAnswer).decode
_answered: Final = msgspec.msgpack.Decoder(lend.Answered).decode


class PeerError(Exception):
    """One line: which peer cannot be used, and why."""


class BorrowedHost(Host):
    """A node process of the peer's, called ``number``."""

    def __init__(self, pool: Borrowed, number: int, sock: socket.socket) -> None:
        self.sock: socket.socket = sock
        self.write_fd: int = os.dup(sock.fileno())
        super().__init__(pool, 0, c.Pipe(sock.fileno(), self.write_fd, c.FromHost))
        self.borrowed: Borrowed = pool
        self.number: int = number
        self.gone: bool = False
        self.said: str = ""

    def _seen(self, question: lend.Word) -> lend.Seen:
        """A peer that is not there any more has no living nodes."""
        try:
            answer = self.borrowed.ask(question)
        except HostError as error:
            return lend.Seen(False, False, str(error))
        return answer if isinstance(answer, lend.Seen) else lend.Seen(False)

    def alive(self) -> bool:
        return not self.gone and self._seen(lend.Look(self.number)).alive

    def status(self) -> str:
        return self.said or self._seen(lend.Look(self.number)).status

    def send_signal(self, number: int) -> None:
        if not self.gone:
            self._seen(lend.Signal(self.number, number))

    def kill(self) -> None:
        if not self.gone:
            self.said = self._seen(lend.Signal(self.number, signal.SIGKILL, True)).status
            self.gone = True
            self.sock.close()
            os.close(self.write_fd)

    def stopped(self) -> bool:
        return not self.gone and self._seen(lend.Look(self.number)).stopped


class Borrowed(Lender):
    """One loan of the peer at ``address``. PeerError if it is not there, has not the secret, or is another version."""

    def __init__(
        self, address: Tuple[str, int], secret: bytes, transport: str = "auto", env: Optional[Dict[str, str]] = None
    ) -> None:
        super().__init__()
        self.address: Tuple[str, int] = address
        self.name: str = f"peer {address[0]}:{address[1]}"
        self.secret: bytes = secret
        self.env: Dict[str, str] = env or {}
        self.lock: threading.Lock = threading.Lock()
        self.count: int = 0
        self.lost: str = ""
        self.sock, answer = self._dial(lend.Borrow(lend.PROTOCOL, lend.version()))
        if not isinstance(answer, lend.Lent):
            raise PeerError(f"{self.name}: it does not lend")
        self.loan: lend.Lent = answer
        #: the address of this machine that the peer sees
        self.mine: str = self.sock.getsockname()[0]
        self.transport: str = self._both(transport)
        self.clock_ns = self._compare_clocks()

    def _both(self, transport: str) -> str:
        """``auto`` stays that where both ends have the same; else the first of mine that the peer has too."""
        here, there = available(), self.loan.transports
        if transport == "auto" and tuple(here) == tuple(there):
            return transport
        both = [name for name in (here if transport == "auto" else [transport]) if lend.needs(name) in there]
        if not both:
            raise PeerError(f"{self.name}: transport {transport}: it has only {', '.join(there)}")
        return both[0]

    def _dial(self, first: lend.Word) -> Tuple[socket.socket, lend.Word]:
        try:
            sock = socket.create_connection(self.address, TIMEOUT_S)
        except OSError as error:
            raise PeerError(f"{self.name}: cannot be reached: {error.strerror or error}") from error
        try:
            lend.watch_over(sock)
            answer = _first_answer(prove(sock, lend.encode(first), self.secret, self.name))
        except (OSError, TransferError, msgspec.MsgspecError, ValueError) as error:
            sock.close()
            hung_up = isinstance(error, ConnectionError)
            raise PeerError(f"{self.name}: {'it does not know our secret' if hung_up else error}") from error
        if isinstance(answer, lend.Declined):
            sock.close()
            raise PeerError(f"{self.name}: {answer.why}")
        return sock, answer

    def ask(self, question: lend.Word) -> lend.Word:
        """HostError if it gives no answer."""
        with self.lock:
            try:
                self.sock.settimeout(TIMEOUT_S)
                send_message(self.sock, lend.encode(question))
                answer: lend.Word = _answered(read_message(self.sock, 2 * lend.PIECE_BYTES))
            except (OSError, msgspec.MsgspecError) as error:
                self.lost = self.lost or self._why(error)
                self.sock.close()  # a late answer would be taken for the next one's
                raise HostError(f"{self.name} gives no answer: {self.lost}") from error
        if isinstance(answer, lend.Declined):
            raise HostError(f"{self.name}: {answer.why}")
        return answer

    @staticmethod
    def _why(error: Exception) -> str:
        """Why the loan's connection ended, in words."""
        if isinstance(error, TimeoutError):
            return f"nothing was heard of it for {lend.SILENCE_S if error.errno else TIMEOUT_S:.0f} s"
        return "it has hung up" if isinstance(error, ConnectionError) else str(error)

    def _compare_clocks(self) -> int:
        best: Optional[Tuple[int, int]] = None
        for _ in range(EXCHANGES):
            before = time.monotonic_ns()
            reading = self.ask(lend.Clock())
            after = time.monotonic_ns()
            assert isinstance(reading, lend.Reading)
            if best is None or after - before < best[0]:
                best = (after - before, reading.ns - (before + after) // 2)
        assert best is not None
        return best[1]

    # ---- what a lender implements
    def start(self) -> Host:
        self.count += 1
        try:
            sock, _ = self._dial(lend.Start(self.loan.loan, self.count, self.transport, self.env))
        except PeerError as error:
            raise HostError(str(error)) from error
        return BorrowedHost(self, self.count, sock)

    def path(self, local: Path) -> str:
        return f"{self.loan.folder}/{_flat(local)}"

    def bring(self, local: Path) -> None:
        with local.open("wb") as file:
            while data := self._piece(_flat(local), file.tell()):
                file.write(data)
        if not local.stat().st_size:
            local.unlink()

    def _piece(self, name: str, offset: int) -> bytes:
        answer = self.ask(lend.Bring(name, offset))
        assert isinstance(answer, lend.Piece)
        return answer.data

    def close(self) -> None:
        super().close()
        self.sock.close()


def prove(sock: socket.socket, body: bytes, secret: bytes, who: str) -> bytes:
    """Each side proves that it has the secret; the answer to ``body``. TransferError: it has not."""
    theirs = read_challenge(sock, who)
    return told(sock, secret, theirs, ask(sock, body, secret, theirs), who)


def _flat(local: Path) -> str:
    """A name of its own for each run: its folder's is."""
    return f"{local.parent.name}-{local.name}"


# ---- addresses -------------------------------------------------------------------------------------------------------
class Away:
    """A peer as ``--peer`` names it: ``[INSTANCE=]tcp://HOST:PORT`` or ``[INSTANCE=]ssh://[USER@]HOST[:PORT][/KVMOVE]``.
    PeerError for anything else. For ssh ``with`` starts the peer there, and ends it."""

    def __init__(self, text: str, secret: bytes = b"") -> None:
        self.text: str = text
        name, found, url = text.partition("=")
        self.instance: str = name if found else ""
        parts = urlsplit(url if found else text)
        try:
            port = parts.port
        except ValueError:
            port = -1
        expected = "expected [INSTANCE=]tcp://HOST:PORT or [INSTANCE=]ssh://[USER@]HOST[:PORT][/PATH/TO/kvmove]"
        if parts.scheme not in ("tcp", "ssh") or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise PeerError(f"--peer {text}: {expected}")
        if parts.scheme == "tcp" and (port is None or parts.path not in ("", "/")):
            raise PeerError(f"--peer {text}: {expected}")
        self.by_ssh: bool = parts.scheme == "ssh"
        self.login: str = f"{parts.username}@{parts.hostname}" if parts.username else parts.hostname
        self.host: str = parts.hostname
        self.port: int = port or 0
        self.command: str = parts.path.rstrip("/") or "kvmove"
        self.secret: bytes = secret
        self.process: Optional[subprocess.Popen[bytes]] = None
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> Away:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        process = self.process
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()  # the peer ends with it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TIMEOUT_S)
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdout.close()
        self.errors.close()

    def borrow(self, transport: str, env: Optional[Dict[str, str]] = None) -> Borrowed:
        if self.by_ssh:
            self.secret = self.secret or os.urandom(32)
            return Borrowed(self._by_ssh(), self.secret, transport, env)
        if not self.secret:
            raise PeerError(f"--peer {self.text}: expected --peer-token FILE, the one that its `kvmove peer` has")
        return Borrowed((self.host, self.port), self.secret, transport, env)

    def _by_ssh(self) -> Tuple[str, int]:
        """Start it there, tell it a fresh secret, hear where it listens. It ends when its standard input does."""
        ssh = shlex.split(os.environ.get(SSH, "ssh"))
        port = ["-p", str(self.port)] if self.port else []
        python = Path(self.command).name.startswith("python")
        kvmove = [self.command, "-m", "kvmove"] if python else [self.command]
        there = shlex.join([*kvmove, "peer", "--listen", "ssh", "--token", "-"])
        # -4: nodes listen on IPv4 addresses, and the one by which ssh came in is the one that is known to work
        options = ["-4", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={TIMEOUT_S:.0f}"]
        try:
            self.process = subprocess.Popen(
                [*ssh, *options, *port, self.login, there],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            raise PeerError(f"--peer {self.text}: cannot run {ssh[0]}: {error.strerror}") from error
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(self.secret.hex().encode() + b"\n")
        said: List[Tuple[str, int]] = []
        stdout = self.process.stdout
        reader = threading.Thread(target=lambda: said.extend(_announced(stdout)), daemon=True)
        reader.start()
        reader.join(SSH_TIMEOUT_S)
        if not said:
            raise PeerError(f"--peer {self.text}: no peer was started there: {self._complaint()}")
        return said[0]

    def _complaint(self) -> str:
        """What ssh or the other side said last, and what helps against it."""
        assert self.process is not None
        status: Optional[int] = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self.process.wait(1.0)
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        last = lines[-1].strip().removeprefix("kvmove: ") if lines else ""
        if status is None:
            return f"{last or 'it says nothing'}, after {SSH_TIMEOUT_S:.0f} s"
        path = "ssh://[USER@]HOST[:PORT]/PATH/TO/kvmove, or to the python of its environment"
        if status in (126, 127):  # a shell's: it cannot be run, it is not there
            return f"{last or f'{self.command} cannot be run'}; expected {path}"
        if "No module named kvmove" in last:
            return f"{last}; it takes pip install 'kvmove[real]' there"
        if "Host key verification failed" in last:
            return f"{last} Its key is not known here, or has changed: `ssh {self.login}` once by hand tells which"
        if "Permission denied" in last:
            return f"{last} Expected a key that it lets in without asking; passwords are not asked for"
        return last or f"ssh ended with status {status} and said nothing"


def _announced(lines: Iterable[bytes]) -> Iterator[Tuple[str, int]]:
    """The address that a peer prints, behind whatever a login there prints before it."""
    for line in lines:
        found = _ADDRESS.fullmatch(line.strip())
        if found:
            yield found[1].decode(), int(found[2])
            return


def place(aways: List[Away], instances: List[str]) -> List[str]:
    """The instance of each: as it is named, else the last ones in order. PeerError if that cannot be."""
    named = [away.instance for away in aways if away.instance]
    for away in aways:
        if away.instance and away.instance not in instances:
            raise PeerError(f"--peer {away.text}: no instance {away.instance}, expected one of {', '.join(instances)}")
        if named.count(away.instance) > 1:
            raise PeerError(f"--peer {away.text}: {away.instance} has a peer already")
    free = [name for name in instances if name not in named]
    unnamed = len(aways) - len(named)
    if unnamed > len(free):
        raise PeerError(f"--peer: {len(aways)} peers for {len(instances)} instances")
    rest = iter(free[len(free) - unnamed :])
    return [away.instance or next(rest) for away in aways]


# ---- the secret ------------------------------------------------------------------------------------------------------
def secret_of(text: bytes, what: str) -> bytes:
    """32 bytes from a token. PeerError if it is short enough to be guessed."""
    token = text.strip()
    if len(token) < 16:
        raise PeerError(f"{what}: a token of {len(token)} characters, expected at least 16")
    return hashlib.blake2b(token, digest_size=32, person=b"kvmove peer").digest()


def read_token(path: Path, make: bool = False) -> bytes:
    """The secret of a token's file; ``make``: write a new one if it is not there."""
    try:
        if make and not path.exists():
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(os.urandom(32).hex().encode() + b"\n")
        if path.stat().st_mode & 0o007:
            raise PeerError(f"{path}: everyone on this machine can use it: chmod 600 it")
        return secret_of(path.read_bytes(), str(path))
    except OSError as error:
        raise PeerError(f"{path}: cannot read the token: {error.strerror}") from error
