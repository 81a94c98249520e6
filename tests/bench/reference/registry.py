"""Many workers of the reference that hold chunks and do nothing else; run by the interpreter that has ``lmcache``.

    PYTHON registry.py PULL REPLY

Lines on stdin: ``add COUNT FIRST TOKENS``: that many instances more, each with a prompt of its own of TOKENS tokens, of
which the last one's begins with the token FIRST; answers ``added``. ``admit CHUNKS BATCH``: so many new chunks of the
last instance, BATCH a message, then the prompt's own; answers ``admitted``.
"""

from __future__ import annotations

import sys
from typing import List

import msgspec
import zmq
from lmcache.v1.cache_controller.message import BatchedKVOperationMsg, KVOpEvent, Msg, OpType, RegisterMsg
from lmcache.v1.token_database import ChunkedTokenDatabase

CPU = "LocalCPUBackend"


class Registry:
    def __init__(self, pull: int, reply: int) -> None:
        context = zmq.Context()
        self.context = context
        self.push = context.socket(zmq.PUSH)
        self.push.setsockopt(zmq.SNDHWM, 0)
        self.push.connect(f"tcp://127.0.0.1:{pull}")
        self.ask = context.socket(zmq.REQ)
        self.ask.connect(f"tcp://127.0.0.1:{reply}")
        self.tokens = ChunkedTokenDatabase()
        self.count = 0
        self.seq = 0
        self.fresh = 1 << 50

    def hashes(self, first: int, count: int) -> List[int]:
        prompt = list(range(first, first + count))
        return [key for _, _, key in self.tokens.process_tokens(prompt, make_key=False)]

    def add(self, count: int, first: int, tokens: int) -> None:
        for number in range(count):
            name = f"i{self.count}"
            self.count += 1
            # Where nobody listens: connecting succeeds all the same, and nobody is sent anything.
            self.ask.send(msgspec.msgpack.encode(RegisterMsg(name, 0, "127.0.0.1", 1 + self.count, None)))
            msgspec.msgpack.decode(self.ask.recv(), type=Msg)
            self.seq = 0
            last = number == count - 1
            self.store(name, self.hashes(first if last else 1_000_000 + self.count * 10_000, tokens), 64)

    def store(self, name: str, keys: List[int], batch: int) -> None:
        for start in range(0, len(keys), batch):
            events = []
            for key in keys[start : start + batch]:
                events.append(KVOpEvent(OpType.ADMIT, key, self.seq))
                self.seq += 1
            self.push.send(msgspec.msgpack.encode(BatchedKVOperationMsg(name, 0, CPU, events)))

    def admit(self, chunks: int, batch: int) -> None:
        self.store(f"i{self.count - 1}", list(range(self.fresh, self.fresh + chunks)), batch)
        self.fresh += chunks


def main() -> None:
    registry = Registry(int(sys.argv[1]), int(sys.argv[2]))
    print("ready", flush=True)
    for line in sys.stdin:
        what, *rest = line.split()
        numbers = [int(text) for text in rest]
        if what == "add":
            registry.add(*numbers)
            print("added", flush=True)
        elif what == "admit":
            registry.admit(*numbers[:2])
            registry.store(f"i{registry.count - 1}", registry.hashes(numbers[2], 256), 64)
            print("admitted", flush=True)


if __name__ == "__main__":
    main()
