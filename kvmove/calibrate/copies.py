"""What copies cost, from samples of one transport: fixed costs, a curve of rates, and what copies at once share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import Final

from msgspec.structs import replace

from kvcore.scenario.profile import CopyCost, Profile
from kvmove.calibrate.plan import Part
from kvmove.calibrate.samples import CPU, Kind, Samples, Timed, kind_of
from kvmove.calibrate.solve import simulated, to_ns, to_rate
from kvmove.spread import Spread, spread

SHARED_FROM: Final = 32 << 20
"""Bytes: smaller copies may stay in a cache, and share nothing."""
FIXED_UP_TO: Final = 4 << 20
"""Bytes: of the times of copies up to that size a straight line is made."""
FASTEST: Final = 1e13
"""Bytes a second: where bytes are handed over rather than copied, or their time is lost in noise."""
INSIDE: Final = "inside"
"""Stands for a transport where none is needed."""

Sizes = dict[tuple[int, int], list[Timed]]


def copies_of(profile: Profile, samples: Samples, parts: dict[str, Part], spreads: dict[str, Spread]) -> list[CopyCost]:
    """One entry a kind of pair; what chunks cost, and what copies share, is measured between CPU memories."""
    descriptor_ns = _descriptor_ns(profile, samples, parts, spreads)
    found = _curves(profile, samples, parts, descriptor_ns, spreads, inside=False)
    shared = _shared(found, samples, spreads)
    first_ns = _first_ns(samples, spreads)
    return [replace(cost, first_ns=first_ns, **shared) for cost in found]


def copies_inside(
    profile: Profile, samples: Sequence[Samples], descriptor_ns: int, spreads: dict[str, Spread]
) -> list[CopyCost]:
    """Within one process: no transport has a part in it, so all of them have measured it."""
    every = Samples(INSIDE)
    every.moves = [one for each in samples for one in each.moves if one.ask.inside]
    return _curves(profile, every, {}, descriptor_ns, spreads, inside=True)


def _curves(
    profile: Profile,
    samples: Samples,
    parts: dict[str, Part],
    descriptor_ns: int,
    spreads: dict[str, Spread],
    inside: bool,
) -> list[CopyCost]:
    found: list[CopyCost] = []
    for kind in samples.kinds():
        what = "sizes" if kind[:3] == CPU[:3] else "kinds"
        sizes = samples.of(what, kind)
        if sizes and kind[2] == inside:
            asked = _asking_ns(profile, parts[f"{what}-push"]) if kind[3] else {}
            found.append(_curve(profile, samples, kind, sizes, asked, descriptor_ns, spreads))
    return found


def _asking_ns(profile: Profile, part: Part) -> dict[tuple[int, int], float]:
    """What of a push's time the simulator has already: the source is asked, and says when it is done. By (bytes,
    chunks)."""
    found: dict[tuple[int, int], list[float]] = {}
    for one in simulated(_free(profile), part):
        found.setdefault((one.ask.nbytes, one.ask.chunks), []).append(_bytes_phase(one))
    return {size: median(times) for size, times in found.items()}


def _free(profile: Profile) -> Profile:
    """The same machine, on which copies cost nothing."""
    return replace(profile, transfer_ns=0, descriptor_ns=0, copy_bytes_per_s=1e17, host_bytes_per_s=1e17, copies=())


def _first_ns(samples: Samples, spreads: dict[str, Spread]) -> int:
    """How much longer the first small copy between two processes takes than those that come after it."""
    later = samples.of("sizes")
    if not later:
        return 0
    smallest = min(later)
    alike = [one for one in samples.moves if one.ask.what == "sizes" and kind_of(one.ask) == CPU]
    firsts = [_bytes_phase(one) for one in alike if one.first and (one.ask.nbytes, one.ask.chunks) == smallest]
    if not firsts:
        return 0
    spreads[f"{samples.transport} first_ns"] = spread(firsts)
    return to_ns(median(firsts) - median(map(_bytes_phase, later[smallest])))


def _descriptor_ns(profile: Profile, samples: Samples, parts: dict[str, Part], spreads: dict[str, Spread]) -> int:
    """What each further chunk adds to queue and copy, beyond its bytes' time and what the simulator adds already."""
    sizes = samples.of("chunks")
    if len(sizes) < 2:
        return 0
    (few, _), (many, count) = min(sizes), max(sizes)
    spreads[f"{label(samples.transport, CPU)} descriptor_ns"] = spread(
        _bytes_phase(one) for one in sizes[(many, count)]
    )
    more = median(map(_bytes_phase, sizes[(many, count)])) - median(map(_bytes_phase, sizes[min(sizes)]))
    for one in simulated(_free(profile), parts["chunks"]):
        if one.ask.chunks == count:
            more -= _bytes_phase(one)
            break
    large = samples.of("sizes")
    near = min(large, key=lambda size: abs(size[0] - many))
    first = min(large)
    bytes_ns = (
        (median(map(_copy, large[near])) - median(map(_copy, large[first]))) * (many - few) / (near[0] - first[0])
    )
    return to_ns((more - bytes_ns) / (count - 1))


