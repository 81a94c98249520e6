"""The core in the small: a pool's slots, keys of a prompt, messages as bytes, a whole move through bare machines, and
one flow of the fabric. Saved and compared by `make bench-compare`.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any, Deque, Dict, List, Tuple

import msgspec
import pytest

from kvcore.protocol.chunks import chunk_keys
from kvcore.protocol.config import Config, ControllerSpec, Rules, WorkerSpec
from kvcore.protocol.machine import Boot, CopyDone, FillDone, Machine, Received, Send, StartCopy, StartFill
from kvcore.protocol.messages import (
    Answer,
    Delta,
    Entry,
    Fetch,
    Key,
    Location,
    Message,
    MoveRequest,
    Namespace,
    Pinned,
    StoreRequest,
    Wire,
)
from kvcore.protocol.pool import Pool
from kvcore.scenario.build import make_machine
from tests.bench.test_fabric_speed import Traffic

NAMESPACE = Namespace(bytes_per_token=131072)
CHUNKS = 256


def keys_of(count: int, first: int = 0) -> Tuple[Key, ...]:
    return tuple((first + number).to_bytes(32, "big") for number in range(count))


# ---- pools and keys -------------------------------------------------------------------------------------------------
def test_take_and_free_a_slot(benchmark: Any) -> None:
    pool = Pool("cpu", CHUNKS, Rules())

    def once() -> None:
        pool.unref(pool.take(False))

    benchmark(once)
    assert pool.refs == {}


def test_put_a_chunk_that_evicts_another(benchmark: Any) -> None:
    """A full pool: the least recently used one makes room each time."""
    pool = Pool("cpu", CHUNKS, Rules())
    numbers = itertools.count(1)

    def once() -> None:
        number = next(numbers)
        slot = pool.take(True)
        pool.put(number.to_bytes(32, "big"), slot, b"", 256, number)
        pool.drops.clear()
        pool.adds.clear()

    for _ in range(CHUNKS):
        once()
    benchmark(once)
    assert len(pool.index) == CHUNKS


@pytest.mark.parametrize("chunks", [1, CHUNKS])
def test_longest_prefix_held(benchmark: Any, chunks: int) -> None:
    pool = Pool("cpu", CHUNKS, Rules())
    keys = keys_of(chunks)
    for number, key in enumerate(keys):
        pool.put(key, pool.take(False), keys[number - 1] if number else b"", 256, number)
    assert len(benchmark(pool.prefix, keys)) == chunks


@pytest.mark.parametrize("tokens", [12, 16384])
def test_keys_of_a_prompt(benchmark: Any, tokens: int) -> None:
    keys, _ = benchmark(chunk_keys, NAMESPACE, tuple(range(tokens)))
    assert len(keys) == -(-tokens // 256)


# ---- messages as bytes ----------------------------------------------------------------------------------------------
def _fetch(chunks: int) -> Fetch:
    slots = tuple(range(chunks))
    return Fetch(1, 7, "LocalCPUBackend", (1, 0), keys_of(chunks), (256,) * chunks, "tcp://127.0.0.1:9000", 3,
                 "LocalCPUBackend", (3, 11), slots, 10**10, 10**15)  # fmt: skip


MESSAGES: Dict[str, Message] = {
    "Pinned of 16": Pinned(7, (1, 0), (3, 11), tuple(range(16)), 10**15),
    "Fetch of 1": _fetch(1),
    "Fetch of 256": _fetch(CHUNKS),
    "Delta of 256": Delta("LocalCPUBackend", (1, 0), 9, tuple([Entry(key, b"", 256) for key in keys_of(CHUNKS)])),
}


@pytest.mark.parametrize("name", list(MESSAGES))
def test_a_message_there_and_back(benchmark: Any, name: str) -> None:
    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(Wire).decode
    message = MESSAGES[name]
    assert benchmark(lambda: decode(encode(message))) == message


# ---- a whole move ---------------------------------------------------------------------------------------------------
class Bare:
    """A controller and two workers, their messages delivered at once; copies and fills are done as soon as asked."""

    def __init__(self, chunks: int = CHUNKS) -> None:
        config = Config(beat_ns=10**18, dead_ns=10**19, deadline_ns=10**18)
        places = (Location("cpu", chunks),)
        specs = [ControllerSpec("ctl", config)]
        workers = [WorkerSpec(f"{name}/0", name, 0, "ctl", NAMESPACE, places, config) for name in "ab"]
        self.machines: Dict[str, Machine] = {one.name: make_machine(one) for one in (*specs, *workers)}
        self.answers: List[Answer] = []
        self.queue: Deque[Tuple[str, Any]] = deque()
        self.now = 0
        self.steps = 0
        for name in self.machines:
            self.give(name, Boot(nonce=len(self.queue) + 1))

    def give(self, to: str, item: Any) -> None:
        """That input, and all that comes of it."""
        self.queue.append((to, item))
        while self.queue:
            name, what = self.queue.popleft()
            self.now += 1000
            self.steps += 1
            for effect in self.machines[name].handle(self.now, what):
                if type(effect) is Send:
                    if effect.dst in self.machines:
                        self.queue.append((effect.dst, Received(name, effect.msg)))
                    elif isinstance(effect.msg, Answer):
                        self.answers.append(effect.msg)
                elif type(effect) is StartCopy:
                    self.queue.append((name, CopyDone(effect.rid, True)))
                elif type(effect) is StartFill:
                    self.queue.append((name, FillDone(effect.fid, True)))


@pytest.mark.parametrize("chunks", [1, 16, CHUNKS, 4096])
def test_a_move_through_bare_machines(benchmark: Any, chunks: int) -> None:
    bare = Bare(max(chunks, CHUNKS))
    keys, lens = keys_of(chunks), (256,) * chunks
    bare.give("a/0", Received("client", StoreRequest("s", "cpu", keys, lens)))
    places = [("a", "cpu"), ("b", "cpu")]
    numbers = itertools.count()

    def move() -> None:
        op = f"m{next(numbers)}"
        bare.give("ctl", Received("client", MoveRequest(op, places[0], places[1], keys, lens)))
        places.reverse()

    move()
    steps, bare.answers = bare.steps, []
    move()
    assert [answer.state for answer in bare.answers][-1] == "done" and bare.answers[-1].num_tokens == 256 * chunks
    benchmark.extra_info["inputs"] = bare.steps - steps
    benchmark(move)
    assert bare.answers[-1].state == "done"


# ---- the fabric -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window", [1, 64])
def test_a_flow_of_the_fabric(benchmark: Any, window: int) -> None:
    traffic = Traffic(100, window)
    traffic.run(window)
    benchmark(traffic.run, 1)
    assert len(traffic.fabric.flows) == window
