"""What processes have measured of copies between them, and who of the two had better carry one out."""

from __future__ import annotations

from typing import Dict, Optional, Sequence, Tuple

import msgspec


def kind_of(location: str) -> str:
    """What a location's name says of its memory: cpu, disk or gpu."""
    name = location.lower()
    if "gpu" in name or "hbm" in name:
        return "gpu"
    return "disk" if "disk" in name or "file" in name else "cpu"


class Cost(msgspec.Struct, frozen=True, gc=False, array_like=True, forbid_unknown_fields=True):
    """Copies by one transport from one kind of memory to another (cpu, disk, gpu), in another process. ``push``: the
    process that has the bytes carries them out, else the one that wants them. A copy of ``n`` chunks and ``b`` bytes
    takes fixed_ns + n * descriptor_ns + b / rate(b); ``rates`` as ``bytes_ns`` takes them."""

    transport: str
    source: str
    target: str
    push: bool
    fixed_ns: int
    descriptor_ns: int
    rates: Tuple[Tuple[int, float], ...]

    def rate(self, nbytes: int, chunks: int) -> float:
        """Bytes a second, all told."""
        return nbytes * 1e9 / (self.fixed_ns + chunks * self.descriptor_ns + bytes_ns(self.rates, nbytes))


class Measured(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """What was measured of the transports of one process, where it carries the copy out. ``profile``: its name."""

    profile: str
    costs: Tuple[Cost, ...]


def bytes_ns(rates: Sequence[Tuple[int, float]], nbytes: int) -> float:
    """What so many bytes take, if nobody else is there. ``rates``: (bytes, bytes a second), rising sizes; in between,
    *times* are interpolated. Below the smallest size: at its rate; above the largest too."""
    size, rate = rates[0]
    if nbytes <= size:
        return nbytes * 1e9 / rate
    earlier_ns = size * 1e9 / rate
    for larger, faster in rates[1:]:
        larger_ns = larger * 1e9 / faster
        if nbytes <= larger:
            return earlier_ns + (larger_ns - earlier_ns) * (nbytes - size) / (larger - size)
        size, rate, earlier_ns = larger, faster, larger_ns
    return nbytes * 1e9 / rate


def best_direction(
    pairs: Sequence[Tuple[Optional[Measured], Optional[Measured]]], source: str, target: str, nbytes: int, chunks: int
) -> Tuple[bool, str]:
    """(push?, why) for a copy of ``nbytes`` in ``chunks`` chunks at each of some ranks, between two kinds of memory.
    ``pairs``: of each rank what the source's process has measured, and what the destination's has.

    Each is believed of what it would carry out itself: the destination of reading, the source of pushing, by the
    fastest transport that both know. The slowest rank decides for all. Ties, and what nobody knows, are read; ``why``
    is then empty if it is not known.
    """
    reads: Dict[float, str] = {}
    pushes: Dict[float, str] = {}
    for pusher, reader in pairs:
        if pusher is None or reader is None or nbytes <= 0:
            return False, ""
        reads[_fastest(reader, pusher, False, source, target, nbytes, chunks)] = reader.profile
        pushes[_fastest(pusher, reader, True, source, target, nbytes, chunks)] = pusher.profile
    read, push = min(reads, default=0.0), min(pushes, default=0.0)
    if not read or not push:
        return False, ""
    ends = [("push", push, pushes[push]), ("read", read, reads[read])]
    if push <= read:
        ends.reverse()
    (name, rate, of), (other, less, by) = ends
    also = f" by profile {of}" if of != by else ""
    return push > read, f"{name}: {rate / 1e9:.3g} GB/s{also}, {other} {less / 1e9:.3g} by profile {by}"


def _fastest(mine: Measured, theirs: Measured, push: bool, source: str, target: str, nbytes: int, chunks: int) -> float:
    """Bytes a second of the fastest transport that both have; 0.0: none was measured."""
    shared = {cost.transport: None for cost in theirs.costs if (cost.source, cost.target) == (source, target)}
    rates = [
        cost.rate(nbytes, chunks)
        for cost in mine.costs
        if (cost.source, cost.target, cost.push) == (source, target, push) and cost.transport in shared
    ]
    return max(rates, default=0.0)
