"""What things cost on one machine: measured latencies, service times and bandwidths.

``kvmove calibrate`` writes such a file; ``profiles/default.yaml`` says the same as the defaults here, with a word on
each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Iterator, List, Optional, Sequence, Tuple

import msgspec
from msgspec import field

from kvcore.protocol.links import Cost, Measured, bytes_ns
from kvcore.scenario.loader import load_as
from kvcore.scenario.topology import LOCATIONS

__all__ = ["AUTO", "CopyCost", "Made", "Profile", "ProfileError", "load_profile"]

AUTO: Final = "auto"
ARENA: Final = "arena"
"""Hands slots over: as quick whoever does it."""


class ProfileError(ValueError):
    """One line: which file, which field, what was expected."""


class Made(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When and on what a profile was measured. ``host``: digits that tell one machine from another; empty: of no
    particular one, but of its kind."""

    date: str = ""
    cpu: str = ""
    cores: int = 0
    host: str = ""

    def elsewhere(self, cpu: str, cores: int, host: str) -> str:
        """How it is another machine than this one; empty if it is not."""
        if self.cpu and (self.cpu, self.cores) != (cpu, cores):
            return f"{self.cpu} with {self.cores} cores; this is {cpu} with {cores}"
        if self.host and self.host != host:
            return f"another {self.cpu or 'machine'}"
        return ""


SUM_PIECE: Final = 4 << 10
SUM_STRIPE: Final = 256 << 10
"""What a sampled checksum reads of each so many bytes of a chunk (kvreal/checksum.py)."""


class CopyCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Copies by one transport from one kind of location to another (cpu, disk, gpu), between two processes; ``inside``:
    within one; ``push``: carried out by the process that has the bytes, else by the one that wants them. A copy of
    ``n`` chunks and ``b`` bytes that is alone takes

        queue_ns + copy_ns + n * descriptor_ns + b / rate(b)

    ``queue_ns`` is over before its first byte; it is longer by ``first_ns`` when a process has its first copy with
    another. ``rates``: (bytes, bytes a second), rising sizes; in between, *times*
    are interpolated. ``process_bytes_per_s``: all copies together that one process carries out; ``host_bytes_per_s``:
    all by this transport on one host; 0: each is as fast as alone. ``cpu_s_per_gb``: of all processes, for the reader.
    """

    transport: str
    source: str = field(name="from", default="cpu")
    target: str = field(name="to", default="cpu")
    inside: bool = False
    push: bool = False
    queue_ns: int = 0
    first_ns: int = 0
    copy_ns: int = 0
    descriptor_ns: int = 0
    rates: Tuple[Tuple[int, float], ...]
    process_bytes_per_s: float = 0.0
    host_bytes_per_s: float = 0.0
    cpu_s_per_gb: float = 0.0

    def alike(self, other: CopyCost) -> bool:
        """By one transport, between the same kinds."""
        return (self.transport, self.source, self.target) == (other.transport, other.source, other.target)

    def overhead_ns(self, chunks: int) -> int:
        """What a copy, not the first, takes besides its bytes, its queueing included."""
        return self.queue_ns + self.copy_ns + chunks * self.descriptor_ns

    def bytes_ns(self, nbytes: int) -> float:
        """What the bytes take, if nobody else is there."""
        return bytes_ns(self.rates, nbytes)

    def mistakes(self) -> Iterator[str]:
        where = f"copies: {self.transport} from {self.source} to {self.target}: "
        for name, kind in (("from", self.source), ("to", self.target)):
            if kind not in LOCATIONS:
                yield f"{where}{name} is {kind}, expected one of {', '.join(LOCATIONS)}"
        for name in ("queue_ns", "first_ns", "copy_ns", "descriptor_ns"):
            if not 0 <= getattr(self, name) < 1 << 62:
                yield f"{where}{name} is {getattr(self, name)}, expected nanoseconds, 0 or more"
        for name in ("process_bytes_per_s", "host_bytes_per_s", "cpu_s_per_gb"):
            if not 0 <= getattr(self, name) < 1e18:
                yield f"{where}{name} is {getattr(self, name)}, expected 0 or more"
        if not self.rates:
            yield f"{where}rates: expected at least one pair [bytes, bytes a second]"
        last, last_ns = 0, 0.0
        for size, rate in self.rates:
            if size <= last or not 0 < rate < 1e18 or size * 1e9 / rate < last_ns:
                yield f"{where}rates: [{size}, {rate:g}]: expected larger sizes after smaller ones, taking no less time"
                return
            last, last_ns = size, size * 1e9 / rate


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Nanoseconds and bytes a second. ``copies`` says what bytes cost, the fastest first: that is what ``auto`` takes.
    Whatever it does not cover, a transfer of ``n`` slots and ``b`` bytes that is alone on its links takes
    ``transfer_ns + n * descriptor_ns + b / bandwidth``.

    A message takes ``service_ns`` at its sender and ``message_latency_ns`` on its way; ``key_ns`` more at either end
    for each chunk that it names, ``index_ns`` more at its sender for each one that it says has come or gone, and
    ``wake_ns`` more for each other node that was told the like just before it by the same one. With checksums a copy's
    chunks are summed at its source before its first byte and at its destination after its last: ``sum_ns`` for each,
    and what is read of it at ``sum_bytes_per_s``.
    """

    name: str = "default"
    about: str = ""
    made: Optional[Made] = None

    message_latency_ns: int = 60_000
    service_ns: int = 30_000
    journal_ns: int = 50_000
    key_ns: int = 0
    index_ns: int = 0
    wake_ns: int = 0

    transfer_ns: int = 150_000
    descriptor_ns: int = 2_000
    copy_bytes_per_s: float = 5e9
    host_bytes_per_s: float = 9e9
    peer_death_ns: int = 1_000_000
    abort_ns: int = 100_000
    window_ns: int = 200_000

    memcpy_bytes_per_s: float = 9e9
    fill_ns: int = 50_000
    fill_bytes_per_s: float = 2e9
    read_ns: int = 50_000
    read_bytes_per_s: float = 2e9
    sum_ns: int = 2_500
    sum_bytes_per_s: float = 17e9

    copies: Tuple[CopyCost, ...] = ()

    def check(self) -> None:
        """ProfileError for a time below 0 or a bandwidth of 0 or less."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name.endswith("_ns") and not 0 <= value < 1 << 62:
                raise ProfileError(f"{name} is {value}, expected nanoseconds, 0 or more")
            if name.endswith("_per_s") and not 0 < value < 1e18:
                raise ProfileError(f"{name} is {value}, expected bytes a second, above 0")
        for cost in self.copies:
            for mistake in cost.mistakes():
                raise ProfileError(mistake)

    @property
    def detailed(self) -> bool:
        """Do messages cost more than their number?"""
        return bool(self.key_ns or self.index_ns or self.wake_ns)

    def cost(
        self, transport: str, source: str, target: str, inside: bool = False, push: bool = False
    ) -> Optional[CopyCost]:
        """The entry for such copies; ``auto``: the first that there is, and so for a transport that does nothing of its
        own within a process. Where no push was measured: that of a read. None: nobody has measured it."""
        alike = [cost for cost in self.copies if (cost.source, cost.target, cost.inside) == (source, target, inside)]
        for way in (True, False) if push else (False,):
            for cost in alike:
                if transport in (AUTO, cost.transport) and cost.push == way:
                    return cost
        return alike[0] if alike and inside else None

    def rate(
        self, transport: str, source: str, target: str, nbytes: int, chunks: int = 1, push: bool = False
    ) -> float:
        """Bytes a second of such a copy, all told; 0.0: nobody has measured it. ``auto`` may choose by it."""
        cost = self.cost(transport, source, target, push=push)
        if cost is None or nbytes <= 0:
            return 0.0
        return nbytes * 1e9 / (cost.overhead_ns(chunks) + cost.bytes_ns(nbytes))

    def measured(self, transports: Sequence[str] = ()) -> Optional[Measured]:
        """What a process with these ``transports`` says of its copies: of those that were measured both ways. None: of
        none. Without transports: of what ``auto`` takes, as ``cost`` has it."""
        found: List[Cost] = []
        for one in self.copies:
            auto = self.cost(AUTO, one.source, one.target)
            names = transports or ((auto.transport,) if auto is not None else ())
            if one.inside or one.transport == ARENA or one.transport not in names:
                continue
            both = [other.push for other in self.copies if not other.inside and other.alike(one)]
            if True in both and False in both:
                fixed_ns = one.queue_ns + one.copy_ns
                found.append(
                    Cost(one.transport, one.source, one.target, one.push, fixed_ns, one.descriptor_ns, one.rates)
                )
        return Measured(self.name, tuple(found)) if found else None

    def transfer_overhead_ns(self, descriptors: int) -> int:
        return self.transfer_ns + descriptors * self.descriptor_ns

    def sums_ns(self, chunks: int, nbytes: int, mode: str) -> int:
        """What one end's checksums take; ``sample`` reads the ends of a chunk and a piece of each of its stripes."""
        if mode == "off":
            return 0
        sampled = chunks * 2 * SUM_PIECE + nbytes // SUM_STRIPE * SUM_PIECE
        read = nbytes if mode == "all" else min(nbytes, sampled)
        return chunks * self.sum_ns + round(read * 1e9 / self.sum_bytes_per_s)

    def fill_time_ns(self, nbytes: int) -> int:
        return self.fill_ns + round(nbytes * 1e9 / self.fill_bytes_per_s)

    def read_time_ns(self, nbytes: int) -> int:
        return self.read_ns + round(nbytes * 1e9 / self.read_bytes_per_s)


def load_profile(path: Path) -> Profile:
    """Read a profile from YAML. ScenarioError: it is none, with its line; ProfileError: what it says cannot be."""
    profile = load_as(path, Profile, lambda data: None)
    try:
        profile.check()
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from error
    return profile
