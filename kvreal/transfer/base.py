"""What every transport is: copies that run beside the loop, end exactly once, and can be told to stop.

    transfer.start(copy)             one thread a copy; the loop never waits
    transfer.abort(rid)              ends as stopped, once its writer is known to have stopped (or done, if it won)
    transfer.close_window(peer, e)   answered when nothing of process (peer, e) can land here any more
    transfer.fileno()                readable when ``take()`` has something
    transfer.take()                  [Ended | WindowShut]

A transport implements ``carry`` (its own side), and ``serve`` and ``revoke`` (the side whose memory is touched).
Injected fates (fail, corrupt, stuck, slow, a fraction) are carried out here, alike for every transport.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections import deque
from typing import Deque, Dict, Final, List, Optional, Tuple, Union

from kvcore.protocol.messages import Rid
from kvreal.memory import Bytes, Memory, copy_bytes
from kvreal.transfer.job import Copy, Ended, Fate, Job, Stopped, WindowShut
from kvreal.transfer.window import (
    Grant,
    Hello,
    Info,
    TransferError,
    Window,
    WindowServer,
    hang_up,
    open_window,
    split_endpoint,
)

__all__ = ["Copy", "Ended", "Fate", "Job", "Stopped", "Transfer", "TransferError", "WindowShut"]

LOCAL_BATCH_BYTES: Final = 16 << 20


class Transfer:
    """Base of the transports. One a process; it outlives runs (``begin`` starts the next)."""

    name: str = ""

    def __init__(self, memory: Memory, at: Tuple[str, int] = ("127.0.0.1", 0)) -> None:
        """``at``: where peers open windows. TransferError if that is taken."""
        self.memory: Memory = memory
        self.process: str = uuid.uuid4().hex[:16]
        self.address: str = ""
        self.token: str = ""
        self.epoch: int = 0
        self.lock: threading.Lock = threading.Lock()
        self.jobs: Dict[Rid, Job] = {}
        self.closing: List[Tuple[str, int]] = []
        self.results: Deque[Union[Ended, WindowShut]] = deque()
        self.wake: int = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.windows: WindowServer = WindowServer(
            self.prepare, self.serve, self.revoke, self.info, self._check_closing, at
        )

    # ---- what a transport implements
    def carry(self, job: Job) -> str:
        """Move ``job.spans``; returns what carried them. Raises Stopped, TransferError or OSError."""
        raise NotImplementedError

    def prepare(self, window: Window) -> None:
        """Before a window is granted; whatever this raises refuses it."""
        hello = window.hello
        for slot, size in hello.spans:
            self.memory.check(hello.location, slot, size)
        if hello.kind == "write":
            self.memory.soil(hello.location, [slot for slot, _ in hello.spans], poison=True)

    def serve(self, window: Window) -> None:
        """Runs on the side whose memory is touched, for as long as the window is open."""
        raise NotImplementedError

    def revoke(self, window: Window) -> None:
        """Make the window's owner stop; must not block."""
        raise NotImplementedError

    def info(self, known: int) -> Optional[Info]:
        """What a peer must know to reach this memory; None if it knows it (``known``: the layout it has seen)."""
        return None

    def introduce(self, address: str, endpoint: str) -> None:
        """Connect to a peer before the first copy needs it."""

    def memory_changed(self) -> None:
        """Slabs were made or dropped."""

    # ---- the loop's side
    def endpoint(self) -> str:
        return f"{self.name}|{self.windows.host}|{self.windows.port}|{self.process}"

    def fileno(self) -> int:
        return self.wake

    def begin(self, token: str, address: str) -> None:
        """A new run of this process, as ``address``. Nothing of the last one may be running."""
        self.token = token
        self.address = address
        self.windows.begin(token, address)
        self.epoch = 0
        self.take()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.windows.set_epoch(epoch)

    def start(self, copy: Copy) -> None:
        rid = copy.effect.rid
        job = Job(copy)
        with self.lock:
            if rid in self.jobs:
                return  # carried out twice: the first one's end answers both
            self.jobs[rid] = job
        threading.Thread(target=self._run, args=(job,), name=f"copy {rid[1]}", daemon=True).start()

    def abort(self, rid: Rid) -> None:
        with self.lock:
            job = self.jobs.get(rid)
        if job is None:
            now = time.monotonic_ns()
            self._report(Ended(rid, "stopped", "not running", True, "", "", 0, now, now, now))
            return
        self._stop(job)

    def _stop(self, job: Job) -> None:
        job.aborted.set()
        stop = job.stop
        if stop is not None:
            stop()

    def close_window(self, peer: str, epoch: int) -> None:
        self.windows.close(peer, epoch)
        with self.lock:
            self.closing.append((peer, epoch))
            mine = [job for job in self.jobs.values() if _reads(job, peer, epoch)]
        for job in mine:
            self._stop(job)
        self._check_closing()

    def take(self) -> List[Union[Ended, WindowShut]]:
        """What has ended since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake)
        found: List[Union[Ended, WindowShut]] = []
        while self.results:
            found.append(self.results.popleft())
        return found

    def next_deadline(self) -> Optional[int]:
        with self.lock:
            return min((job.deadline_ns for job in self.jobs.values() if not job.expired), default=None)

    def expire(self, now: int) -> None:
        """Every copy ends within copy_max_ns: tell those to stop whose time is up. They end as failed."""
        with self.lock:
            late = [job for job in self.jobs.values() if job.deadline_ns <= now and not job.expired]
        for job in late:
            job.expired = True
            self._stop(job)

    def pending(self) -> List[str]:
        with self.lock:
            lines = [f"copy {rid[1]} with {job.copy.effect.peer}" for rid, job in self.jobs.items()]
            lines += [f"closing the window of {peer}" for peer, _ in self.closing]
        return lines + [f"window of {w.hello.peer} open" for w in list(self.windows.windows) if w.hello.kind != "greet"]

    def stop(self) -> None:
        self.windows.stop()
        with self.lock:
            jobs = list(self.jobs.values())
        for job in jobs:
            self._stop(job)

    # ---- a copy's thread
    def _run(self, job: Job) -> None:
        copy = job.copy
        effect = copy.effect
        state, why, transport = "done", "", ""
        try:
            transport = self._carry(job)
            if copy.fate.fail:
                state, why = "failed", "injected failure"
        except Stopped:
            state = "stopped"
        except (TransferError, OSError) as error:
            state, why = "failed", str(error) or type(error).__name__
        except Exception as error:  # whatever a transport's library raises ends this copy, never the node
            state, why = "failed", f"{type(error).__name__}: {error}"
        if state == "stopped" and job.expired:
            state, why = "failed", "copy_max_ns passed"
        now = time.monotonic_ns()
        began = job.began_ns or now
        ended = Ended(effect.rid, state, why, effect.read, effect.peer, transport, job.moved, job.asked_ns, began, now)
        with self.lock:
            del self.jobs[effect.rid]
        self._report(ended)
        self._check_closing()

    def _carry(self, job: Job) -> str:
        fate = job.copy.fate
        if job.copy.effect.read:
            self.memory.soil(job.copy.effect.location, job.copy.effect.slots, poison=True)
        if fate.delay_ns:
            job.aborted.wait(fate.delay_ns / 1e9)
            job.check()
        begun = time.monotonic_ns()
        if not job.spans:  # an injected fault lets none of the bytes through
            transport = self.name
        elif job.copy.effect.peer == self.address:
            transport = self._carry_locally(job)
        else:
            transport = self.carry(job)
        if fate.stuck and not fate.fail:  # what has landed has landed, but nobody is told
            job.aborted.wait()
            raise Stopped
        if fate.slow > 1.0:
            elapsed_s = (time.monotonic_ns() - begun) / 1e9
            job.aborted.wait(elapsed_s * (fate.slow - 1.0))
            job.check()
        if fate.corrupt and job.copy.effect.read and job.spans:
            self._spoil(job)
        return transport

    def _spoil(self, job: Job) -> None:
        """Turn one byte over in the middle of what was read."""
        slot, _, size = job.spans[len(job.spans) // 2]
        location = job.copy.effect.location
        spoiled = self.memory.get(location, slot, size).copy()
        spoiled[size // 2] ^= 0xFF
        self.memory.put(location, slot, spoiled)

    def _carry_locally(self, job: Job) -> str:
        """Between two locations of this process."""
        effect = job.copy.effect
        to, fro = (effect.location, effect.peer_location) if effect.read else (effect.peer_location, effect.location)
        if not effect.read:
            self.memory.soil(to, effect.peer_slots, poison=True)
        job.began()
        for mine, theirs, size in job.spans:
            target, source = (mine, theirs) if effect.read else (theirs, mine)
            if self.memory.on_gpu(to) or self.memory.on_gpu(fro):
                self.memory.put(to, target, self.memory.get(fro, source, size))
                job.check()
            else:
                self._memcpy(job, self.memory.view(to, target, size), self.memory.view(fro, source, size))
            job.moved += size
        return "memcpy"

    def _memcpy(self, job: Job, target: Bytes, source: Bytes) -> None:
        for start in range(0, len(target), LOCAL_BATCH_BYTES):
            job.check()
            size = min(LOCAL_BATCH_BYTES, len(target) - start)
            copy_bytes(int(target.ctypes.data) + start, int(source.ctypes.data) + start, size)

    # ---- helpers for transports
    def connect(self, job: Job, layout: int = -1) -> Tuple[socket.socket, Grant]:
        """Open a window at the peer for this copy; the socket is the window."""
        effect = job.copy.effect
        hello = Hello(
            self.token,
            "read" if effect.read else "write",
            self.address,
            job.copy.epoch,
            effect.peer,
            effect.peer_epoch,
            effect.peer_location,
            tuple((theirs, size) for _, theirs, size in job.spans),
            layout,
        )
        return self._dial(job.copy.endpoint, hello, job)

    def _dial(self, endpoint: str, hello: Hello, job: Optional[Job]) -> Tuple[socket.socket, Grant]:
        kind, host, port, _ = split_endpoint(endpoint)
        if kind != self.name:
            raise TransferError(f"{hello.to} moves bytes by {kind}, this process by {self.name}")
        sock = socket.create_connection((host, port))
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if job is not None:
                job.stop = lambda: hang_up(sock, close=False)
                job.check()
            grant = open_window(sock, hello, self.windows.secret)
            if job is not None:
                job.stop = None
                job.check()
            return sock, grant
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError) and job is not None:
                job.check()
            raise

    # ---- ends
    def _report(self, item: Union[Ended, WindowShut]) -> None:
        self.results.append(item)
        os.eventfd_write(self.wake, 1)

    def _check_closing(self) -> None:
        """Answer each close whose writers, theirs and mine on their behalf, have all stopped."""
        with self.lock:
            shut = []
            for peer, epoch in self.closing:
                reading = any(_reads(job, peer, epoch) for job in self.jobs.values())
                if not reading and not self.windows.writers(peer, epoch):
                    shut.append((peer, epoch))
            for item in shut:
                self.closing.remove(item)
        for peer, epoch in shut:
            self._report(WindowShut(peer, epoch))


def _reads(job: Job, peer: str, epoch: int) -> bool:
    effect = job.copy.effect
    return effect.read and effect.peer == peer and effect.peer_epoch <= epoch
