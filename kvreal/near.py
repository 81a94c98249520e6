"""Control messages between processes of one user on one host: Unix sockets, where ZeroMQ would wake three threads.

A message over ZeroMQ's TCP goes by way of a thread at each end: 55 to 90 microseconds from one process's loop to the
other's, where one over a Unix socket takes 35, and a move is ten of them. Who listens is found by name, in the abstract
namespace, which ends where a network namespace does: a name that can be called is on this host. The kernel says whose
process is at the other end, and another user's is turned away. Nothing is sent here that could not be sent by ZeroMQ:
what finds nobody goes there.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from typing import Dict, Final, List, Optional, Sequence, Tuple

READ_BYTES: Final = 256 << 10
MAX_FRAME_BYTES: Final = 64 << 20
MAX_PARTS: Final = 64
MAX_QUEUED_BYTES: Final = 64 << 20
"""What waits for one receiver that does not take; more is dropped, as a network would."""
AGAIN_S: Final = 1.0
"""Who was not there is called again after this."""
_SIZE: Final = struct.Struct("<II")
_PEER: Final = struct.Struct("3i")


def _name(address: str) -> str:
    return f"\0kvmove/{address}"


def _mine(sock: socket.socket) -> bool:
    """Is the process at the other end this user's?"""
    _, user, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return bool(user == os.geteuid())


def _connected(address: str) -> Optional[socket.socket]:
    """To a process of this user that listens by that name; None: there is none, or no connection to be had."""
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError:  # no more descriptors
        return None
    try:
        sock.connect(_name(address))
        if _mine(sock):
            return sock
    except OSError:
        pass
    sock.close()
    return None


class Garbled(Exception):
    """What came is not what this end writes."""


class Line:
    """One connection, in one direction. A frame: its size and its number of parts; their sizes; the parts."""

    def __init__(self, sock: socket.socket, name: str = "") -> None:
        self.sock: socket.socket = sock
        self.name: str = name
        self.incoming: bytearray = bytearray()
        self.outgoing: bytearray = bytearray()

    def read(self, room: memoryview) -> Optional[List[List[bytes]]]:
        """Whole frames that have come, by way of ``room``; None: the other end has gone. Garbled."""
        try:
            size = self.sock.recv_into(room)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not size:
            return None
        data = bytes(room[:size])
        if self.incoming:
            self.incoming += data
            data = bytes(self.incoming)
        frames, taken = _cut(data)
        if taken < len(data) or self.incoming:
            self.incoming = bytearray(data[taken:])
        return frames

    def write(self, parts: Sequence[bytes]) -> bool:
        """False if it was dropped. OSError if nobody is there any more."""
        data = b"".join((
            _SIZE.pack(4 * len(parts) + sum(map(len, parts)), len(parts)),
            struct.pack(f"<{len(parts)}I", *map(len, parts)), *parts,
        ))  # fmt: skip
        if self.outgoing:
            if len(self.outgoing) + len(data) > MAX_QUEUED_BYTES:
                return False
            self.outgoing += data
            return True
        sent = self._send(data)
        if sent < len(data):
            self.outgoing += data[sent:]
        return True

    def flush(self) -> None:
        """Write what fits. OSError if nobody is there any more."""
        while self.outgoing and (sent := self._send(memoryview(self.outgoing)[:READ_BYTES].tobytes())):
            del self.outgoing[:sent]

    def _send(self, data: bytes) -> int:
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0


def _cut(data: bytes) -> Tuple[List[List[bytes]], int]:
    """(whole frames, how many bytes they are)."""
    frames: List[List[bytes]] = []
    at, end = 0, len(data)
    while end - at >= _SIZE.size:
        size, count = _SIZE.unpack_from(data, at)
        if not 1 <= count <= MAX_PARTS or not 4 * count <= size <= MAX_FRAME_BYTES:
            raise Garbled(f"a frame of {size} bytes in {count} parts")
        if end - at - _SIZE.size < size:
            break
        at += _SIZE.size
        sizes = struct.unpack_from(f"<{count}I", data, at)
        at += 4 * count
        if 4 * count + sum(sizes) != size:
            raise Garbled(f"a frame of {size} bytes whose parts have {sum(sizes)}")
        parts = []
        for part in sizes:
            parts.append(data[at : at + part])
            at += part
        frames.append(parts)
    return frames, at


