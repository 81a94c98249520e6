"""Child processes, started once and used for many runs: creating a NIXL agent alone takes half a second.

    with Pool(transport="auto") as pool:
        run(built, pool=pool)

Whatever happens, ``close`` (or the end of the with block, or of the process) leaves no child behind.
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
from typing import Callable, Dict, Final, List, Optional, Type

from kvreal import control as c
from kvreal.transfer import resolve
from kvreal.transfer.base import TransferError

START_TIMEOUT_S: Final = 60.0
ROOT: Final = Path(__file__).resolve().parents[1]


class HostError(Exception):
    """A child process could not be started, or ended on its own; the message says what it said."""


class HostProcess:
    """One child: its process and the pipe to it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process: subprocess.Popen[bytes] = process
        self.pid: int = process.pid
        self.pipe: c.Pipe = c.Pipe(process.stdout.fileno(), process.stdin.fileno(), c.FromHost)
        self.transport: str = ""
        self.used: int = 0

    def send_signal(self, number: int) -> None:
        """Only to a child that has not been reaped: its pid is then still its own."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, reap, close the pipes. May be called again."""
        self.send_signal(signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def stopped(self) -> bool:
        """Whether the kernel has it stopped (SIGSTOP)."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in ("T", "t")


class Pool:
    """``take`` gives ready hosts, idle ones first; ``give_back`` keeps those that are clean."""

    def __init__(self, transport: str = "auto", env: Optional[Dict[str, str]] = None) -> None:
        self.transport: str = resolve(transport)
        self.env: Dict[str, str] = env or {}
        self.idle: List[HostProcess] = []
        self.all: List[HostProcess] = []
        self.closed: bool = False
        self.orders: List[Callable[[], None]] = []
        self.wanted: threading.Condition = threading.Condition()
        self.thread: Optional[threading.Thread] = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    # ---- hosts
    def take(self, count: int) -> List[HostProcess]:
        """``count`` hosts that have said Ready. HostError if one cannot start; those that did stay in the pool."""
        found: List[HostProcess] = []
        while self.idle and len(found) < count:
            host = self.idle.pop()
            if host.process.poll() is None:
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

    def spare(self) -> HostProcess:
        """One host at once: an idle one, or one that is still starting (see ``await_ready``)."""
        while self.idle:
            host = self.idle.pop()
            if host.process.poll() is None:
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

    def give_back(self, host: HostProcess, clean: bool) -> None:
        if clean and not self.closed and host.process.poll() is None:
            self.idle.append(host)
        else:
            self.discard(host)

    def discard(self, host: HostProcess) -> None:
        host.kill()
        if host in self.all:
            self.all.remove(host)

    def spawn(self) -> HostProcess:
        """Start a child. A thread of the pool's own does it, because the kernel kills a child when the *thread* that
        started it ends."""
        if self.closed:
            raise HostError("the pool is closed")
        done = threading.Event()
        result: List[HostProcess] = []
        errors: List[BaseException] = []

        def start() -> None:
            try:
                result.append(self._popen())
            except BaseException as error:  # handed to whoever asked
                errors.append(error)
            done.set()

        if self.thread is None:
            self.thread = threading.Thread(target=self._spawner, name="spawner", daemon=True)
            self.thread.start()
        with self.wanted:
            self.orders.append(start)
            self.wanted.notify()
        done.wait()
        if errors:
            raise HostError(f"cannot start a child process: {errors[0]}") from errors[0]
        self.all.append(result[0])
        return result[0]

    def _spawner(self) -> None:
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

    def _popen(self) -> HostProcess:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])
        command = [sys.executable, "-m", "kvreal.host", "--transport", self.transport, "--parent", str(os.getpid())]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **self.env, "PYTHONPATH": path},
        )
        return HostProcess(process)

    def await_ready(self, host: HostProcess) -> None:
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
                raise HostError(f"a child process ended at once, exit status {host.process.returncode}")

    # ---- the end
    def close(self) -> None:
        """Kill and reap every child. May be called again, and from anywhere."""
        self.closed = True
        for host in self.all:
            host.send_signal(signal.SIGKILL)
        for host in list(self.all):
            self.discard(host)
        self.idle = []
        with self.wanted:
            self.wanted.notify_all()