def _bytes_phase(one: Timed) -> float:
    return float(one.queue_ns + one.copy_ns)


def _copy(one: Timed) -> float:
    return float(one.copy_ns)


def label(transport: str, kind: Kind) -> str:
    """Such copies' name in ``Fitted.spreads``."""
    source, target, inside, push = kind
    return f"{transport} {source}-{target}{' inside' if inside else ''}{' pushed' if push else ''}"


def _curve(
    profile: Profile,
    samples: Samples,
    kind: Kind,
    sizes: Sizes,
    asked: dict[tuple[int, int], float],
    descriptor_ns: int,
    spreads: dict[str, Spread],
) -> CopyCost:
    """Fixed costs and rates: what the small sizes' times come to at 0 bytes is fixed, the rest is the bytes' own.
    ``asked``: what of them is not the copy's, ns by size; else a service time."""
    source, target, inside, push = kind
    name = label(samples.transport, kind)
    queues = [one.queue_ns for group in sizes.values() for one in group if one.ask.chunks == 1]
    spreads[f"{name} queue_ns"] = spread(queues)
    times: list[tuple[int, float]] = []
    for (nbytes, count), group in sizes.items():
        besides = asked.get((nbytes, count), profile.service_ns)
        spreads[f"{name} {nbytes}"] = spread(nbytes * 1e9 / max(1, one.copy_ns) for one in group)
        times.append((nbytes, median(map(_copy, group)) - besides - count * descriptor_ns))
    fixed = _height([one for one in times if one[0] <= FIXED_UP_TO] or times[:1])
    rates: list[tuple[int, float]] = []
    least_ns = float("inf")
    for nbytes, took_ns in reversed(times):  # what disturbs one makes it longer: a larger size's time bounds it
        least_ns = max(min(least_ns, took_ns - fixed), nbytes * 1e9 / FASTEST)
        rates.append((nbytes, to_rate(nbytes * 1e9 / least_ns)))
    rates.reverse()
    return CopyCost(
        transport=samples.transport,
        source=source,
        target=target,
        inside=inside,
        push=push,
        queue_ns=to_ns(median(queues)),
        copy_ns=to_ns(fixed),
        descriptor_ns=descriptor_ns,
        rates=_rising(rates),
    )


def _height(times: list[tuple[int, float]]) -> float:
    """At 0 bytes, of a straight line through times by size: the middle one of all lines through two of them."""
    slopes = [
        max(0.0, (later_ns - earlier_ns) / (later - earlier))
        for (earlier, earlier_ns), (later, later_ns) in combinations(times, 2)
    ]
    slope = median(slopes) if slopes else 0.0
    return max(0.0, median(took_ns - slope * nbytes for nbytes, took_ns in times))


def _rising(rates: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Rounding must not make a larger size quicker than a smaller one."""
    kept: list[tuple[int, float]] = []
    for size, rate in rates:
        if kept and size / rate < kept[-1][0] / kept[-1][1]:
            rate = size * kept[-1][1] / kept[-1][0]
        kept.append((size, rate))
    return tuple(kept)


def _shared(costs: Sequence[CopyCost], samples: Samples, spreads: dict[str, Spread]) -> dict[str, float]:
    """What all of a transport's copies have in common. Two large ones at once may be as fast as one, never slower than
    one alone."""
    large = [rate for cost in costs for size, rate in cost.rates if size >= SHARED_FROM]
    best = max(large or [rate for cost in costs for _, rate in cost.rates], default=0.0)
    values: dict[str, float] = {}
    for what, rates in samples.together.items():
        if rates:
            values[f"{what}_bytes_per_s"] = to_rate(max(best, median(rates)))
            spreads[f"{samples.transport} {what}_bytes_per_s"] = spread(rates)
    gigabytes = sum(amount for amount, _ in samples.cpu_s)
    if gigabytes:
        values["cpu_s_per_gb"] = round(sum(seconds for _, seconds in samples.cpu_s) / gigabytes, 3)
    return values
