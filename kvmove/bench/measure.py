"""One cell: our moves and their limits in turns, so that whatever else this machine does, it does to all of them.

A round is one run of a generated scenario on warm processes: prompts are stored, moved there and back a few times to
warm up, then moved and timed. After each round each limit is measured as often. Every byte that a move has left
somewhere is compared with what was stored, after the round.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from kvcore.scenario.build import Built, build
from kvcore.scenario.loader import loads
from kvcore.scenario.result import EventPhases, Operation, Result
from kvmove.bench.matrix import Point
from kvmove.bench.result import MOVE, Cell, Phases, Series
from kvmove.errors import UserError

if TYPE_CHECKING:
    from kvreal.bare import Limit, Shape
    from kvreal.pool import Pool

ROUND: Final = 4
"""Moves of a round that are timed; the way back is one too."""
S: Final = 1e9
Meters = dict[str, Callable[["Shape"], float]]


def scenario_text(point: Point, moves: int, warmup: int) -> str:
    """A scenario of ``warmup`` and then ``moves`` moves of each prompt, there and back."""
    size = f"{(point.slots + 1) * point.chunk_bytes} B"
    places: dict[str, dict[str, str]] = {}
    for position in point.route:
        instance, _, location = position.partition("/")
        places.setdefault(instance, {})[location] = size
    lines = [
        "name: bench",
        f"kv: {{bytes_per_token: {point.token_bytes} B, chunk: {point.chunk_tokens} tokens,"
        f" direction: {point.direction}}}",
        "order: racing",
        "deadline: 300 s",
        "instances:",
        *[
            f"  {name}: {{locations: {{{', '.join(f'{place}: {size}' for place, size in where.items())}}}}}"
            for name, where in places.items()
        ],
        "steps:",
    ]
    prompts = [f"p{number}" for number in range(point.concurrency)]
    for prompt in prompts:
        lines.append(f"  - store: {{at: {point.route[0]}, prompt: {prompt}, tokens: {point.tokens}}}")
    lines.append("  - settle")
    for turn in range(warmup + moves):
        source, target = point.route if turn % 2 == 0 else point.route[::-1]
        for number, prompt in enumerate(prompts):
            background = ", background: true" if len(prompts) > 1 else ""
            name = f"m-{turn}-{number}"
            lines.append(f"  - move: {{from: {source}, to: {target}, prompt: {prompt}, as: {name}{background}}}")
        if len(prompts) > 1:
            lines.append("  - wait")
        lines.append("  - settle")  # what a move leaves to be done afterwards is not the next one's
    return "\n".join([*lines, ""])


def built_of(point: Point, moves: int, warmup: int) -> Built:
    return build(loads(scenario_text(point, moves, warmup), "bench"))


class Times:
    """Of the moves of one or more rounds, in order of turns."""

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.batches: list[float] = []
        self.singles: list[float] = []
        self.phases: list[Phases] = []
        self.carried: str = ""
        self.checked: int = 0

    def take(self, result: Result, warmup: int) -> None:
        """UserError if a move has not done what it should: then there is nothing to report."""
        if not result.clean:
            why = [*(one.text for one in result.violations), *result.hung]
            raise UserError(f"bench: {self.name}: {why[0]}")
        turns: dict[int, list[Operation]] = {}
        for operation in result.operations:
            if operation.what == "move":
                if operation.state != "done":
                    raise UserError(
                        f"bench: {self.name}: {operation.op} {operation.state}, {operation.reason or 'no reason'}"
                        f"{': ' + operation.detail if operation.detail else ''}"
                    )
                turns.setdefault(int(operation.op.split("-")[1]), []).append(operation)
        phases = {one.op: one for one in result.phases}
        for turn, operations in sorted(turns.items()):
            if turn < warmup:
                continue
            begun, ended = min(o.start_ns for o in operations), max(o.end_ns for o in operations)
            self.batches.append((ended - begun) / S)
            for operation in operations:
                self.singles.append(operation.duration_ns / S)
                if operation.op in phases:
                    self.phases.append(phases_of(phases[operation.op], operation.duration_ns))
        self.carried = result.transport or self.carried
        self.checked += int(result.metrics.get("bytes_checked", 0))


def phases_of(one: EventPhases, total_ns: int) -> Phases:
    return Phases(
        control_s=one.control_ns / S,
        queue_s=one.queue_ns / S,
        copy_s=one.copy_ns / S,
        commit_s=one.commit_ns / S,
        total_s=total_ns / S,
    )


class Pools:
    """Processes of ours, by transport and environment, kept as long as cells ask for the same ones."""

    def __init__(self) -> None:
        self.key: tuple[object, ...] = ()
        self.pool: Pool | None = None

    def get(self, point: Point) -> Pool:
        from kvreal.pool import Pool

        key = (point.transport, tuple(sorted(point.env.items())), point.chunk_bytes, point.nbytes, point.route)
        if self.pool is None or key != self.key:
            self.close()  # what it holds in memory goes with it
            self.pool, self.key = Pool(point.transport, env=dict(point.env)), key
        return self.pool

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
        self.pool = None


def measure(point: Point, repeats: int, warmup: int, pools: Pools, predict: Callable[[Built, str], Result]) -> Cell:
    """The cell, measured. UserError, RunError or TransferError if it cannot be."""
    from kvreal.bare import BareError, Shape
    from kvreal.run import run

    times = Times(point.name)
    limits: dict[str, list[float]] = {}
    shape = Shape(point.nbytes * point.concurrency, point.chunk_bytes)
    try:
        with ExitStack() as stack:
            meters = _meters(point, stack)
            pool = pools.get(point)
            left = repeats
            while left > 0:
                moves = min(ROUND, left)
                # A round begins with fresh prompts, and so with a first move that touches fresh memory.
                times.take(run(built_of(point, moves, warmup), pool=pool), warmup)
                for name, meter in meters.items():
                    if left == repeats:
                        for _ in range(warmup):
                            meter(shape)
                    limits.setdefault(name, []).extend(meter(shape) for _ in range(moves))
                left -= moves
    except BareError as error:
        raise UserError(f"bench: {point.name}: {error}") from None
    series = [Series(what=MOVE, seconds=tuple(times.batches), about=times.carried, warmup=warmup)]
    if point.concurrency == 1 and times.phases:
        copies = tuple(one.queue_s + one.copy_s for one in times.phases)
        series.append(Series(what="copy", seconds=copies, about="of the move: the bytes alone", warmup=warmup))
    series += [Series(what=name, seconds=tuple(found), warmup=warmup) for name, found in limits.items()]
    simulated = Times(point.name)
    simulated.take(predict(built_of(point, 2, 0), point.transport), 0)
    return Cell(
        name=point.name,
        transport=point.transport,
        route=point.route,
        nbytes=point.nbytes,
        tokens=point.tokens,
        chunk_bytes=point.chunk_bytes,
        concurrency=point.concurrency,
        direction=point.direction,
        carried=times.carried,
        series=tuple(series),
        phases=tuple(times.phases),
        predicted=simulated.phases[-1] if simulated.phases else None,
        singles=tuple(times.singles) if point.concurrency > 1 else (),
        checked_bytes=times.checked,
    )


def _meters(point: Point, stack: ExitStack) -> Meters:
    """The limits beside a cell, by name; their processes end with ``stack``."""
    from kvreal.bare import BareNixl, Memcpy, RawSocket

    nbytes = point.nbytes * point.concurrency
    meters: Meters = {}

    def add(limit: Limit) -> None:
        stack.enter_context(limit)
        meters.update(limit.meters)

    if "memcpy" in point.beside:
        add(Memcpy(nbytes))
    if "nixl" in point.beside:
        add(BareNixl(nbytes, point.chunk_bytes < nbytes, point.env))
    if "socket" in point.beside:
        add(RawSocket(nbytes))
    return meters
