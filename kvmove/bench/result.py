"""What a bench gives: one struct for all of it, written as JSON, and as one Parquet row a sample."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kvcore.scenario.located import in_words
from kvmove.errors import UserError
from kvmove.output import size

if TYPE_CHECKING:
    from kvreal.facts import Machine

FILE: Final = "bench.json"
FORMAT: Final = 1
MOVE: Final = "move"
"""The series of a cell that is ours; the others are its limits and its peers."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Base of everything in a matrix and in a result."""


class Phases(Part, frozen=True, kw_only=True):
    """Of one move, seconds, as in kvcore.scenario.result.EventPhases. ``total_s``: of the client, from its request to
    its last answer; what it is longer than the phases is the way there and back."""

    control_s: float
    queue_s: float
    copy_s: float
    commit_s: float
    total_s: float


class Series(Part, frozen=True, kw_only=True):
    """One thing, measured again and again. ``what``: move, copy, memcpy, bare nixl read, raw unix x2, reference, ...
    ``about``: what carried the bytes, a version. ``warmup``: how many came before and are not here."""

    what: str
    seconds: tuple[float, ...]
    about: str = ""
    warmup: int = 0


class Cell(Part, frozen=True, kw_only=True):
    """One point of the matrix. ``nbytes`` of each of ``concurrency`` moves at once; a sample is from the first request
    until the last has ended, so that ``nbytes * concurrency / seconds`` is the rate."""

    name: str
    transport: str
    route: tuple[str, str]
    nbytes: int
    tokens: int
    chunk_bytes: int
    concurrency: int = 1
    direction: str = "read"
    carried: str = ""
    """What carried the bytes, in the transport's own words."""
    series: tuple[Series, ...] = ()
    phases: tuple[Phases, ...] = ()
    predicted: Phases | None = None
    """The simulator's, with the bench's profile."""
    singles: tuple[float, ...] = ()
    """Of each move alone, where several run at once; seconds."""
    checked_bytes: int = 0
    """Compared with what had been stored, after the moves."""

    def of(self, what: str) -> Series | None:
        """The series of that name; None if it was not measured."""
        return next((one for one in self.series if one.what == what), None)

    @property
    def total_bytes(self) -> int:
        return self.nbytes * self.concurrency


class Figure(Part, frozen=True, kw_only=True):
    """One number that is no duration of a cell: idle CPU, growth of memory. ``samples``: all that were taken."""

    name: str
    unit: str
    samples: tuple[float, ...]
    about: str = ""


class Goal(Part, frozen=True, kw_only=True):
    """What a figure should be. Of a cell, ``ratio`` [slower, faster]: the median time of the second series over the
    first's ("move" of "bare nixl"). ``series`` may be the beginning of a name: the fastest of those is taken. Of a
    figure or a cell's median in seconds, ``figure`` / ``median``. ``least``, ``most``: the bound."""

    say: str
    cell: str = ""
    ratio: tuple[str, str] | None = None
    median: str = ""
    figure: str = ""
    least: float | None = None
    most: float | None = None


class Outcome(Part, frozen=True, kw_only=True):
    """One scenario with faults, played in one world. ``fired``: fault -> times."""

    file: str
    name: str
    world: str
    good: bool
    wall_s: float
    fired: dict[str, int] = {}
    violations: int = 0
    moves: dict[str, int] = {}
    """state -> how many moves ended so"""
    why: str = ""


class Timing(Part, frozen=True, kw_only=True):
    """A scenario's move, predicted and measured: on scenarios that no profile was made from."""

    file: str
    op: str
    predicted_s: float
    measured_s: float


class Bench(Part, frozen=True, kw_only=True):
    """All of one ``kvmove bench``. ``machine`` and ``versions``: name -> text. ``skipped``: what this machine lacks;
    ``failed``: what was tried and went wrong. Both: what -> why."""

    name: str
    about: str = ""
    begun: str
    took_s: float
    command: str
    seed: int
    repeats: int
    warmup: int
    profile: str
    machine: dict[str, str]
    versions: dict[str, str]
    cells: tuple[Cell, ...] = ()
    figures: tuple[Figure, ...] = ()
    goals: tuple[Goal, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    timings: tuple[Timing, ...] = ()
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    format: int = FORMAT


def described(facts: Machine) -> dict[str, str]:
    """What a machine is, as a report says it."""
    return {
        "system": ".".join(facts.system.split(".")[:2]),
        "CPU": facts.cpu,
        "cores": str(facts.cores),
        "NUMA nodes": str(facts.numa_nodes),
        "memory": f"{size(facts.memory_bytes)}, {size(facts.memory_free_bytes)} of it free",
        "/dev/shm": f"{size(facts.shm_bytes)}, {size(facts.shm_free_bytes)} of it free",
        "GPUs": ", ".join(f"{gpu.name} ({size(gpu.memory_bytes)})" for gpu in facts.gpus) or "none",
        "RDMA devices": ", ".join(facts.rdma) or "none",
        "UCX transports": ", ".join(facts.ucx_transports) or "none",
        "NIXL plugins": ", ".join(facts.nixl_plugins) or "none",
    }


def write(bench: Bench, folder: Path) -> list[Path]:
    """bench.json, and samples.parquet where pyarrow is there; which files."""
    return [write_json(bench, folder), *_parquet(bench, folder / "samples.parquet")]


def write_json(bench: Bench, folder: Path) -> Path:
    path = folder / FILE
    path.write_bytes(msgspec.json.format(msgspec.json.encode(bench), indent=1) + b"\n")
    return path


def read(folder: Path) -> Bench:
    """UserError if there is none, or it is none of ours."""
    path = folder / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Bench)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected what `kvmove bench --out {folder}` writes") from None
    except msgspec.DecodeError as error:
        raise UserError(f"{path}: not a result of `kvmove bench`: {in_words(str(error))}") from None


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """One a sample, flat."""
    for cell in bench.cells:
        for series in cell.series:
            for number, seconds in enumerate(series.seconds):
                phases = cell.phases[number] if series.what == MOVE and number < len(cell.phases) else None
                yield {
                    "bench": bench.name,
                    "begun": bench.begun,
                    "cell": cell.name,
                    "transport": cell.transport,
                    "source": cell.route[0],
                    "destination": cell.route[1],
                    "bytes": cell.total_bytes,
                    "tokens": cell.tokens,
                    "chunk_bytes": cell.chunk_bytes,
                    "concurrency": cell.concurrency,
                    "direction": cell.direction,
                    "series": series.what,
                    "repeat": number,
                    "seconds": seconds,
                    "control_s": phases.control_s if phases else None,
                    "queue_s": phases.queue_s if phases else None,
                    "copy_s": phases.copy_s if phases else None,
                    "commit_s": phases.commit_s if phases else None,
                }


def _parquet(bench: Bench, path: Path) -> list[Path]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return []
    texts = ("bench", "begun", "cell", "transport", "source", "destination", "direction", "series")
    whole = ("bytes", "tokens", "chunk_bytes", "concurrency", "repeat")
    parts = ("seconds", "control_s", "queue_s", "copy_s", "commit_s")
    kinds = {**dict.fromkeys(texts, pyarrow.string()), **dict.fromkeys(whole, pyarrow.int64())}
    schema = pyarrow.schema({**kinds, **dict.fromkeys(parts, pyarrow.float64())})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows(bench)), schema=schema), path)
    return [path]
