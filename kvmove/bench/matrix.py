"""A matrix file: what is to be measured. Every mistake is one line with its place, before anything is started."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal

from msgspec import field

from kvcore.scenario.loader import load_as
from kvcore.scenario.located import convert_as
from kvcore.scenario.mistake import Mistake, unknown
from kvcore.scenario.units import Duration, Size, Tokens
from kvmove.bench.result import Goal, Part
from kvmove.output import size as size_text

HERE: Final = "here"
"""Among ``transports``: all that this machine has."""
LIMITS: Final = ("memcpy", "nixl", "socket")
STANDARD: Final = Path(__file__).with_name("standard.yaml")
SPARE_BYTES: Final = 1 << 30
"""Of memory that is left alone."""
KINDS: Final = ("CPU", "Disk", "GPU")


class Block(Part, frozen=True, kw_only=True):
    """A part of the matrix: every combination of its lists is a cell. ``sizes`` and ``tokens`` both say how much a move
    moves; a token is ``token`` bytes, or a whole chunk where that is smaller. ``beside``: limits of the same run.
    ``env``: of our processes and of bare NIXL's (``UCX_TLS``)."""

    name: str
    transports: tuple[str, ...] = (HERE,)
    sizes: tuple[Size, ...] = ()
    tokens: tuple[Tokens, ...] = ()
    token: Size = Size(128 << 10)
    chunks: tuple[Size, ...] = (Size(8 << 20),)
    concurrency: tuple[int, ...] = (1,)
    routes: tuple[tuple[str, str], ...] = (("a/LocalCPUBackend", "b/LocalCPUBackend"),)
    direction: Literal["read", "push"] = "read"
    beside: tuple[Literal["memcpy", "nixl", "socket"], ...] = ()
    env: dict[str, str] = {}


class Contention(Part, frozen=True, kw_only=True):
    """``small`` moves alone, and while a ``large`` one is on its way."""

    small: Tokens = Tokens(12)
    large: Size = Size(2 << 30)


class Peer(Part, frozen=True, kw_only=True):
    """The same move by us and by the reference, in turns. Chunks have 256 tokens, the reference's own. ``token``: of
    ``tokens``; a ``size`` goes in tokens of 32 KiB, and so in chunks of 8 MiB."""

    name: str
    size: Size | None = None
    tokens: Tokens | None = None
    token: Size = Size(128 << 10)

    @property
    def token_bytes(self) -> int:
        return 32 << 10 if self.size is not None else self.token.bytes


class Services(Part, frozen=True, kw_only=True):
    """A controller and two instances as services, asked over HTTP. ``idle``: how long their CPU is watched.
    ``memory``: a move of that size, during which their memory is watched. ``reference``: moves beside the reference."""

    name: str
    transport: str = "auto"
    idle: Duration | None = None
    memory: Size | None = None
    contention: Contention | None = None
    reference: tuple[Peer, ...] = ()


class Scenarios(Part, frozen=True, kw_only=True):
    """Scenario files, as patterns under ``scenarios/``. ``simulated``, ``real``: faults that must be survived.
    ``timed``: moves whose predicted and measured times are set side by side."""

    simulated: tuple[str, ...] = ()
    real: tuple[str, ...] = ()
    timed: tuple[str, ...] = ()
    times: int = 1
    """How often each of ``timed`` is run for real; the median counts."""


class Matrix(Part, frozen=True, kw_only=True):
    """``profile``: what predictions come from; "" is the default one."""

    name: str
    about: str = ""
    repeats: int = 20
    warmup: int = 2
    seed: int = 0
    profile: str = ""
    cells: tuple[Block, ...] = ()
    services: tuple[Services, ...] = ()
    scenarios: Scenarios = field(default_factory=Scenarios)
    goals: tuple[Goal, ...] = ()