class Near:
    """One node's end. ``fileno`` is readable when there is something to do: call ``arriving``."""

    def __init__(self, *addresses: str) -> None:
        """``addresses``: what others call this node. One that is taken is not listened at."""
        self.epoll: select.epoll = select.epoll()
        self.doors: Dict[int, socket.socket] = {}
        self.callers: Dict[int, Line] = {}
        self.lines: Dict[str, Line] = {}
        self.fds: Dict[int, Line] = {}
        #: who was not there -> when to try again, seconds of the monotonic clock
        self.absent: Dict[str, float] = {}
        self.garbled: int = 0
        #: where what comes is put first: room of this size, had anew for each read, costs more than the read
        self.room: memoryview = memoryview(bytearray(READ_BYTES))
        for address in dict.fromkeys(addresses):
            self._listen(address)

    def _listen(self, address: str) -> None:
        door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            door.bind(_name(address))
            door.listen(1024)
        except OSError:
            door.close()
            return
        self.doors[door.fileno()] = door
        self.epoll.register(door.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        return self.epoll.fileno()

    # ---- sending
    def send(self, address: str, parts: Sequence[bytes]) -> Optional[bool]:
        """None: nobody of that name is near. False: dropped, too much waits for it."""
        for _ in range(2):  # who has ended may have come back, or another in its place
            line = self.lines.get(address) or self._call(address)
            if line is None:
                return None
            queued = bool(line.outgoing)
            try:
                taken = line.write(parts)
            except OSError:
                self.forget(address)
                continue
            if line.outgoing and not queued:
                self.epoll.modify(line.sock.fileno(), select.EPOLLOUT)
            return taken
        return None

    def greet(self, address: str) -> None:
        """Call whoever is there before the first message needs it."""
        if address not in self.lines:
            self._call(address)

    def _call(self, address: str) -> Optional[Line]:
        if self.absent:
            until = self.absent.get(address)
            if until is not None and time.monotonic() < until:
                return None
        sock = _connected(address)
        if sock is None:
            self.absent[address] = time.monotonic() + AGAIN_S
            return None
        self.absent.pop(address, None)
        line = self.lines[address] = self.fds[sock.fileno()] = Line(sock, address)
        self.epoll.register(sock.fileno(), 0)  # only that it ends
        return line

    def forget(self, address: str) -> None:
        """What still waits for it is dropped."""
        line = self.lines.pop(address, None)
        if line is not None:
            del self.fds[line.sock.fileno()]
            self._close(line.sock)
        self.absent.pop(address, None)

    # ---- receiving
    def take_garbled(self) -> int:
        """How many connections have been ended since the last time, as what came over them was no frame."""
        garbled, self.garbled = self.garbled, 0
        return garbled

    def arriving(self) -> List[List[bytes]]:
        """The frames that have come, in the order of each sender."""
        frames: List[List[bytes]] = []
        for fd, event in self.epoll.poll(0):
            caller = self.callers.get(fd)
            if caller is not None:
                self._read(fd, caller, frames)
            elif fd in self.doors:
                self._accept(self.doors[fd])
            elif fd in self.fds:
                self._tend(self.fds[fd], event)
        return frames

    def _read(self, fd: int, caller: Line, frames: List[List[bytes]]) -> None:
        try:
            found = caller.read(self.room)
        except Garbled:
            self.garbled += 1
            found = None
        if found is None:
            del self.callers[fd]
            self._close(caller.sock)
        else:
            frames += found

    def _accept(self, door: socket.socket) -> None:
        while True:
            try:
                sock, _ = door.accept()
            except OSError:
                return
            if not _mine(sock):
                sock.close()
                continue
            sock.setblocking(False)
            self.callers[sock.fileno()] = Line(sock)
            self.epoll.register(sock.fileno(), select.EPOLLIN)

    def _tend(self, line: Line, event: int) -> None:
        """A line of ours: it has room again, or it has ended."""
        try:
            if event & (select.EPOLLHUP | select.EPOLLERR):
                raise OSError("the other end has gone")
            line.flush()
        except OSError:
            self.forget(line.name)
            return
        if not line.outgoing:
            self.epoll.modify(line.sock.fileno(), 0)

    def _close(self, sock: socket.socket) -> None:
        try:
            self.epoll.unregister(sock.fileno())
        finally:
            sock.close()

    # ---- the end
    def send_off(self) -> None:
        """Let what was sent leave this process, for a second at most, then close."""
        until = time.monotonic() + 1.0
        for line in list(self.lines.values()):
            while line.outgoing and (left := until - time.monotonic()) > 0:
                select.select([], [line.sock], [], left)
                try:
                    line.flush()
                except OSError:
                    break
        self.close()

    def hang_up(self) -> None:
        """End every line to others; those of others stay."""
        for name in list(self.lines):
            self.forget(name)
        self.absent.clear()

    def close(self) -> None:
        self.hang_up()
        for caller in self.callers.values():
            caller.sock.close()
        for door in self.doors.values():
            door.close()
        self.callers, self.doors = {}, {}
        if not self.epoll.closed:
            self.epoll.close()
