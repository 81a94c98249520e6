"""A swarm: scenarios from one seed after another, in simulation with every property checked, on all cores.

Nothing is kept of a good run but what it adds to the coverage. A bad one is shrunk until it says what it takes, and
written as a scenario file. A run shares nothing with another: processes are the parallelism.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from kvcore.scenario.arbitrary import Space, scenario_from, seeded
from kvcore.scenario.build import build
from kvcore.scenario.loader import dump
from kvcore.scenario.schema import Scenario
from kvcore.scenario.shrink import shrink
from kvmove.campaign import Coverage, troubles
from kvsim.run import run

#: Seeds that a process is given at a time.
CHUNK: Final = 250
#: Events after which a run goes round in circles; the longest of ordinary ones have a tenth of that.
MAX_EVENTS: Final = 300_000
#: Of each kind of trouble so many are shrunk; of the others the seeds are told.
SHRUNK: Final = 2


class Find(msgspec.Struct):
    """``what``: the property broken, ``hung``, or the exception's class. ``text``: the shrunk scenario as YAML."""

    seed: int
    what: str
    lines: list[str]
    text: str = ""


class Tally(msgspec.Struct):
    """``cpu_s``: of all processes together, generating, building, running and checking."""

    count: int = 0
    inputs: int = 0
    cpu_s: float = 0.0
    coverage: Coverage = msgspec.field(default_factory=Coverage)
    finds: list[Find] = []

    def merge(self, other: Tally) -> None:
        self.count += other.count
        self.inputs += other.inputs
        self.cpu_s += other.cpu_s
        self.coverage.merge(other.coverage)
        self.finds.extend(other.finds)


class Job(msgspec.Struct, frozen=True):
    first: int
    count: int
    space: Space


def generated(seed: int, space: Space) -> Scenario:
    return scenario_from(seeded(seed), space, f"swarm-{seed}", seed)


# ---- one ------------------------------------------------------------------------------------------------------------
def judge(scenario: Scenario, tally: Tally | None = None) -> list[str]:
    """Simulate it and say what is wrong, one line each, beginning with what kind of trouble it is."""
    try:
        result = run(build(scenario), max_events=MAX_EVENTS)
    except Exception as error:
        return [f"{type(error).__name__} raised: {error}"]
    if tally is not None:
        tally.inputs += int(result.metrics["inputs"])
        tally.coverage.add(scenario, result)
    return troubles(scenario, result)


def kind_of(line: str) -> str:
    return line.split(" ", 1)[0].rstrip(":")


def shrunk(scenario: Scenario, what: str) -> Scenario:
    """The plainest scenario found that is in the same kind of trouble."""
    return shrink(scenario, lambda candidate: any(kind_of(line) == what for line in judge(candidate)))


# ---- many -----------------------------------------------------------------------------------------------------------
def work(job: Job) -> Tally:
    tally = Tally()
    started = time.process_time()
    for seed in range(job.first, job.first + job.count):
        scenario = generated(seed, job.space)
        tally.count += 1
        lines = judge(scenario, tally)
        if lines:
            tally.finds.append(Find(seed, kind_of(lines[0]), lines))
    tally.cpu_s = time.process_time() - started
    return tally


def shrink_some(finds: list[Find], space: Space) -> None:
    """The first of each kind of trouble become files."""
    seen: dict[str, int] = {}
    for find in finds:
        seen[find.what] = seen.get(find.what, 0) + 1
        if seen[find.what] <= SHRUNK:
            small = shrunk(generated(find.seed, space), find.what)
            find.text = file_text(small, [line for line in judge(small) if kind_of(line) == find.what])


def file_text(scenario: Scenario, lines: list[str]) -> str:
    """A scenario file that says on top what happens."""
    said = "".join(f"# {line[:110]}\n" for line in lines[:3])
    return f"# Found by a swarm (seed in its name) and shrunk. What happens:\n{said}{dump(scenario)}"


def swarm(
    count: int,
    first: int,
    space: Space,
    processes: int | None = None,
    progress: Callable[[Tally], None] | None = None,
) -> Tally:
    """Seeds ``first`` to ``first + count - 1``. ``progress`` is told the tally so far after each chunk."""
    total = Tally()
    for tally in _tallies(list(_jobs(count, first, space)), processes):
        total.merge(tally)
        if progress is not None:
            progress(total)
    total.finds.sort(key=lambda find: find.seed)
    shrink_some(total.finds, space)
    return total


def _jobs(count: int, first: int, space: Space) -> Iterator[Job]:
    for start in range(first, first + count, CHUNK):
        yield Job(start, min(CHUNK, first + count - start), space)


def _tallies(jobs: list[Job], processes: int | None) -> Iterator[Tally]:
    many = min(processes or multiprocessing.cpu_count(), len(jobs))
    if many <= 1:
        yield from map(work, jobs)
        return
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; this process ends the others
    with multiprocessing.get_context("fork").Pool(many, signal.signal, ignore_interrupts) as pool:
        yield from pool.imap_unordered(work, jobs)


def write(finds: list[Find], folder: Path) -> list[Path]:
    """The shrunk ones, a file each."""
    paths = []
    for find in finds:
        if find.text:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{find.what.lower()}-{find.seed}.yaml"
            path.write_text(find.text, encoding="utf-8")
            paths.append(path)
    return paths
