"""Many workers at a controller that hold chunks and do nothing else: frames of real workers, from one process."""

from __future__ import annotations

import time
from typing import Any, Dict, List, Sequence, Tuple

import msgspec
import zmq

from kvcore.protocol.chunks import chunk_keys
from kvcore.protocol.messages import Beat, Delta, Entry, Location, LocationSeq, Namespace, Register, Resync, Snap, Wire

CPU = "LocalCPUBackend"
NAMESPACE = Namespace(bytes_per_token=128, chunk_tokens=256)


def entries_of(tokens: Sequence[int]) -> Tuple[Entry, ...]:
    keys, lens = chunk_keys(NAMESPACE, tokens)
    return tuple([Entry(key, keys[i - 1] if i else b"", lens[i]) for i, key in enumerate(keys)])


class Crowd:
    """``dead`` of the controller must be long: nobody here beats again."""

    def __init__(self, controller: str) -> None:
        self.controller: str = controller
        self.context: zmq.Context[Any] = zmq.Context()
        self.pull: zmq.Socket[Any] = self.context.socket(zmq.PULL)
        self.pull.setsockopt(zmq.RCVHWM, 0)
        self.push: zmq.Socket[Any] = self.context.socket(zmq.PUSH)
        self.push.setsockopt(zmq.SNDHWM, 0)
        self.push.setsockopt(zmq.LINGER, 0)
        self.push.connect(f"tcp://{controller}")
        self.encode: Any = msgspec.msgpack.Encoder().encode
        self.decode: Any = msgspec.msgpack.Decoder(Wire).decode
        #: address -> (epoch, what it holds, how far its inventory is)
        self.epochs: Dict[str, int] = {}
        self.held: Dict[str, Tuple[Entry, ...]] = {}
        self.seqs: Dict[str, int] = {}

    def close(self) -> None:
        self.context.destroy(linger=0)

    def send(self, src: str, message: Any) -> None:
        self.push.send_multipart([self.encode(["kvmove", src, self.controller]), self.encode(message)])

    def add(self, name: str, tokens: Sequence[int], slots: int = 1 << 20) -> str:
        """One instance of one rank that holds this prompt. Returns its address; ``settle`` lets it be believed."""
        self.pull.bind("tcp://127.0.0.1:*")
        address = self.pull.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")
        self.held[address] = entries_of(tokens)
        nonce = len(self.held)
        self.send(address, Register(name, 0, nonce, NAMESPACE, (Location(CPU, slots),), "", time.time_ns()))
        return address

    def settle(self, timeout_s: float = 60.0) -> None:
        """Until every one of them has its epoch and has said all that it holds."""
        wanted = set(self.held) - set(self.seqs)
        until = time.monotonic() + timeout_s
        while wanted:
            if not self.pull.poll(200):
                assert time.monotonic() < until, f"{len(wanted)} are not heard"
                continue
            head, body = self.pull.recv_multipart()
            address = msgspec.msgpack.decode(head)[2]
            message = self.decode(body)
            if type(message).__name__ == "Registered":
                self.epochs[address] = message.epoch
                inc = (message.epoch, 0)
                self.send(address, Beat(message.epoch, (LocationSeq(CPU, inc, 1),)))
            elif isinstance(message, Resync):
                self.send(address, Snap(CPU, (self.epochs[address], 0), 1, self.held[address]))
                self.seqs[address] = 1
                wanted.discard(address)

    def admit(self, address: str, entries: List[Entry], batch: int) -> None:
        """``entries`` stored in steps of ``batch`` chunks: a Delta each."""
        inc = (self.epochs[address], 0)
        for start in range(0, len(entries), batch):
            self.seqs[address] += 1
            self.send(address, Delta(CPU, inc, self.seqs[address], tuple(entries[start : start + batch])))
