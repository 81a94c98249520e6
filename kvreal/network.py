"""Control messages between nodes: ZeroMQ PUSH to PULL over TCP, one socket a direction.

A frame has two parts: who to whom ([run, src, its life, dst, its life]) and the message. Whatever is malformed,
foreign, oversized, of another run or for another life is counted and dropped; nothing that arrives can end the loop.
Sends never wait: a message that cannot be queued is dropped and counted, as a network would.
"""

from __future__ import annotations

from typing import Any, Dict, Final, List, Optional, Tuple

import msgspec
import zmq

from kvcore.protocol.messages import Beat, Wire
from kvreal.control import Address, pair
from kvreal.keys import Keys
from kvreal.near import Near

HIGH_WATER: Final = 100_000
MAX_FRAME_BYTES: Final = 64 << 20
BATCH: Final = 256
"""Frames taken in one go: the loop's other work comes in between."""


class Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    run: str
    src: str
    src_life: int
    dst: str
    dst_life: int


class Network:
    """One node's sockets. A host keeps its PULL socket from run to run. ``bind``: the address at which it listens;
    ``keys``: what its sockets speak CURVE with, where others could reach that."""

    def __init__(self, bind: str = "127.0.0.1", keys: Optional[Keys] = None) -> None:
        self.keys: Optional[Keys] = keys
        self.context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self.pull: zmq.Socket[Any] = self.context.socket(zmq.PULL)
        self.pull.setsockopt(zmq.LINGER, 0)
        self.pull.setsockopt(zmq.RCVHWM, HIGH_WATER)
        self.pull.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        if keys is not None:
            keys.listening(self.pull)
        self.pull.bind(f"tcp://{bind}:0")
        self.endpoint: str = self.pull.getsockopt_string(zmq.LAST_ENDPOINT)
        self.near: Optional[Near] = Near(self.endpoint) if keys is None else None
        self.peers: Dict[str, Tuple[Address, Any, bytes]] = {}
        self.run: str = ""
        self.address: str = ""
        self.life: int = 0
        self.sent: Dict[str, int] = {}
        self.received: Dict[str, int] = {}
        self.counters: Dict[str, int] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self._header = msgspec.msgpack.Decoder(Header).decode
        self._body = msgspec.msgpack.Decoder(Wire).decode

    def begin(self, run: str, address: str, life: int) -> None:
        """A new run: nothing of the last one is known, and what still arrives from it is dropped."""
        self.close_peers()
        self.run = run
        self.address = address
        self.life = life
        self.sent = {}
        self.received = {}
        self.counters = {"frames_sent": 0, "frames_received": 0, "frames_dropped": 0, "frames_malformed": 0}

    def close_peers(self) -> None:
        for _, socket, _ in self.peers.values():
            socket.close(linger=0)
        self.peers = {}
        if self.near is not None:
            self.near.hang_up()

    def book(self, addresses: Dict[str, Address]) -> None:
        """Who is where now: sockets to lives that are over are closed, with what was still queued in them. A node
        reaches itself (a move between its own locations) as it reaches others."""
        for name in list(self.peers):
            if addresses.get(name) != self.peers[name][0]:
                gone, socket, _ = self.peers.pop(name)
                socket.close(linger=0)
                if self.near is not None:
                    self.near.forget(gone.control)
        for name, address in addresses.items():
            if name in self.peers:
                continue
            socket = self.context.socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
            if self.keys is not None:
                self.keys.calling(socket, address.control)
            socket.connect(address.control)
            header = self._encode(Header(self.run, self.address, self.life, name, address.life))
            self.peers[name] = (address, socket, header)
            if self.near is not None:
                self.near.greet(address.control)

    def data_endpoint(self, name: str) -> str:
        peer = self.peers.get(name)
        return peer[0].data if peer is not None else ""

    def send(self, dst: str, message: Wire) -> bool:
        """False if it was dropped: nobody is there, or the queue is full."""
        peer = self.peers.get(dst)
        if peer is None:
            self.counters["frames_dropped"] += 1
            return False
        address, socket, header = peer
        frame = [header, self._encode(message)]
        try:
            taken = self.near.send(address.control, frame) if self.near is not None else None
            if taken is None:
                socket.send_multipart(frame, zmq.NOBLOCK)
        except zmq.ZMQError:
            taken = False
        if taken is False:
            self.counters["frames_dropped"] += 1
            return False
        self.counters["frames_sent"] += 1
        if type(message) is not Beat:
            name = pair(dst, address.life)
            self.sent[name] = self.sent.get(name, 0) + 1
        return True

    def receive(self, far: bool = True) -> List[Tuple[str, Wire]]:
        """(src, message) of what has arrived, at most BATCH by ZeroMQ; not ``far``: of what has come from this host."""
        frames: List[List[bytes]] = []
        if self.near is not None:
            frames = self.near.arriving()
            self.counters["frames_malformed"] = self.counters.get("frames_malformed", 0) + self.near.take_garbled()
        for _ in range(BATCH if far else 0):
            try:
                frames.append(self.pull.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                break
        return [item for item in map(self._decode, frames) if item is not None]

    def sources(self) -> List[Any]:
        """What to poll: readable when something has come."""
        return [self.pull, *([self.near.fileno()] if self.near is not None else [])]

    def _decode(self, parts: List[bytes]) -> Optional[Tuple[str, Wire]]:
        if len(parts) != 2:
            self.counters["frames_malformed"] += 1
            return None
        try:
            header = self._header(parts[0])
            if (header.run, header.dst, header.dst_life) != (self.run, self.address, self.life):
                self.counters["frames_foreign"] = self.counters.get("frames_foreign", 0) + 1
                return None
            message: Wire = self._body(parts[1])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self.counters["frames_malformed"] += 1
            return None
        self.counters["frames_received"] += 1
        if type(message) is not Beat:
            name = pair(header.src, header.src_life)
            self.received[name] = self.received.get(name, 0) + 1
        return header.src, message

    def send_off(self) -> None:
        """Before this process ends by its own hand: let what was sent leave it."""
        for _, socket, _ in self.peers.values():
            socket.close(linger=1000)
        self.peers = {}
        if self.near is not None:
            self.near.send_off()
        self.pull.close(linger=0)
        self.context.term()

    def close(self) -> None:
        self.close_peers()
        if self.near is not None:
            self.near.close()
        self.pull.close(linger=0)
        self.context.term()
