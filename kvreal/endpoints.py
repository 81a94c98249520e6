"""Control messages between services: a node's address is where it listens (``127.0.0.1:8300``), so nobody needs a book.

ZeroMQ PUSH to PULL over TCP, one socket a direction; to processes of this user on this host, where no keys are asked
for, the same frames over a Unix socket (``near.py``). A frame's first part says whose it is ([cluster, from, to]); each
other is a message: what one input makes a node say to another goes out together. Whatever is malformed, foreign,
oversized, or claims to come from a face is counted, told once a peer, and changes nothing. Sends never wait: a message
that cannot be queued is dropped and counted, as a network would.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from functools import partial
from typing import Any, Callable, Dict, Final, Iterator, List, Optional, Protocol, Sequence, Set, Tuple, Union

import msgspec
import zmq

from kvcore.protocol.messages import (
    Answer,
    CancelRequest,
    ClearRequest,
    LookupRequest,
    MoveRequest,
    PinRequest,
    StatusRequest,
    StoreRequest,
    UnpinRequest,
    UseRequest,
    Wire,
)
from kvreal.door import Door
from kvreal.near import Near

log = logging.getLogger("kvmove.network")

FACE: Final = "http/"
"""Addresses of those who ask from within this process."""
HIGH_WATER: Final = 100_000
MAX_FRAME_BYTES: Final = 64 << 20
MAX_PEERS: Final = 20_000
"""Addresses that this process opens a socket to; a flood of made-up names ends there."""
MAX_TOLD: Final = 1_000
CLAIMS: Final = 16
"""Names that frames of one kind and address are told for: several nodes may be behind an address, and one may lie."""
TOGETHER: Final = 32
"""Messages in a frame at most."""
BATCH: Final = 256
"""Frames taken in one go: the loop's other work comes in between."""
NOW: Final = int(zmq.NOBLOCK)
NOW_AND_MORE: Final = int(zmq.NOBLOCK) | int(zmq.SNDMORE)
"""As numbers: arithmetic with names costs more than the call."""
Bytes = Union[bytes, memoryview]
CLUSTER: Final = "kvmove"
_ADDRESS: Final = re.compile(r"[A-Za-z0-9_.\-\[\]:]{1,250}:[0-9]{1,5}")
#: What only faces say, and to faces only: from the network nobody is obeyed who says it.
FACES_ONLY: Final = frozenset({
    MoveRequest, LookupRequest, PinRequest, UnpinRequest, ClearRequest, CancelRequest, StatusRequest, StoreRequest,
    UseRequest, Answer,
})  # fmt: skip


class EndpointError(Exception):
    """One line: which address cannot be used, and why."""


class Curve(Protocol):
    """What makes sockets speak CURVE (kvreal/keys.py); without one they speak in the clear."""

    def listening(self, sock: Any) -> None: ...

    def calling(self, sock: Any, address: str) -> None: ...


def endpoint_of(text: str) -> str:
    """``localhost:8300`` or ``tcp://localhost:8300`` -> ``127.0.0.1:8300``. EndpointError if it is no host and port."""
    bare = text.strip().removeprefix("tcp://")
    host, _, port = bare.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise EndpointError(f"{text!r} is no address, expected host:port, like localhost:8300")
    return f"{'127.0.0.1' if host == 'localhost' else host}:{int(port)}"


def is_loopback(host: str) -> bool:
    """Not by its first letters: ``127.example.org`` may be anywhere."""
    bare = host.removeprefix("[").removesuffix("]")
    try:
        return bare == "localhost" or ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


class Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    cluster: str
    src: str
    dst: str


