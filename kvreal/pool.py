"""Child processes, started once and used for many runs: creating a NIXL agent alone takes half a second.

    with Pool(transport="auto") as pool:
        run(built, pool=pool)

Whatever happens, ``close`` (or the end of the with block, or of the process) leaves no child behind. ``Lender`` is what
runs need of a pool; kvreal/borrow.py has one whose children live on another machine.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Dict, Final, List, Optional, Sequence, Tuple, Type

from kvreal import control as c
from kvreal.facts import child_environment
from kvreal.transfer import TransferError, resolve
from kvreal.transfer.choice import VARIABLE, profile_from

START_TIMEOUT_S: Final = 60.0
LOOPBACK: Final = "127.0.0.1"


class HostError(Exception):
    """A child process could not be started, or ended on its own; the message says what it said."""


class Host:
    """One child: the channel to it, and what may be done to it."""

    def __init__(self, pool: Lender, pid: int, pipe: c.Pipe) -> None:
        self.pool: Lender = pool
        self.pid: int = pid
        self.pipe: c.Pipe = pipe
        self.transport: str = ""
        self.used: int = 0

    def alive(self) -> bool:
        raise NotImplementedError

    def status(self) -> str:
        """How it ended, once it has."""
        raise NotImplementedError

    def send_signal(self, number: int) -> None:
        """Nothing if it has gone."""
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL, reap, close the channel. May be called again."""
        raise NotImplementedError

    def stopped(self) -> bool:
        """Whether the kernel has it stopped (SIGSTOP)."""
        raise NotImplementedError


