"""Plain sockets, TCP or Unix: the window's own line carries the bytes, straight out of one slab and into the other.

Nothing one-sided about it: the target's thread receives every byte, so a window that is shut is shut at once. Memory
that the kernel cannot reach (a GPU's, a disk's) is staged, a slot at a time, the next one while this one is sent.

A large copy over TCP has several streams, each a window of its own: one core carries less of TCP than memory does. Its
bytes are dealt in stripes, the first to the first stream and so on, so that both ends know which is whose.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections import deque
from concurrent.futures import Future, wait
from contextlib import closing
from functools import partial
from typing import Callable, Deque, Final, Generator, List, Optional, Sequence, Tuple

import numpy as np

from kvcore.scenario.topology import kind_of
from kvreal.memory import Memory
from kvreal.slab import Bytes
from kvreal.spans import Ints
from kvreal.store import DiskError
from kvreal.transfer.carrier import Carrier, Link
from kvreal.transfer.file import workers
from kvreal.transfer.flow import BATCH_BYTES
from kvreal.transfer.frames import TransferError, read_message, send_message
from kvreal.transfer.job import Job
from kvreal.transfer.window import Window, hang_up

log = logging.getLogger("kvmove.transfer")

ACK: Final = b"\x06"
REFUSED: Final = b"\x15"
"""Instead of ACK, and at any time: why follows, as a message."""
MAX_WHY: Final = 4096
PIECE_BYTES: Final = 4 << 20
"""One view of a batch, and one stripe of a copy that has several streams."""
AHEAD: Final = 1
"""Staged chunks that are read, or written, while another is sent or received."""
VECTORS: Final = 512
"""Views given to the kernel in one call (IOV_MAX is 1024)."""
STREAMS: Final = 2
STREAMS_FROM_BYTES: Final = 32 << 20
"""Less is over before a second stream is worth its window."""


class SocketCarrier(Carrier):
    name = "socket"

    def reaches(self, card: str, mine: str, theirs: str) -> bool:
        return True

    def streams(self, job: Job) -> int:
        effect = job.copy.effect
        staged = {kind_of(effect.location), kind_of(effect.peer_location)} != {"cpu"}
        return 1 if staged or job.nbytes < STREAMS_FROM_BYTES else STREAMS

    def carry(self, job: Job, link: Link) -> str:
        socks = [one.line.sock for one in (link, *link.others)]
        # A reader may just hang up: what it has not received never lands. A writer must hear that its target has put
        # the last byte away, so it only ends its half and waits for the target to hang up.
        read = job.copy.effect.read

        def stop() -> None:
            for sock in socks:
                if read:
                    hang_up(sock, close=False)
                else:
                    _end_half(sock)

        job.woken_by(stop)
        job.began()
        streams = Streams(socks, receive_into if read else _sent, stop)
        try:
            self._move(job, streams)
            if not read:
                self._settle(job, socks)
        except Exception:  # stopped, or what it reads from cannot be read
            if not read:
                stop()
                for sock in socks:
                    _answer(sock)
            raise
        finally:
            streams.end()
        return "unix" if link.line.unix else "tcp"

    def _move(self, job: Job, streams: Streams) -> None:
        effect = job.copy.effect
        read = effect.read
        spans = job.spans
        limit = self.flow.batch(job)
        keys = effect.keys
        found = batches(self.memory, effect.location, spans.mine, spans.sizes, limit, fill=not read, keys=keys)
        with closing(found):
            for batch in found:
                self.flow.turn(job, batch.nbytes)
                if not read:
                    _heed(streams.socks)
                try:
                    whole = streams.carry(batch.views if read else job.outgoing(batch.views))
                finally:
                    self.flow.done()
                if whole:
                    batch.store()
                    job.moved += batch.nbytes
                elif read:
                    job.check()
                    raise TransferError(f"{effect.peer} hung up after {job.moved} bytes")
                else:
                    return  # its answer, or its absence, says what it was

    def _settle(self, job: Job, socks: Sequence[socket.socket]) -> None:
        """Wait until the target has put everything away, or has hung up and so puts nothing away any more."""
        answers = [_answer(sock) for sock in socks]
        if answers != [ACK] * len(socks):
            job.check()
            for sock, answer in zip(socks, answers):
                if answer == REFUSED:
                    raise TransferError(f"the target says: {_why(sock)}")
            raise TransferError(f"{job.copy.effect.peer} did not take the bytes, or could not put them away")

    # ---- the side whose memory is touched
    def serve(self, window: Window) -> bool:
        try:
            return self._served(window)
        except DiskError as error:
            log.warning("a copy with %s fails: %s", window.hello.peer, error)
            if window.hello.kind == "write":  # whoever writes hears of it, and counts on none of it
                self.memory.forget(window.hello.location, window.slots)
                _refuse(window.sock, str(error))
            return False

    def _served(self, window: Window) -> bool:
        hello = window.hello
        position = 0
        fill = hello.kind == "read"
        slots, sizes = window.slots, window.sizes
        found = batches(self.memory, hello.location, slots, sizes, BATCH_BYTES, fill=fill, keys=hello.keys)
        with closing(found):
            for batch in found:
                views = dealt(batch.views, position, hello.parts)[hello.part]
                position += batch.nbytes
                if fill:
                    send_all(window.sock, views)
                elif window.revoked or not receive_into(window.sock, views):
                    return False
                else:
                    batch.store()
        if hello.kind == "write":
            if window.revoked:
                return False
            window.sock.sendall(ACK)
        return window.ended()

    def revoke(self, window: Window) -> None:
        hang_up(window.sock, close=False)


Move = Callable[[socket.socket, Sequence[Bytes]], bool]


class Streams:
    """The sockets of one copy, at its mover: the first is this thread's, each other has a thread of its own."""

    def __init__(self, socks: Sequence[socket.socket], move: Move, stop: Callable[[], None]) -> None:
        """``move``: all of some views over one of them; False, or OSError, if it cannot be. ``stop``: so that the
        others do not wait for what will not come."""
        self.socks: Sequence[socket.socket] = socks
        self.move: Move = move
        self.stop: Callable[[], None] = stop
        self.position: int = 0
        self.inboxes: List[queue.SimpleQueue[Optional[List[Bytes]]]] = []
        self.moved: queue.SimpleQueue[bool] = queue.SimpleQueue()
        for sock in socks[1:]:
            inbox: queue.SimpleQueue[Optional[List[Bytes]]] = queue.SimpleQueue()
            self.inboxes.append(inbox)
            threading.Thread(target=self._work, args=(sock, inbox), name="stream", daemon=True).start()

    def carry(self, views: Sequence[Bytes]) -> bool:
        """The next bytes of the copy, over all of them at once. False: a connection is gone."""
        hands = dealt(views, self.position, len(self.socks))
        self.position += sum(len(view) for view in views)
        for inbox, hand in zip(self.inboxes, hands[1:]):
            inbox.put(hand)
        whole = self._one(self.socks[0], hands[0])
        return all([whole, *(self.moved.get() for _ in self.inboxes)])

    def _one(self, sock: socket.socket, hand: Sequence[Bytes]) -> bool:
        try:
            whole = self.move(sock, hand)
        except OSError:
            whole = False
        if not whole:
            self.stop()
        return whole

    def _work(self, sock: socket.socket, inbox: queue.SimpleQueue[Optional[List[Bytes]]]) -> None:
        while (hand := inbox.get()) is not None:
            self.moved.put(self._one(sock, hand))

    def end(self) -> None:
        for inbox in self.inboxes:
            inbox.put(None)


