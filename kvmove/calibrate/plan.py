"""What calibration plays on real processes: scenarios, and what each of their moves is there to tell.

Every move is asked for when all is quiet, as a serving instance's moves are, unless it is there to be in another's way.
Prompts go back and forth between two places, so that nothing need be stored again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from kvcore.scenario.build import Built, build
from kvcore.scenario.generate import expand
from kvcore.scenario.loader import loads
from kvcore.scenario.topology import LOCATIONS

KIB: Final = 1 << 10
MIB: Final = 1 << 20
#: Between two CPU memories; elsewhere every second one, up to LARGEST_ELSEWHERE.
SIZES: Final = (32 * KIB, 256 * KIB, MIB, 4 * MIB, 32 * MIB, 128 * MIB, 512 * MIB)
QUICK_SIZES: Final = (32 * KIB, MIB, 4 * MIB, 32 * MIB, 128 * MIB)
OPENER: Final = "first"
SMALL: Final = 4 * MIB
"""Moves up to that size take as long as what surrounds them."""
ELSEWHERE: Final = (32 * KIB, MIB, 4 * MIB, 32 * MIB)
#: Of 16 KiB each: what chunks cost by their number.
CHUNKS: Final = (1, 64, 512, 1024)
SMALL_CHUNK: Final = 16 * KIB
LARGE_CHUNK: Final = 32 * MIB
#: What two copies at once carry each.
CONTENDED: Final = 64 * MIB
LOOKUPS: Final = 40
"""Asked at once: the controller then goes from one to the next without falling asleep."""


class Ask(msgspec.Struct, frozen=True):
    """One move: what it moves and where to."""

    what: str
    source: str
    target: str
    inside: bool
    nbytes: int
    chunks: int
    ends: str = ""
    """From which instance to which."""
    group: int = 0
    """Moves of one group are under way at once."""
    push: bool = False
    """The source carries the bytes."""


class Part(msgspec.Struct, frozen=True):
    """One scenario, and its moves by the names of their steps."""

    name: str
    built: Built
    asks: dict[str, Ask]


class Writer:
    """Builds one part."""

    def __init__(
        self,
        name: str,
        chunk_bytes: int,
        token_bytes: int,
        instances: dict[str, dict[str, int]],
        ranks: int = 1,
        push: bool = False,
    ) -> None:
        """``instances``: of each, the bytes that each kind of location must have room for. ``push``: sources carry the
        bytes; the part then has a name of its own."""
        self.name: str = name
        self.token_bytes: int = token_bytes
        self.chunk_tokens: int = chunk_bytes // token_bytes
        self.ranks: int = ranks
        self.push: bool = push
        self.steps: list[str] = []
        self.asks: dict[str, Ask] = {}
        self.head: list[str] = [
            f"name: calibrate-{name}",
            f"kv: {{bytes_per_token: {token_bytes} B, chunk: {self.chunk_tokens} tokens,"
            f" direction: {'push' if push else 'read'}}}",
            "instances:",
        ]
        for instance, places in instances.items():
            rooms = ", ".join(f"{LOCATIONS[kind]}: {room} B" for kind, room in places.items())
            self.head.append(f"  {instance}: {{ranks: {ranks}, locations: {{{rooms}}}}}")

    def store(self, instance: str, kind: str, prompt: str, nbytes: int) -> None:
        at = f"{instance}/{LOCATIONS[kind]}"
        self.steps.append(f"store: {{at: {at}, prompt: {prompt}, tokens: {nbytes // self.token_bytes}}}")

    def open(self, number: int) -> None:
        """A small move before the others: the first between two processes takes longer, and is counted apart. A prompt
        for it must have been stored in ``a``'s CPU memory."""
        here, there = turn(number)
        self.move(OPENER, SIZES[0], (here, "cpu"), (there, "cpu"))
        self.settle()

    def use(self, instance: str, kind: str, prompt: str) -> None:
        self.steps.append(f"use: {{at: {instance}/{LOCATIONS[kind]}, prompt: {prompt}}}")

    def move(self, prompt: str, nbytes: int, source: tuple[str, str], target: tuple[str, str], group: int = 0) -> None:
        """Of one group: at once, and the next ``settle`` waits for all."""
        name = f"m-{len(self.asks)}"
        chunks = -(-nbytes // (self.chunk_tokens * self.token_bytes))
        inside = source[0] == target[0]
        self.asks[name] = Ask(
            self.name, source[1], target[1], inside, nbytes // self.ranks, chunks, f"{source[0]}-{target[0]}", group,
            self.push and not inside,
        )  # fmt: skip
        places = [f"{instance}/{LOCATIONS[kind]}" for instance, kind in (source, target)]
        also = ", background: true" if group else ""
        self.steps.append(f"move: {{from: {places[0]}, to: {places[1]}, prompt: {prompt}, as: {name}{also}}}")

    def lookup(self, prompt: str) -> None:
        self.steps.append(f"lookup: {{prompt: {prompt}, background: true, as: l-{len(self.steps)}}}")

    def settle(self) -> None:
        self.steps.append("settle")

    def part(self) -> Part:
        text = "\n".join([*self.head, "steps:", *(f"  - {step}" for step in self.steps), ""])
        return Part(f"{self.name}-push" if self.push else self.name, build(expand(loads(text, self.name))), self.asks)


def turn(number: int) -> tuple[str, str]:
    """From where to where the moves of a round go: there and back."""
    return ("a", "b") if number % 2 == 0 else ("b", "a")


def sizes(largest: int, quick: bool, rounds: int, push: bool = False) -> Part:
    """One chunk where 32 MiB suffice, from one CPU memory to another and back; read at the end."""
    chosen = [size for size in (QUICK_SIZES if quick else SIZES) if size <= largest]
    room = sum(max(size, LARGE_CHUNK) for size in [*chosen, LARGE_CHUNK])
    writer = Writer("sizes", LARGE_CHUNK, 32 * KIB, {"a": {"cpu": room}, "b": {"cpu": room}}, push=push)
    writer.store("a", "cpu", OPENER, SIZES[0])
    for size in chosen:
        writer.store("a", "cpu", f"p{size}", size)
    writer.settle()
    for number in range(rounds):  # up and down again: small ones come after small ones, and find the caches so
        here, there, order = ("a", "b", chosen) if number % 2 == 0 else ("b", "a", chosen[::-1])
        writer.open(number)
        for size in order:
            writer.move(f"p{size}", size, (here, "cpu"), (there, "cpu"))
            writer.settle()
    for size in chosen:
        if size <= LARGE_CHUNK:
            writer.use("a" if rounds % 2 == 0 else "b", "cpu", f"p{size}")
    return writer.part()


def seldom() -> Part:
    """The small sizes, a move each, soon after the nodes have started: what was not done for a while takes longer."""
    chosen = [size for size in SIZES if size <= SMALL]
    room = (len(chosen) + 1) * SMALL
    writer = Writer("sizes", SMALL, 32 * KIB, {"a": {"cpu": room}, "b": {"cpu": room}})
    writer.store("a", "cpu", OPENER, SIZES[0])
    for size in chosen:
        writer.store("a", "cpu", f"p{size}", size)
    writer.settle()
    writer.open(0)
    for size in chosen:
        writer.move(f"p{size}", size, ("a", "cpu"), ("b", "cpu"))
        writer.settle()
    return msgspec.structs.replace(writer.part(), name="seldom")


def chunks(rounds: int) -> Part:
    """The same few bytes a chunk, in ever more chunks."""
    room = sum(CHUNKS) * SMALL_CHUNK + SIZES[0]
    writer = Writer("chunks", SMALL_CHUNK, 4 * KIB, {"a": {"cpu": room}, "b": {"cpu": room}})
    writer.store("a", "cpu", OPENER, SIZES[0])
    for count in CHUNKS:
        writer.store("a", "cpu", f"p{count}", count * SMALL_CHUNK)
    writer.settle()
    for number in range(rounds):
        here, there = turn(number)
        writer.open(number)
        for count in CHUNKS if number % 2 == 0 else CHUNKS[::-1]:
            writer.move(f"p{count}", count * SMALL_CHUNK, (here, "cpu"), (there, "cpu"))
            writer.settle()
    return writer.part()


def kinds(pairs: Sequence[tuple[str, str, bool]], rounds: int, push: bool = False) -> Part:
    """(source, target, inside) there and back again, in a few sizes. Pushed: those between two processes."""
    pairs = [pair for pair in pairs if not (push and pair[2])]
    places = {kind for source, target, _ in pairs for kind in (source, target)}
    room = len(ELSEWHERE) * LARGE_CHUNK * (len(pairs) + 2)
    every = {kind: room for kind in LOCATIONS if kind in places}
    writer = Writer("kinds", LARGE_CHUNK, 32 * KIB, {"a": every, "b": every}, push=push)
    prompts = {pair: {size: f"p-{number}-{size}" for size in ELSEWHERE} for number, pair in enumerate(pairs)}
    writer.store("a", "cpu", OPENER, SIZES[0])
    for (source, _, _), named in prompts.items():
        for size, prompt in named.items():
            writer.store("a", source, prompt, size)
    writer.settle()
    for number in range(rounds):
        writer.open(number)
        for (source, target, inside), named in prompts.items():
            ends = (("a", source), ("a" if inside else "b", target))
            for size, prompt in named.items():
                writer.move(prompt, size, *(ends if number % 2 == 0 else ends[::-1]))
                writer.settle()
    return writer.part()


def contended(rounds: int) -> Part:
    """Two copies at once: by one process (odd groups), and by two (even ones)."""
    room = {"cpu": 4 * CONTENDED}
    writer = Writer("contended", CONTENDED // 2, 32 * KIB, dict.fromkeys("abcd", room))
    for instance, prompt in (("a", "p"), ("a", "q"), ("c", "r")):
        writer.store(instance, "cpu", prompt, CONTENDED)
    writer.settle()
    for number in range(rounds):
        writer.move("p", CONTENDED, ("a", "cpu"), ("b", "cpu"), 2 * number + 1)
        writer.move("q", CONTENDED, ("a", "cpu"), ("b", "cpu"), 2 * number + 1)
        writer.settle()
        here, there = ("c", "d") if number % 2 == 0 else ("d", "c")
        writer.move("p", CONTENDED, ("b", "cpu"), ("a", "cpu"), 2 * number + 2)
        writer.move("r", CONTENDED, (here, "cpu"), (there, "cpu"), 2 * number + 2)
        writer.settle()
        writer.move("q", CONTENDED, ("b", "cpu"), ("a", "cpu"))
        writer.settle()
    return writer.part()


def ranks(count: int, rounds: int) -> Part:
    """``count`` ranks an instance, 32 KiB each: what is said to all at once, beside what is said to one."""
    room = {"cpu": 8 * MIB}
    writer = Writer(f"ranks-{count}", 16 * count * KIB, count * KIB, {"a": room, "b": room}, ranks=count)
    writer.store("a", "cpu", "p", 32 * count * KIB)
    writer.settle()
    for number in range(rounds):
        here, there = turn(number)
        writer.move("p", 32 * count * KIB, (here, "cpu"), (there, "cpu"))
        writer.settle()
    return writer.part()


def long(rounds: int) -> Part:
    """The same again and again: with more of it or less, what the moves alone take of the processors."""
    writer = Writer("long", LARGE_CHUNK, 32 * KIB, {"a": {"cpu": 4 * LARGE_CHUNK}, "b": {"cpu": 4 * LARGE_CHUNK}})
    writer.store("a", "cpu", "p", 4 * LARGE_CHUNK)
    writer.settle()
    for number in range(rounds):
        here, there = turn(number)
        writer.move("p", 4 * LARGE_CHUNK, (here, "cpu"), (there, "cpu"))
        writer.settle()
    return writer.part()


def burst() -> Part:
    """So much to answer that the controller never sleeps: what one message costs it then."""
    writer = Writer("burst", SMALL_CHUNK, 4 * KIB, {"a": {"cpu": MIB}, "b": {"cpu": MIB}})
    writer.store("a", "cpu", "p", SMALL_CHUNK)
    writer.settle()
    for _ in range(LOOKUPS):
        writer.lookup("p")
    writer.settle()
    return writer.part()