class HostProcess(Host):
    """A child of this process, at the other end of a pipe."""

    def __init__(self, pool: Lender, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        super().__init__(pool, process.pid, c.Pipe(process.stdout.fileno(), process.stdin.fileno(), c.FromHost))
        self.process: subprocess.Popen[bytes] = process

    def alive(self) -> bool:
        return self.process.poll() is None

    def status(self) -> str:
        return f"exit status {self.process.returncode}"

    def send_signal(self, number: int) -> None:
        """Only to a child that has not been reaped: its pid is then still its own."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def stopped(self) -> bool:
        return is_stopped(self.pid)


def is_stopped(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")


class Lender:
    """``take`` gives ready hosts, idle ones first; ``give_back`` keeps those that are clean."""

    #: Their clock's reading less this process's, at one instant, ns.
    clock_ns: int = 0

    def __init__(self) -> None:
        self.idle: List[Host] = []
        self.all: List[Host] = []
        self.closed: bool = False

    def __enter__(self: Any) -> Any:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    # ---- what a lender implements
    def start(self) -> Host:
        """A new child, which has not said Ready yet. HostError if it cannot be had."""
        raise NotImplementedError

    def path(self, local: Path) -> str:
        """Where a child is to write what this process will look for at ``local``."""
        raise NotImplementedError

    def bring(self, local: Path) -> None:
        """What a child wrote at ``path(local)`` is at ``local`` now, if it wrote anything."""
        raise NotImplementedError

    # ---- hosts
    def take(self, count: int) -> List[Host]:
        """``count`` hosts that have said Ready. HostError if one cannot start; those that did stay in the pool."""
        found: List[Host] = []
        while self.idle and len(found) < count:
            host = self.idle.pop()
            if host.alive():
                found.append(host)
            else:
                self.discard(host)
        try:
            fresh = [self.spawn() for _ in range(count - len(found))]
            for host in fresh:
                self.await_ready(host)
        except BaseException:
            self.idle += found
            raise
        for host in found + fresh:
            host.used += 1
        return found + fresh

    def spare(self) -> Host:
        """One host at once: an idle one, or one that is still starting (see ``await_ready``)."""
        while self.idle:
            host = self.idle.pop()
            if host.alive():
                return host
            self.discard(host)
        return self.spawn()

    def warm(self, count: int) -> None:
        """Have at least ``count`` idle hosts."""
        missing = count - len(self.idle)
        if missing > 0:
            fresh = [self.spawn() for _ in range(missing)]
            for host in fresh:
                self.await_ready(host)
            self.idle += fresh

    def give_back(self, host: Host, clean: bool) -> None:
        if clean and not self.closed and host.alive():
            self.idle.append(host)
        else:
            self.discard(host)

    def discard(self, host: Host) -> None:
        host.kill()
        if host in self.all:
            self.all.remove(host)

    def spawn(self) -> Host:
        if self.closed:
            raise HostError("the pool is closed")
        host = self.start()
        self.all.append(host)
        return host

    def await_ready(self, host: Host) -> None:
        """Wait until a fresh child has said Ready."""
        until = time.monotonic() + START_TIMEOUT_S
        while not host.transport:
            left = until - time.monotonic()
            ready, _, _ = select.select([host.pipe.read_fd], [], [], max(0.0, left))
            if not ready:
                self.discard(host)
                raise HostError(f"a child process was not ready within {START_TIMEOUT_S:.0f} s")
            for message in host.pipe.hear():
                if isinstance(message, c.Ready):
                    host.transport = message.transport
                elif isinstance(message, c.Failed):
                    self.discard(host)
                    raise TransferError(message.text)
            if host.pipe.ended and not host.transport:
                self.discard(host)
                raise HostError(f"a child process ended at once, {host.status()}")

    # ---- the end
    def close(self) -> None:
        """Kill and reap every child. May be called again, and from anywhere."""
        self.closed = True
        for host in self.all:
            host.send_signal(signal.SIGKILL)
        for host in list(self.all):
            self.discard(host)
        self.idle = []


class Pool(Lender):
    """Of this machine. ``bind``: the address at which its children listen; where others could reach it, ``secret`` is
    what they must have to be heard."""

    def __init__(
        self, transport: str = "auto", env: Optional[Dict[str, str]] = None, bind: str = LOOPBACK, secret: bytes = b""
    ) -> None:
        super().__init__()
        resolve(transport)  # what cannot be had is said here, not by a process that dies of it
        self.transport: str = transport
        self.env: Dict[str, str] = dict(env or {})
        if VARIABLE not in self.env and profile_from() is None:
            self.env[VARIABLE] = ""  # one of another machine is told of here, and not by each child
        self.bind: str = bind
        self.secret: bytes = secret
        self.spawner: Spawner = Spawner()

    def start(self) -> Host:
        process = self.spawner.popen(
            host_command(self.transport, self.bind), self.env, self.secret, subprocess.PIPE, subprocess.PIPE
        )
        return HostProcess(self, process)

    def path(self, local: Path) -> str:
        return str(local)

    def bring(self, local: Path) -> None:
        pass  # it is there

    def close(self) -> None:
        super().close()
        self.spawner.close()


def host_command(transport: str, bind: str) -> List[str]:
    return [
        sys.executable, "-m", "kvreal.host", "--transport", transport, "--parent", str(os.getpid()), "--bind", bind,
    ]  # fmt: skip


class Spawner:
    """Starts children in a thread of its own, because the kernel kills a child when the *thread* that started it ends.
    """

    def __init__(self) -> None:
        self.orders: List[Callable[[], None]] = []
        self.wanted: threading.Condition = threading.Condition()
        self.thread: Optional[threading.Thread] = None
        self.closed: bool = False

    def popen(
        self, command: Sequence[str], env: Dict[str, str], secret: bytes, stdin: int, stdout: int
    ) -> subprocess.Popen[bytes]:
        """A host's process. HostError if there can be none. ``secret`` goes through a pipe: no list of processes and no
        environment shows it."""
        done = threading.Event()
        result: List[subprocess.Popen[bytes]] = []
        errors: List[BaseException] = []

        def start() -> None:
            try:
                result.append(_popen(command, env, secret, stdin, stdout))
            except BaseException as error:  # handed to whoever asked
                errors.append(error)
            done.set()

        with self.wanted:
            if self.thread is None:
                self.thread = threading.Thread(target=self._loop, name="spawner", daemon=True)
                self.thread.start()
            self.orders.append(start)
            self.wanted.notify()
        done.wait()
        if errors:
            raise HostError(f"cannot start a child process: {errors[0]}") from errors[0]
        return result[0]

    def _loop(self) -> None:
        # Ctrl-C reaches the whole group, and is the runner's to decide on: children inherit that from their first
        # instruction on, not only once they have imported enough to say so themselves.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        while True:
            with self.wanted:
                while not self.orders:
                    if self.closed:
                        return
                    self.wanted.wait()
                order = self.orders.pop(0)
            order()

    def close(self) -> None:
        """No more children; those that still live are killed by the kernel."""
        self.closed = True
        with self.wanted:
            self.wanted.notify_all()


def _popen(
    command: Sequence[str], env: Dict[str, str], secret: bytes, stdin: int, stdout: int
) -> subprocess.Popen[bytes]:
    kept: Tuple[int, ...] = ()
    arguments = list(command)
    try:
        if secret:
            kept = os.pipe()
            os.write(kept[1], secret)
            os.close(kept[1])
            kept = kept[:1]
            arguments += ["--secret-fd", str(kept[0])]
        return subprocess.Popen(
            arguments,
            stdin=stdin,
            stdout=stdout,
            bufsize=0,
            pass_fds=kept,
            env=child_environment(env),
        )
    finally:
        for fd in kept:
            os.close(fd)
