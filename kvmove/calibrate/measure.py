"""Playing the parts on real processes, transport by transport, again and again while there is time."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from kvcore.protocol.machine import Begin
from kvcore.protocol.messages import MoveRequest
from kvcore.scenario.history import Line, read
from kvcore.scenario.result import Result
from kvmove.calibrate import plan
from kvmove.calibrate.plan import Part
from kvmove.calibrate.samples import Samples
from kvmove.errors import RealUnavailable

if TYPE_CHECKING:
    from kvreal.pool import Pool

PART_TIMEOUT_S: Final = 120.0
JOURNALED: Final = 400
SUMMED: Final = (9, 16, 8 << 20)
"""Times, chunks, bytes of each: what checksums are measured by, the first time not counted."""
SELDOM: Final = 2
ROUNDS: Final = 2
"""There and back."""
#: Moves that tell what copying takes of the processors: this many, and none but the first.
LONG: Final = 17
#: What the largest size may take of free memory, divided by transports: it is there twice, and so are the others.
SHARE: Final = 8

Step = Callable[[str], None]


class Budget(msgspec.Struct, frozen=True):
    """``seconds``: another pass begins only if it will end by then."""

    seconds: float
    quick: bool
    largest: int
    kinds: tuple[tuple[str, str, bool], ...]


def budget(seconds: float, quick: bool, free_bytes: int, provides: Sequence[str], transports: int) -> Budget:
    pairs = [("cpu", "disk", False), ("cpu", "disk", True)]
    if not quick:
        pairs.append(("disk", "disk", False))
    if "gpu" in provides:
        pairs += [("cpu", "gpu", False), ("cpu", "gpu", True), ("gpu", "gpu", False)]
    return Budget(seconds, quick, max(plan.SIZES[0], free_bytes // SHARE // transports), tuple(pairs))


class Measuring:
    """``samples`` of each transport, and the parts that were played last.

    Everything is played in turn, pass after pass, rather than one thing often: what disturbs the machine for a moment
    then disturbs little of each.
    """

    def __init__(self, transports: Sequence[str], budget: Budget, step: Step) -> None:
        self.budget: Budget = budget
        self.step: Step = step
        self.samples: list[Samples] = [Samples(name) for name in transports]
        self.parts: dict[str, Part] = {}
        self.journal_ns: list[float] = journal_ns()
        self.sums_per_s: list[float] = sums_per_s()
        self.lacking: dict[str, str] = {}
        """transport -> why it could not be measured"""

    def run(self) -> None:
        """At least one pass. RealUnavailable if nothing could be measured."""
        started = time.monotonic()
        longest = 0.0
        number = 0
        with ExitStack() as stack:
            pools = {one.transport: pool for one in self.samples if (pool := self._started(one, stack)) is not None}
            while number == 0 or time.monotonic() - started + longest < self.budget.seconds:
                begun = time.monotonic()
                for samples in self.samples:
                    if samples.transport in pools:
                        self._pass(samples, pools, number)
                longest = max(longest, time.monotonic() - begun)
                number += 1
        for one in self.samples:
            if one.transport not in self.lacking and not (one.of("sizes") and one.of("chunks")):
                self.lacking[one.transport] = "its moves were not done"
        self.samples = [one for one in self.samples if one.transport not in self.lacking]
        if not self.samples:
            whys = "; ".join(f"{name}: {why}" for name, why in self.lacking.items())
            raise RealUnavailable(f"nothing could be measured here: {whys or 'no transport is available'}")
        asked = {(one.source, one.target) for one in self.parts["kinds"].asks.values()} if "kinds" in self.parts else ()
        for samples in self.samples:
            done = {(source, target) for source, target, *_ in samples.kinds()}
            for source, target in sorted(set(asked) - done if not self.budget.quick else ()):
                self.lacking[f"{samples.transport} {source} to {target}"] = "no such move was done"

    def _started(self, samples: Samples, stack: ExitStack) -> Pool | None:
        """Its processes, which have done everything once: the first time is not counted."""
        from kvreal.pool import HostError, Pool
        from kvreal.run import RunError
        from kvreal.transfer import TransferError

        self.step(f"{samples.transport}: starting its processes")
        try:
            pool: Pool = stack.enter_context(Pool(samples.transport))
            play(plan.chunks(2), pool)
            play(plan.ranks(2, 2), pool)
        except (RunError, TransferError, HostError) as error:
            self.lacking[samples.transport] = str(error).partition("\n")[0]
            return None
        return pool

    def _pass(self, samples: Samples, pools: dict[str, Pool], number: int) -> None:
        from kvreal.pool import HostError
        from kvreal.run import RunError
        from kvreal.transfer import TransferError

        pool = pools[samples.transport]
        try:
            for part in self._parts(samples is self.samples[0], number):
                self.step(f"pass {number + 1}, {samples.transport}: {part.name}")
                samples.add(part, *play(part, pool))
                self.parts[part.name] = part
            if not self.budget.quick and number == 0:
                self.step(f"pass 1, {samples.transport}: processor time")
                samples.cpu_s.append(_processor(pool))
        except (RunError, TransferError, HostError) as error:
            self.lacking[samples.transport] = str(error).partition("\n")[0]
            pools.pop(samples.transport).close()

    def _parts(self, first: bool, number: int) -> Iterator[Part]:
        budget = self.budget
        for _ in range(SELDOM):
            yield plan.seldom()
        for push in (False, True):
            yield plan.sizes(budget.largest, budget.quick, ROUNDS, push)
        yield plan.chunks(ROUNDS)
        if first or not budget.quick:
            yield plan.kinds(budget.kinds, ROUNDS)
        if not budget.quick:
            yield plan.kinds(budget.kinds, ROUNDS, push=True)
        yield plan.contended(ROUNDS)
        for count in (1, 2):
            yield plan.ranks(count, 4 * ROUNDS)
        if first and number == 0:
            yield plan.burst()


def play(part: Part, pool: Pool) -> tuple[Result, list[Line]]:
    """What came of it, and its history."""
    from kvreal.run import run

    with tempfile.TemporaryDirectory(prefix="kvmove-") as folder:
        log = Path(folder) / "log"
        result = run(part.built, history=log, pool=pool, timeout_s=PART_TIMEOUT_S)
        return result, list(read(log)[1])


def _processor(pool: Pool) -> tuple[float, float]:
    """(GB moved, CPU seconds of all processes) of many moves beyond one, which is played before, for nothing."""
    spent = []
    for rounds in (1, 1, LONG):
        before = _cpu_s(pool)
        play(plan.long(rounds), pool)
        spent.append(_cpu_s(pool) - before)
    return (LONG - 1) * 4 * plan.LARGE_CHUNK / 1e9, max(0.0, spent[2] - spent[1])


def _cpu_s(pool: Pool) -> float:
    """Of all of a pool's processes so far."""
    from kvreal.facts import cpu_s

    spent_s = 0.0
    for host in pool.all:
        with contextlib.suppress(OSError):
            spent_s += cpu_s(host.pid)
    return spent_s