def dealt(views: Sequence[Bytes], position: int, parts: int) -> List[List[Bytes]]:
    """Which of the views each of ``parts`` streams carries; they begin at byte ``position`` of their copy."""
    if parts == 1:
        return [list(views)]
    hands: List[List[Bytes]] = [[] for _ in range(parts)]
    for view in views:
        start = 0
        while start < len(view):
            at = position + start
            size = min(len(view) - start, PIECE_BYTES - at % PIECE_BYTES)
            hands[at // PIECE_BYTES % parts].append(view[start : start + size])
            start += size
        position += len(view)
    return hands


class Batch:
    """Views of some bytes of some slots; where there can be none, a buffer that ``store`` has put where it belongs."""

    def __init__(self, views: List[Bytes], store: Optional[Callable[[], None]] = None) -> None:
        self.views: List[Bytes] = views
        self.nbytes: int = sum(len(view) for view in views)
        self._store: Optional[Callable[[], None]] = store

    def store(self) -> None:
        if self._store is not None:
            self._store()


def batches(
    memory: Memory,
    location: str,
    slots: Ints,
    sizes: Ints,
    limit: int,
    fill: bool = True,
    keys: Sequence[bytes] = (),
) -> Generator[Batch, None, None]:
    """The first so many bytes of each slot, in order, at most ``limit`` (or one staged slot) at a time. ``fill``: they
    are read; otherwise they are about to be written. ``keys``: the chunks', if they are known. What a batch shows is
    good until the next is asked for; once this has ended, or is closed, nothing is read or written any more."""
    if not memory.mapped(location):
        wanted = list(zip(zip(slots.tolist(), sizes.tolist()), keys or [b""] * len(slots)))
        yield from _read_ahead(memory, location, wanted) if fill else _write_behind(memory, location, wanted)
        return
    views: List[Bytes] = []
    nbytes = 0
    for view in memory.ranges(location, slots, sizes):
        size = len(view)
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


Wanted = Sequence[Tuple[Tuple[int, int], bytes]]
"""((slot, bytes), key) of each chunk that is staged."""


def _read_ahead(memory: Memory, location: str, wanted: Wanted) -> Generator[Batch, None, None]:
    """While a chunk is sent the next ones are read."""
    buffers = _buffers(wanted)
    reads: Deque[Tuple[Future[None], Bytes]] = deque()

    def begin(at: int) -> None:
        if at < len(wanted):
            (slot, size), key = wanted[at]
            into = buffers[at % len(buffers)][:size]
            reads.append((workers().submit(memory.fetch, location, slot, into, key), into))

    try:
        for at in range(AHEAD):
            begin(at)
        for at in range(len(wanted)):
            begin(at + AHEAD)  # into the buffer whose bytes have been sent
            read, into = reads.popleft()
            read.result()
            yield Batch([into])
    finally:
        wait([read for read, _ in reads])


def _write_behind(memory: Memory, location: str, wanted: Wanted) -> Generator[Batch, None, None]:
    """While a chunk is received those before it are written; all of them are when the last batch has been asked for."""
    buffers = _buffers(wanted)
    writes: Deque[Future[None]] = deque()
    try:
        for at, ((slot, size), key) in enumerate(wanted):
            if len(writes) > AHEAD:
                writes.popleft().result()
            data = buffers[at % len(buffers)][:size]
            put = partial(workers().submit, memory.put, location, slot, data, key)
            yield Batch([data], partial(_then, writes, put))
        while writes:
            writes.popleft().result()
    finally:
        wait(writes)


def _then(begun: Deque[Future[None]], begin: Callable[[], Future[None]]) -> None:
    begun.append(begin())


def _buffers(wanted: Wanted) -> List[Bytes]:
    size = max((size for (_, size), _ in wanted), default=0)  # a link that is tried has none
    return [np.empty(size, dtype=np.uint8) for _ in range(min(len(wanted), AHEAD + 1))]


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


def _sent(sock: socket.socket, views: Sequence[Bytes]) -> bool:
    send_all(sock, views)
    return True


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


def _answer(sock: socket.socket) -> bytes:
    """One byte; none if the connection is gone."""
    try:
        return sock.recv(1)
    except OSError:
        return b""


def _refuse(sock: socket.socket, why: str) -> None:
    """Tell who writes why, and let go by what it has sent until it has heard: to hang up at once would lose the words.
    """
    nothing = bytearray(PIECE_BYTES)
    with contextlib.suppress(OSError):
        sock.sendall(REFUSED)
        send_message(sock, why.encode()[:MAX_WHY])
        while sock.recv_into(nothing):
            pass


def _heed(socks: Sequence[socket.socket]) -> None:
    """TransferError if the target has said that it does not keep what it is sent."""
    for sock in socks:
        with contextlib.suppress(OSError):  # nothing has come; or the connection is gone, which sending will show
            if sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == REFUSED:
                sock.recv(1)
                raise TransferError(f"the target says: {_why(sock)}")


def _why(sock: socket.socket) -> str:
    try:
        return " ".join(read_message(sock, MAX_WHY).decode(errors="replace").split())
    except OSError:
        return "it could not put the bytes away"


def _end_half(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
