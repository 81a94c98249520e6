"""Plain TCP: the window's own connection carries the bytes, straight out of one slab and into the other.

Nothing one-sided about it: the target's thread receives every byte, so a window that is shut is shut at once.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Iterable, List, Tuple

from kvreal.memory import Bytes, Memory
from kvreal.transfer.base import Job, Transfer, TransferError
from kvreal.transfer.window import Window, hang_up, read_exactly

ACK: bytes = b"\x06"
PIECE_BYTES: int = 8 << 20


class TcpTransfer(Transfer):
    name = "tcp"

    def carry(self, job: Job) -> str:
        effect = job.copy.effect
        sock, _ = self.connect(job)
        with sock:
            mine = pieces(self.memory, effect.location, ((slot, size) for slot, _, size in job.spans))
            # A reader may just hang up: what it has not received never lands. A writer must hear that its target has
            # put the last byte away, so it only ends its half and waits for the target to hang up.
            job.stop = (lambda: hang_up(sock, close=False)) if effect.read else (lambda: _end_half(sock))
            job.began()
            try:
                if effect.read:
                    self._receive(job, sock, mine)
                else:
                    self._send(job, sock, mine)
            except OSError:
                job.check()
                raise
        return "tcp"

    def _receive(self, job: Job, sock: socket.socket, views: List[Bytes]) -> None:
        for view in views:
            job.check()
            if not receive_into(sock, view):
                job.check()
                raise TransferError(f"{job.copy.effect.peer} hung up after {job.moved} bytes")
            job.moved += len(view)

    def _send(self, job: Job, sock: socket.socket, views: List[Bytes]) -> None:
        for index, view in enumerate(views):
            if job.copy.fate.corrupt and index == len(views) // 2:
                view = view.copy()
                view[len(view) // 2] ^= 0xFF
            try:
                if job.aborted.is_set():
                    break
                sock.sendall(view.data)
            except OSError:
                break  # the answer, or its absence, says what it was
            job.moved += len(view)
        answer = sock.recv(1)
        if answer != ACK:
            job.check()
            raise TransferError(f"{job.copy.effect.peer} did not take the bytes")

    def serve(self, window: Window) -> None:
        hello = window.hello
        if hello.kind == "greet":
            return
        views = pieces(self.memory, hello.location, hello.spans)
        if hello.kind == "read":
            for view in views:
                window.sock.sendall(view.data)
            with contextlib.suppress(OSError):
                read_exactly(window.sock, 1)  # until the reader hangs up
            return
        for view in views:
            if window.revoked or not receive_into(window.sock, view):
                return
        if not window.revoked:
            window.sock.sendall(ACK)

    def revoke(self, window: Window) -> None:
        hang_up(window.sock, close=False)


def pieces(memory: Memory, location: str, spans: Iterable[Tuple[int, int]]) -> List[Bytes]:
    """Views of (slot, bytes) spans, in order, no larger than PIECE_BYTES, so that whoever must stop does so soon."""
    views = []
    for slot, size in spans:
        view = memory.view(location, slot, size)
        views += [view[start : start + PIECE_BYTES] for start in range(0, size, PIECE_BYTES)]
    return views


def receive_into(sock: socket.socket, view: Bytes) -> bool:
    """Fill ``view``; False if the peer hung up first."""
    target = view.data
    while len(target):
        got = sock.recv_into(target, len(target), socket.MSG_WAITALL)
        if not got:
            return False
        target = target[got:]
    return True


def _end_half(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