class Point(Part, frozen=True, kw_only=True):
    """One cell that is to be measured; sizes in bytes."""

    name: str
    transport: str
    route: tuple[str, str]
    nbytes: int
    tokens: int
    token_bytes: int
    chunk_tokens: int
    concurrency: int
    direction: str
    beside: tuple[str, ...]
    env: dict[str, str]

    @property
    def chunk_bytes(self) -> int:
        return self.token_bytes * self.chunk_tokens

    @property
    def slots(self) -> int:
        """Chunks that all its moves need at one end."""
        return -(-self.tokens // self.chunk_tokens) * self.concurrency


class Machine(Part, frozen=True, kw_only=True):
    """What this machine can do, as far as a matrix needs to know. ``transports``: those that ``here`` stands for;
    ``named``: others that work if they are asked for by name; ``known``: all that there are."""

    transports: tuple[str, ...]
    named: tuple[str, ...] = ()
    known: tuple[str, ...]
    available_bytes: int
    gpu: bool
    largest_bytes: int = 1 << 62
    """Sizes above it are left out (--quick), so nothing need have room for them."""


def load(path: str, machine: Machine) -> Matrix:
    """ScenarioError names file, line, column and field of the first mistake."""

    def sift(data: dict[str, Any]) -> Mistake | None:
        matrix = convert_as(data, Matrix)
        return matrix if isinstance(matrix, Mistake) else next(_mistakes(matrix, machine), None)

    return load_as(path, Matrix, sift)


# ---- what is wrong --------------------------------------------------------------------------------------------------
def _mistakes(matrix: Matrix, machine: Machine) -> Iterator[Mistake]:
    if matrix.repeats < 1:
        yield Mistake(("repeats",), f"found {matrix.repeats}, expected 1 or more")
    if matrix.warmup < 0:
        yield Mistake(("warmup",), f"found {matrix.warmup}, expected 0 or more")
    if matrix.profile and not Path(matrix.profile).is_file():
        yield Mistake(("profile",), f"{matrix.profile}: there is no such file")
    names = [*(block.name for block in matrix.cells), *(one.name for one in matrix.services)]
    for at, name in enumerate(names):
        where: tuple[str | int, ...] = ("cells", at, "name")
        if at >= len(matrix.cells):
            where = ("services", at - len(matrix.cells), "name")
        if names.index(name) != at:
            yield Mistake(where, f"{name!r} is the name of another part too")
    for at, block in enumerate(matrix.cells):
        yield from _of_block(block, ("cells", at), machine)
    for at, service in enumerate(matrix.services):
        yield from _of_services(service, ("services", at), machine)
    for kind in ("simulated", "real", "timed"):
        for at, pattern in enumerate(getattr(matrix.scenarios, kind)):
            if not scenario_files(pattern):
                yield Mistake(("scenarios", kind, at), f"no scenario file is called {pattern}")
    for at, goal in enumerate(matrix.goals):
        yield from _of_goal(goal, ("goals", at), matrix)


Where = tuple[str | int, ...]


def _of_block(block: Block, where: Where, machine: Machine) -> Iterator[Mistake]:
    if not block.sizes and not block.tokens:
        yield Mistake(where, "moves nothing: expected sizes or tokens")
    for name in ("transports", "chunks", "concurrency", "routes"):
        if not getattr(block, name):
            yield Mistake((*where, name), "is empty, expected at least one")
    for at, transport in enumerate(block.transports):
        if transport != HERE:
            yield from _of_transport(transport, (*where, "transports", at), machine)
    for at, number in enumerate(block.concurrency):
        if not 1 <= number <= 64:
            yield Mistake((*where, "concurrency", at), f"found {number}, expected 1 to 64 moves at once")
    for at, route in enumerate(block.routes):
        yield from _of_route(route, (*where, "routes", at), machine)
    for at, chunk in enumerate(block.chunks):
        if chunk.bytes <= 0 or (chunk.bytes > block.token.bytes and chunk.bytes % block.token.bytes):
            yield Mistake((*where, "chunks", at), f"{chunk} is no whole number of tokens of {block.token}")
    if "nixl" in block.beside and "nixl" not in machine.transports:
        yield Mistake((*where, "beside"), "nixl is not installed here (pip install nixl)")
    for at, size in enumerate(block.sizes):
        yield from _of_amount(block, size, (*where, "sizes", at), machine)
    for at, tokens in enumerate(block.tokens):
        yield from _of_amount(block, tokens, (*where, "tokens", at), machine)


def _of_amount(block: Block, amount: Size | Tokens, where: Where, machine: Machine) -> Iterator[Mistake]:
    for chunk, number in product(block.chunks, block.concurrency):
        token, chunk_tokens = cut(block.token.bytes, chunk.bytes)
        nbytes = amount.bytes if isinstance(amount, Size) else amount.count(chunk_tokens) * token
        if nbytes <= 0 or nbytes % token:
            yield Mistake(where, f"{amount} is no whole number of tokens of {size_text(token)}")
            return
        limits = len(block.beside)
        needed = nbytes * number * 2 * (1 + limits)
        if nbytes <= machine.largest_bytes and needed > machine.available_bytes - SPARE_BYTES:
            beside = f" and of {limits} limits beside it" if limits else ""
            yield Mistake(
                where,
                f"{amount}{f', {number} at once' if number > 1 else ''}: both ends{beside} take {size_text(needed)} of"
                f" memory, this machine has {size_text(max(0, machine.available_bytes - SPARE_BYTES))} to spare",
            )
            return


def _of_transport(name: str, where: Where, machine: Machine) -> Iterator[Mistake]:
    if name in (*machine.transports, *machine.named, "auto"):
        return
    if name in machine.known:
        yield Mistake(where, f"transport {name} is not on this machine, which has {', '.join(machine.transports)}")
    else:
        yield Mistake(where, unknown("transport", name, (HERE, *machine.known)))


def _of_route(route: tuple[str, str], where: Where, machine: Machine) -> Iterator[Mistake]:
    for at, position in enumerate(route):
        instance, slash, location = position.partition("/")
        if not slash or not instance or not location:
            yield Mistake((*where, at), f"found {position!r}, expected instance/location such as a/LocalCPUBackend")
        elif not any(kind in location for kind in KINDS):
            yield Mistake((*where, at), f"unknown location {location!r}, expected LocalCPUBackend, LocalDiskBackend"
                          " or LocalGPUBackend")  # fmt: skip
        elif "GPU" in location and not machine.gpu:
            yield Mistake((*where, at), f"{location}: there is no GPU that torch can use on this machine")
    if route[0] == route[1]:
        yield Mistake(where, f"moves from {route[0]} to itself")


def _of_services(service: Services, where: Where, machine: Machine) -> Iterator[Mistake]:
    yield from _of_transport(service.transport, (*where, "transport"), machine)
    for at, peer in enumerate(service.reference):
        if (peer.size is None) == (peer.tokens is None):
            yield Mistake((*where, "reference", at), "expected one of size and tokens")
        elif peer.size is not None and peer.size.bytes % peer.token_bytes:
            of = size_text(peer.token_bytes)
            yield Mistake((*where, "reference", at, "size"), f"{peer.size} is no whole number of tokens of {of}")
    sizes: list[tuple[Where, Size | None]] = [(("memory",), service.memory)]
    sizes += [(("contention", "large"), service.contention.large)] if service.contention is not None else []
    sizes += [(("reference", at, "size"), one.size) for at, one in enumerate(service.reference)]
    for more, size in sizes:
        if size is None or size.bytes > machine.largest_bytes:
            continue
        if 2 * size.bytes > machine.available_bytes - SPARE_BYTES:
            needed, has = size_text(2 * size.bytes), size_text(machine.available_bytes)
            yield Mistake((*where, *more), f"{size}: both ends take {needed} of memory, this machine has {has}")


def _of_goal(goal: Goal, where: Where, matrix: Matrix) -> Iterator[Mistake]:
    if (goal.least is None) == (goal.most is None):
        yield Mistake(where, "expected one of least and most")
    if sum([goal.ratio is not None, bool(goal.median), bool(goal.figure)]) != 1:
        yield Mistake(where, "expected one of ratio, median and figure")
    elif goal.figure == "" and not goal.cell:
        yield Mistake((*where, "cell"), "missing, expected the cell that the goal is of")


# ---- its cells ------------------------------------------------------------------------------------------------------
def cut(token_bytes: int, chunk_bytes: int) -> tuple[int, int]:
    """(bytes of a token, tokens of a chunk): a chunk smaller than a token is a token."""
    token = min(token_bytes, chunk_bytes)
    return token, chunk_bytes // token


def points(matrix: Matrix, machine: Machine) -> list[Point]:
    """Every cell, in the order of the file."""
    return [point for block in matrix.cells for point in _points(block, machine)]


def _points(block: Block, machine: Machine) -> Iterator[Point]:
    transports = [name for one in block.transports for name in (machine.transports if one == HERE else (one,))]
    amounts = (*block.sizes, *block.tokens)
    lists = (dict.fromkeys(transports), block.routes, block.chunks, amounts, block.concurrency)
    many = [len(tuple(one)) > 1 for one in lists]
    for transport, route, chunk, amount, number in product(*lists):
        token, chunk_tokens = cut(block.token.bytes, chunk.bytes)
        tokens = amount.count(chunk_tokens) if isinstance(amount, Tokens) else amount.bytes // token
        shown = (transport, " to ".join(route), f"chunks of {chunk}", str(amount), f"{number} at once")
        told = [text for text, said in zip(shown, many) if said]
        yield Point(
            name=": ".join([block.name, *([", ".join(told)] if told else [])]),
            transport=transport,
            route=route,
            nbytes=tokens * token,
            tokens=tokens,
            token_bytes=token,
            chunk_tokens=chunk_tokens,
            concurrency=number,
            direction=block.direction,
            beside=block.beside,
            env=block.env,
        )


def scenario_files(pattern: str) -> list[str]:
    """Paths of a pattern under ``scenarios/``, sorted."""
    from kvmove.demo import scenarios_directory

    place = scenarios_directory()
    return sorted(glob.glob(str(place / pattern)))
