"""Plain sockets, TCP or Unix: the window's own line carries the bytes, straight out of one slab and into the other.

Nothing one-sided about it: the target's thread receives every byte, so a window that is shut is shut at once. Memory
that the kernel cannot reach (a GPU's, a file's) is staged, a slot at a time.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Callable, Final, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from kvreal.memory import Bytes, Memory
from kvreal.transfer.carrier import Carrier, Link
from kvreal.transfer.flow import BATCH_BYTES
from kvreal.transfer.frames import TransferError
from kvreal.transfer.job import Job
from kvreal.transfer.window import Window, hang_up

ACK: Final = b"\x06"
PIECE_BYTES: Final = 4 << 20
VECTORS: Final = 512
"""Views given to the kernel in one call (IOV_MAX is 1024)."""


class SocketCarrier(Carrier):
    name = "socket"

    def reaches(self, card: str, mine: str, theirs: str) -> bool:
        return True

    def carry(self, job: Job, link: Link) -> str:
        sock = link.line.sock
        # A reader may just hang up: what it has not received never lands. A writer must hear that its target has put
        # the last byte away, so it only ends its half and waits for the target to hang up.
        job.woken_by((lambda: hang_up(sock, close=False)) if job.copy.effect.read else (lambda: _end_half(sock)))
        job.began()
        try:
            if job.copy.effect.read:
                self._receive(job, sock)
            else:
                self._send(job, sock)
        except OSError:
            job.check()
            raise
        return "unix" if link.line.unix else "tcp"

    def _receive(self, job: Job, sock: socket.socket) -> None:
        effect = job.copy.effect
        spans = [(slot, size) for slot, _, size in job.spans]
        for batch in batches(self.memory, effect.location, spans, self.flow.batch(job), fill=False):
            self.flow.turn(job, batch.nbytes)
            try:
                whole = receive_into(sock, batch.views)
            finally:
                self.flow.done()
            if not whole:
                job.check()
                raise TransferError(f"{effect.peer} hung up after {job.moved} bytes")
            batch.store()
            job.moved += batch.nbytes

    def _send(self, job: Job, sock: socket.socket) -> None:
        effect = job.copy.effect
        spans = [(slot, size) for slot, _, size in job.spans]
        spoil = job.copy.fate.corrupt
        try:
            for batch in batches(self.memory, effect.location, spans, self.flow.batch(job)):
                self.flow.turn(job, batch.nbytes)
                try:
                    send_all(sock, _spoilt(batch.views) if spoil else batch.views)
                finally:
                    self.flow.done()
                spoil = False
                job.moved += batch.nbytes
        except OSError:
            pass  # the answer, or its absence, says what it was
        answer = sock.recv(1)
        if answer != ACK:
            job.check()
            raise TransferError(f"{effect.peer} did not take the bytes")

    # ---- the side whose memory is touched
    def serve(self, window: Window) -> bool:
        hello = window.hello
        if hello.kind == "read":
            for batch in batches(self.memory, hello.location, hello.spans, BATCH_BYTES):
                send_all(window.sock, batch.views)
        elif hello.kind == "write":
            for batch in batches(self.memory, hello.location, hello.spans, BATCH_BYTES, fill=False):
                if window.revoked or not receive_into(window.sock, batch.views):
                    return False
                batch.store()
            if window.revoked:
                return False
            window.sock.sendall(ACK)
        return window.ended()

    def revoke(self, window: Window) -> None:
        hang_up(window.sock, close=False)


class Batch:
    """Views of some bytes of some slots; where there can be none, a buffer that ``store`` puts where it belongs."""

    def __init__(self, views: List[Bytes], store: Optional[Callable[[], None]] = None) -> None:
        self.views: List[Bytes] = views
        self.nbytes: int = sum(len(view) for view in views)
        self._store: Optional[Callable[[], None]] = store

    def store(self) -> None:
        if self._store is not None:
            self._store()


def batches(
    memory: Memory, location: str, spans: Sequence[Tuple[int, int]], limit: int, fill: bool = True
) -> Iterator[Batch]:
    """The bytes of (slot, bytes) spans in order, at most ``limit`` (or one staged slot) at a time. ``fill``: they are
    read; otherwise they are about to be written."""
    if not memory.mapped(location):
        for slot, size in spans:
            yield _staged(memory, location, slot, size, fill)
        return
    views: List[Bytes] = []
    nbytes = 0
    for slot, size in spans:
        view = memory.view(location, slot, size)
        start = 0
        while start < size:
            part = view[start : start + min(PIECE_BYTES, limit - nbytes)]
            views.append(part)
            nbytes += len(part)
            start += len(part)
            if nbytes >= limit or len(views) >= VECTORS:
                yield Batch(views)
                views, nbytes = [], 0
    if views:
        yield Batch(views)


def _staged(memory: Memory, location: str, slot: int, size: int, fill: bool) -> Batch:
    if fill:
        return Batch([memory.get(location, slot, size)])
    buffer: Bytes = np.empty(size, dtype=np.uint8)
    return Batch([buffer], lambda: memory.put(location, slot, buffer))


def send_all(sock: socket.socket, views: Sequence[Bytes]) -> None:
    """All of the views, gathered by the kernel."""
    left = [view.data for view in views]
    while left:
        sent = sock.sendmsg(left[:VECTORS])
        while left and sent >= len(left[0]):
            sent -= len(left[0])
            left.pop(0)
        if sent:
            left[0] = left[0][sent:]


def receive_into(sock: socket.socket, views: Sequence[Bytes]) -> bool:
    """Fill the views, scattered by the kernel; False if the peer hung up first."""
    left = [view.data for view in views]
    while left:
        got = sock.recvmsg_into(left[:VECTORS], 0, socket.MSG_WAITALL)[0]
        if not got:
            return False
        while left and got >= len(left[0]):
            got -= len(left[0])
            left.pop(0)
        if got:
            left[0] = left[0][got:]
    return True


def _spoilt(views: Sequence[Bytes]) -> List[Bytes]:
    """With one byte in the middle turned over."""
    found = list(views)
    middle = len(found) // 2
    found[middle] = found[middle].copy()
    found[middle][len(found[middle]) // 2] ^= 0xFF
    return found


def _end_half(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
