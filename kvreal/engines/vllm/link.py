"""What vLLM's processes and a rank's process say to each other, and the engine's end of it.

The socket is a Unix one in the abstract namespace: no file is left behind, and its end is the end of who held it. The
rank trusts who runs under its own user id, and nobody else.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections import deque
from typing import Any, Deque, Final, List, Optional, Tuple, Union

import msgspec

MAX_FRAME_BYTES: Final = 64 << 20


class LinkError(Exception):
    """The rank does not answer, or has gone."""


class Late(LinkError):
    """The rank has not answered in time; it may yet."""


class Frame(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all that is said."""


class Prompt(msgspec.Struct, frozen=True, array_like=True):
    """What a chunk's keys are made of. ``tokens``: unsigned 32-bit, little endian."""

    tokens: bytes
    adapter: str = ""
    salt: str = ""


class Shared(msgspec.Struct, frozen=True, array_like=True):
    """A location, as whoever maps the rank's slabs finds it: slot i begins at start + i * slot_bytes of ``slab``."""

    name: str
    slab: int
    start: int
    slots: int
    slot_bytes: int


# ---- engine -> rank
class Look(Frame, frozen=True):
    """How much of this is held? What is found is held for ``name`` until Drop, Loaded, or the end of its lease."""

    name: str
    prompt: Prompt
    lease_s: float


class Renew(Frame, frozen=True):
    """``name``'s lease begins anew. No answer."""

    name: str


class Drop(Frame, frozen=True):
    """``name`` is not needed any more. No answer."""

    name: str


class Loaded(Frame, frozen=True):
    """The slots of ``name`` have been read, and are let go. Answered by Told."""

    name: str


class Store(Frame, frozen=True):
    """Room for this prompt's chunks. Answered by Room."""

    name: str
    prompt: Prompt


class Filled(Frame, frozen=True):
    """The slots of ``name``'s Room are written, or could not be. Answered by Told."""

    name: str
    ok: bool


class Watch(Frame, frozen=True):
    """Said first by vLLM's scheduler: with it, or with process ``parent`` (0: none), the engine has ended."""

    parent: int


# ---- rank -> engine
class Ready(Frame, frozen=True):
    """The rank listens; the descriptors of its slabs come along."""

    places: Tuple[Shared, ...]
    transport: str


class Failed(Frame, frozen=True):
    why: str


class Seen(Frame, frozen=True):
    """``num_tokens`` are held, chunk i in ``slots[i]`` of ``location``. ``moved``: how many of them came by a move,
    and ``event``: the last of these moves."""

    name: str
    num_tokens: int
    location: str = ""
    slots: Tuple[int, ...] = ()
    moved: int = 0
    event: str = ""


class Room(Frame, frozen=True):
    """Chunk ``chunks[i]`` of the prompt goes into ``slots[i]`` of ``location``. Those that are missing are held
    already, or do not fit (``why``)."""

    name: str
    location: str = ""
    chunks: Tuple[int, ...] = ()
    slots: Tuple[int, ...] = ()
    why: str = ""


class Told(Frame, frozen=True):
    """``ok``: the hold lived until now; or what was filled is visible. Else ``why``."""

    name: str
    ok: bool
    why: str = ""
    num_tokens: int = 0


Anything = Union[Look, Renew, Drop, Loaded, Store, Filled, Watch, Ready, Failed, Seen, Room, Told]
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Anything).decode


def pack(frame: Frame) -> bytes:
    body = _encode(frame)
    return struct.pack("<I", len(body)) + body


class Unpacker:
    """Frames out of a stream of bytes."""

    def __init__(self) -> None:
        self.buffer: bytearray = bytearray()

    def feed(self, data: bytes) -> List[Any]:
        """LinkError for what is no frame."""
        self.buffer += data
        found: List[Any] = []
        while len(self.buffer) >= 4:
            (size,) = struct.unpack_from("<I", self.buffer)
            if size > MAX_FRAME_BYTES:
                raise LinkError(f"a frame of {size} bytes")
            if len(self.buffer) < 4 + size:
                break
            try:
                found.append(_decode(bytes(self.buffer[4 : 4 + size])))
            except msgspec.MsgspecError as error:
                raise LinkError(f"no frame: {error}") from None
            del self.buffer[: 4 + size]
        return found


class Link:
    """An engine's connection to a rank. One thread uses it. Never waits longer than it is told to."""

    def __init__(self, address: str) -> None:
        """LinkError: nobody listens there."""
        self.address: str = address
        self.unpacker: Unpacker = Unpacker()
        self.heard: Deque[Any] = deque()
        self.sock: socket.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self.sock.settimeout(0.2)
            self.sock.connect("\0" + address)
        except OSError as error:
            self.sock.close()
            raise LinkError(f"no rank at {address}: {error.strerror or error}") from None

    def say(self, frame: Frame) -> None:
        """LinkError if the rank does not read within a second (or has gone)."""
        try:
            self.sock.settimeout(1.0)
            self.sock.sendall(pack(frame))
        except OSError as error:
            raise LinkError(str(error) or type(error).__name__) from None

    def hear(self, timeout_s: float) -> Optional[Any]:
        """The next frame; None if none comes in time. LinkError: the rank has gone."""
        until = time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        while not self.heard:
            left = until - time.monotonic()
            if not poller.poll(max(0.0, left) * 1e3):
                return None
            try:
                data = self.sock.recv(1 << 18, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError as error:
                raise LinkError(str(error)) from None
            if not data:
                raise LinkError("the rank has gone")
            self.heard.extend(self.unpacker.feed(data))
        return self.heard.popleft()

    def ask(self, frame: Any, timeout_s: float) -> Any:
        """Say it and wait for the answer to its ``name``; late answers to earlier questions are passed over."""
        self.say(frame)
        until = time.monotonic() + timeout_s
        while (answer := self.hear(max(0.0, until - time.monotonic()))) is not None:
            if answer.name == frame.name:
                return answer
        raise Late(f"the rank has not answered for {timeout_s} s")

    def close(self) -> None:
        self.sock.close()


def receive_ready(sock: socket.socket, timeout_s: float) -> Tuple[Union[Ready, Failed], List[int]]:
    """The first word of a rank's process, and its slabs' descriptors. LinkError: it ended, or says nothing."""
    sock.settimeout(timeout_s)
    try:
        data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 64)
    except OSError as error:
        raise LinkError(f"the rank's process does not start: {error}") from None
    for fd in fds:
        os.set_inheritable(fd, False)
    found = Unpacker().feed(data)
    if not found or not isinstance(found[0], (Ready, Failed)):
        raise LinkError("the rank's process has ended before it was ready")
    return found[0], fds