def sums_per_s() -> list[float]:
    """Bytes a second that checksums of whole chunks go through, each time."""
    from kvreal.checksum import sums
    from kvreal.memory import Memory

    times, chunks, nbytes = SUMMED
    memory = Memory()
    memory.lay_out([("LocalCPUBackend", chunks)], nbytes)
    try:
        slots, sizes, keys = list(range(chunks)), [nbytes] * chunks, [bytes(16)] * chunks
        for slot in slots:
            memory.view("LocalCPUBackend", slot, nbytes)[:] = slot  # pages that nobody has written are not memory
        found = []
        for _ in range(times):
            before = time.perf_counter_ns()
            sums(memory, "LocalCPUBackend", slots, sizes, keys, "all")
            found.append(chunks * nbytes * 1e9 / (time.perf_counter_ns() - before))
        return found[1:]
    finally:
        memory.close()


def journal_ns() -> list[float]:
    """What appending one record to a scenario's journal takes, each time."""
    from kvreal.journal import Journal

    record = Begin(1, MoveRequest("m", ("a", "LocalCPUBackend"), ("b", "LocalCPUBackend"), (bytes(16),), (256,)))
    found = []
    with tempfile.TemporaryDirectory(prefix="kvmove-") as folder:
        journal = Journal(Path(folder) / "journal")
        try:
            for _ in range(JOURNALED):
                before = time.perf_counter_ns()
                journal.append(record)
                found.append(float(time.perf_counter_ns() - before))
        finally:
            journal.close()
    return found
