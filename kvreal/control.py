"""What the runner and its child processes say to one another over the child's stdin and stdout: msgpack, each message
behind its length."""

from __future__ import annotations

import os
import struct
from typing import Dict, List, Tuple, Union

import msgspec

from kvcore.protocol.machine import Input
from kvcore.protocol.messages import Key
from kvcore.scenario.faults import Action
from kvcore.scenario.faults import Spent as SpentRule
from kvcore.scenario.result import CopyRecord, Operation

MAX_MESSAGE: int = 1 << 30


class ControlError(Exception):
    """The other side spoke no language of ours, or has gone."""


class Said(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all that is said."""


# ---- runner to host --------------------------------------------------------------------------------------------------
class Assign(Said, frozen=True):
    """Be ``node``, in its ``life``-th life. ``base_ns``: the monotonic clock's reading that this run calls zero;
    ``built``: as ``kvcore.scenario.build.encode`` writes it."""

    run: str
    node: str
    life: int
    built: bytes
    base_ns: int
    journal: str = ""
    history: str = ""
    faults: bool = True
    spent: Tuple[SpentRule, ...] = ()


class Address(msgspec.Struct, frozen=True, array_like=True):
    """Where a node can be reached: its control socket and its memory."""

    life: int
    control: str
    data: str


class Book(Said, frozen=True):
    """Who is where now. A node that is not in it cannot be reached."""

    addresses: Dict[str, Address]


class Give(Said, frozen=True):
    """An input for the machine: Boot, Command."""

    input: Input


class Begin(Said, frozen=True):
    action: Action


class Finish(Said, frozen=True):
    action: Action


class Calm(Said, frozen=True):
    """No fault from now on: the liveness phase."""


class Ask(Said, frozen=True):
    """Say how you are; answered by State with the same ``n``."""

    n: int


class Carried(Said, frozen=True):
    """Answers Fired."""

    wait: int


class Verify(Said, frozen=True):
    """The run is over. Overwrite what nothing refers to (``wipe``), or compare every visible chunk's bytes and tell all
    you know."""

    wipe: bool


class Release(Said, frozen=True):
    """The run is over: forget it; answered by Idle."""


class Exit(Said, frozen=True):
    pass


ToHost = Union[Assign, Book, Give, Begin, Finish, Calm, Ask, Carried, Verify, Release, Exit]


# ---- host to runner --------------------------------------------------------------------------------------------------
class Ready(Said, frozen=True):
    pid: int
    transport: str


class Bound(Said, frozen=True):
    control: str
    data: str


class Fired(Said, frozen=True):
    """A fault of this node's plan asks for what the runner carries out (or, of the node itself, only notes). ``wait``:
    the node goes on when it hears Carried with this number, so that what was to happen to others has happened; 0: it
    does not wait."""

    actions: Tuple[Action, ...]
    wait: int = 0


class Spent(Said, frozen=True):
    """What has fired in this node's plan so far: for its next life, and for the coverage of the run."""

    spent: Tuple[SpentRule, ...]
    fired: Dict[str, int]


class Noted(Said, frozen=True):
    kind: str
    t: int
    detail: str = ""


class State(Said, frozen=True):
    """``sent`` and ``received``: messages other than beats, by (peer, its life). ``pending``: why it is not quiet."""

    n: int
    pending: Tuple[str, ...]
    sent: Dict[str, int]
    received: Dict[str, int]


class Spoiled(msgspec.Struct, frozen=True):
    """A visible chunk whose bytes are not what its key stands for."""

    location: str
    slot: int
    key: Key
    offset: int


class Checked(Said, frozen=True):
    """``inventory``: location -> [(key, num_tokens)] of what is visible."""

    wiped_bytes: int = 0
    checked_bytes: int = 0
    checked_chunks: int = 0
    spoiled: Tuple[Spoiled, ...] = ()
    inventory: Dict[str, List[Tuple[Key, int]]] = {}
    copies: Tuple[CopyRecord, ...] = ()
    operations: Tuple[Operation, ...] = ()
    counters: Dict[str, int] = {}


class Idle(Said, frozen=True):
    """``clean``: nothing of the run is left, so that the process can serve another."""

    clean: bool


class Failed(Said, frozen=True):
    """The node cannot go on. ``kind``: journal, history, memory, machine..."""

    kind: str
    text: str


FromHost = Union[Ready, Bound, Fired, Spent, Noted, State, Checked, Idle, Failed]

_encoder = msgspec.msgpack.Encoder()


class Pipe:
    """One end: what is said is queued and written when it fits; what is heard is cut into messages. Never blocks."""

    def __init__(self, read_fd: int, write_fd: int, heard: object) -> None:
        self.read_fd: int = read_fd
        self.write_fd: int = write_fd
        self.decoder: msgspec.msgpack.Decoder[Said] = msgspec.msgpack.Decoder(heard)
        self.incoming: bytearray = bytearray()
        self.outgoing: bytearray = bytearray()
        self.ended: bool = False
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)

    def say(self, message: Said) -> None:
        body = _encoder.encode(message)
        self.outgoing += struct.pack("<I", len(body)) + body
        self.flush()

    def flush(self) -> None:
        """Write what fits. A reader that has gone is noticed when it is read from."""
        while self.outgoing:
            try:
                done = os.write(self.write_fd, memoryview(self.outgoing)[: 1 << 16].tobytes())
            except BlockingIOError:
                return
            except OSError:
                self.outgoing.clear()
                return
            del self.outgoing[:done]

    def hear(self) -> List[Said]:
        """Every whole message that has come. ``ended`` is set when the other side has gone."""
        while True:
            try:
                data = os.read(self.read_fd, 1 << 18)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.ended = True
                break
            self.incoming += data
        return self._cut()

    def _cut(self) -> List[Said]:
        found: List[Said] = []
        start = 0
        while len(self.incoming) - start >= 4:
            (size,) = struct.unpack_from("<I", self.incoming, start)
            if size > MAX_MESSAGE:
                raise ControlError(f"a message of {size} bytes")
            if len(self.incoming) - start - 4 < size:
                break
            body = bytes(self.incoming[start + 4 : start + 4 + size])
            start += 4 + size
            try:
                found.append(self.decoder.decode(body))
            except msgspec.MsgspecError as error:
                raise ControlError(str(error)) from error
        del self.incoming[:start]
        return found


def pair(peer: str, life: int) -> str:
    """A node's life as counters name it."""
    return f"{peer}#{life}"