class Endpoints:
    """One node's sockets."""

    def __init__(
        self,
        bind: str,
        *,
        address: str = "",
        aliases: Tuple[str, ...] = (),
        cluster: str = CLUSTER,
        curve: Optional[Curve] = None,
    ) -> None:
        """Listen at ``bind`` (host:port; port 0: any). ``address``: what peers call this node, if it is not that.
        EndpointError if the address cannot be had, or if others could reach it and there is no ``curve``."""
        self.cluster: str = cluster
        self.curve: Optional[Curve] = curve
        self.context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self.context.set(zmq.MAX_SOCKETS, MAX_PEERS + 64)
        #: what became of those who came to a listening socket of this context
        self.door: Door = Door(self.context)
        self.pull: zmq.Socket[Any] = self._listening(zmq.PULL, bind)
        bound: str = self.pull.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")
        self.address: str = endpoint_of(address or bound)
        self.names: Set[str] = {self.address, *aliases}
        #: None with keys: they are to say who may speak
        self.near: Optional[Near] = Near(*self.names) if curve is None else None
        self.peers: Dict[str, Tuple[Any, bytes]] = {}
        #: headers as they have arrived before, and from whom
        self.heads: Dict[bytes, str] = {}
        #: whether sends are kept, and what is: address -> messages
        self.corked: bool = False
        self.held: Dict[str, List[bytes]] = {}
        #: whether there may be more than was taken
        self.more: bool = False
        #: sockets of others in this context, closed with it
        self.others: List[Any] = []
        #: messages to faces
        self.local: Callable[[str, Wire], None] = lambda dst, message: None
        self.counters: Dict[str, int] = {
            "frames_sent": 0, "frames_received": 0, "frames_dropped": 0, "frames_malformed": 0, "frames_foreign": 0,
            "frames_refused": 0, "frames_near": 0,
        }  # fmt: skip
        #: (kind, address) -> who it said it was, of frames that have been told
        self.told: Dict[Tuple[str, str], Set[str]] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self._header = msgspec.msgpack.Decoder(Header).decode
        self._body = msgspec.msgpack.Decoder(Wire).decode

    def _listening(self, kind: int, bind: str) -> Any:
        if self.curve is None and not is_loopback(endpoint_of(bind).rpartition(":")[0]):
            raise EndpointError(f"{bind}: others could reach it; give keys (see `kvmove keys new`), or use localhost")
        sock = self.context.socket(kind)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVHWM, HIGH_WATER)
        sock.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        if self.curve is not None:
            self.curve.listening(sock)
        self.door.watch(sock, self.curve is not None)
        try:
            sock.bind(f"tcp://{endpoint_of(bind)}")
        except zmq.ZMQError as error:
            sock.close()
            raise EndpointError(f"cannot listen at {bind}: {error.strerror or error}") from error
        return sock

    # ---- sending
    def send(self, dst: str, message: Wire) -> bool:
        """False if it was dropped: the address is none, or the queue is full."""
        if dst.startswith(FACE):
            self.local(dst, message)
            return True
        body = self._encode(message)
        if not self.corked:
            return self._send(dst, [body])
        held = self.held.get(dst)
        if held is None:
            self.held[dst] = [body]
        elif len(held) < TOGETHER:
            held.append(body)
        else:
            self._send(dst, held)
            self.held[dst] = [body]
        return True

    def cork(self) -> None:
        """Keep what is sent until ``uncork``."""
        self.corked = True

    def uncork(self) -> None:
        self.corked = False
        if self.held:
            held, self.held = self.held, {}
            for dst, bodies in held.items():
                self._send(dst, bodies)

    def _send(self, dst: str, bodies: List[bytes]) -> bool:
        peer = self.peers.get(dst) or self._call(dst)
        if peer is None:
            self.counters["frames_dropped"] += len(bodies)
            return False
        if self.near is not None and (taken := self.near.send(dst, [peer[1], *bodies])) is not None:
            self.counters["frames_near" if taken else "frames_dropped"] += len(bodies)
            self.counters["frames_sent"] += len(bodies) if taken else 0
            return taken
        send = peer[0].send
        try:
            send(peer[1], NOW_AND_MORE)
            for body in bodies[:-1]:
                send(body, NOW_AND_MORE)
            send(bodies[-1], NOW)
        except zmq.ZMQError:
            self.counters["frames_dropped"] += len(bodies)
            return False
        self.counters["frames_sent"] += len(bodies)
        return True

    def _call(self, dst: str) -> Optional[Tuple[Any, bytes]]:
        if len(self.peers) >= MAX_PEERS or not _ADDRESS.fullmatch(dst):
            return None
        sock = self.context.socket(zmq.PUSH)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.SNDHWM, HIGH_WATER)
        sock.setsockopt(zmq.RECONNECT_IVL, 20)
        sock.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        try:
            if self.curve is not None:
                self.curve.calling(sock, dst)
            sock.connect(f"tcp://{dst}")
        except zmq.ZMQError:
            sock.close(linger=0)
            return None
        self.peers[dst] = peer = (sock, self._encode(Header(self.cluster, self.address, dst)))
        return peer

    def forget(self, address: str) -> None:
        """Nobody is there any more: what is queued for it is dropped."""
        peer = self.peers.pop(address, None)
        if peer is not None:
            peer[0].close(linger=0)
        if self.near is not None:
            self.near.forget(address)

    def data_endpoint(self, name: str) -> str:
        """Messages carry it; nothing is known here."""
        return ""

    # ---- receiving
    def receive(self) -> Tuple[List[Tuple[str, Wire]], bool]:
        """((src, message) of what has arrived, at most BATCH by ZeroMQ; whether there may be more)."""
        found = list(self.arriving())
        return found, self.more

    def arriving(self) -> Iterator[Tuple[str, Wire]]:
        """The same one by one: what the first asks for can go out before the next is looked at."""
        yield from self.nearby()
        recv: Callable[..., Any] = self.pull.recv
        self.more = True
        for _ in range(BATCH):
            try:
                frames = [recv(NOW, False)]
            except zmq.Again:
                self.more = False
                return
            while frames[-1].more:
                frames.append(recv(NOW, False))
            head, bodies = frames[0].bytes, [frame.buffer for frame in frames[1:]]
            yield from self._known(head, bodies) or self._decode(head, bodies, partial(_whence, frames[0]))

    def nearby(self) -> Iterator[Tuple[str, Wire]]:
        """What has come from this host, and no look at what else has: that costs as much as a message."""
        if self.near is not None:
            for parts in self.near.arriving():
                yield from self._known(parts[0], parts[1:]) or self._decode(parts[0], parts[1:], _near)
            self.counters["frames_malformed"] += self.near.take_garbled()

    def _known(self, head: bytes, bodies: Sequence[Bytes]) -> List[Tuple[str, Wire]]:
        """A good frame of a node that has been heard before; anything else is looked at closely."""
        src = self.heads.get(head)
        if src is None or not 1 <= len(bodies) <= TOGETHER:
            return []
        found: List[Tuple[str, Wire]] = []
        try:
            for body in bodies:
                message: Wire = self._body(body)
                if type(message) in FACES_ONLY:
                    return []
                found.append((src, message))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return []
        self.counters["frames_received"] += len(found)
        return found

    def _decode(self, head: bytes, bodies: Sequence[Bytes], whence: Callable[[], str]) -> List[Tuple[str, Wire]]:
        """All of a frame's messages; none, if anything about it is wrong."""
        if not 1 <= len(bodies) <= TOGETHER:
            return self._bad("malformed", whence, f"{len(bodies) + 1} parts, expected 2 to {TOGETHER + 1}")
        try:
            header = self._header(head)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return self._bad("malformed", whence, f"header: {error}")
        if header.cluster != self.cluster or header.dst not in self.names or not _ADDRESS.fullmatch(header.src):
            whose = f"{header.src[:80]!r} of {header.cluster[:80]!r} to {header.dst[:80]!r}"
            return self._bad("foreign", whence, f"{whose}; this is {self.address} of {self.cluster!r}", header.src)
        found: List[Tuple[str, Wire]] = []
        for body in bodies:
            try:
                message: Wire = self._body(body)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                return self._bad("malformed", whence, f"message of {header.src[:80]}: {error}", header.src)
            if type(message) in FACES_ONLY:
                why = f"{type(message).__name__} of {header.src[:80]}: ask by HTTP"
                return self._bad("refused", whence, why, header.src)
            found.append((header.src, message))
        self.counters["frames_received"] += len(found)
        if len(self.heads) < MAX_PEERS:
            self.heads[head] = header.src
        return found

    def _bad(self, kind: str, whence: Callable[[], str], why: str, claim: str = "") -> List[Tuple[str, Wire]]:
        """Count, and tell once an address and ``claim``: who the frame says that it is from."""
        self.counters[f"frames_{kind}"] += 1
        peer = whence()
        claims = self.told.get((kind, peer))
        if claims is None:
            if len(self.told) >= MAX_TOLD:
                return []
            claims = self.told[(kind, peer)] = set()
        if claim not in claims and len(claims) < CLAIMS:
            claims.add(claim)
            log.warning("%s frame from %s: %s; more of its kind are counted only", kind, peer, why[:300])
        return []

    # ---- the end
    def send_off(self) -> None:
        """Let what was sent leave this process, then close."""
        for sock, _ in self.peers.values():
            sock.close(linger=1000)
        self.peers = {}
        if self.near is not None:
            self.near.send_off()
        for sock in (self.pull, *self.others):
            sock.close(linger=0)
        self.context.term()

    def close(self) -> None:
        if self.near is not None:
            self.near.close()
        self.context.destroy(linger=0)


def _near() -> str:
    return "this host"


def _whence(frame: Any) -> str:
    try:
        return str(frame.get("Peer-Address"))
    except (zmq.ZMQError, UnicodeDecodeError):
        return "unknown"
