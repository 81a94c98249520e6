"""From samples to a profile: the numbers with which the simulator, playing the same scenarios, takes as long.

What can be read off is read off (a service time, a copy's phases); what shows only in sums (a message's latency, a
chunk's share) is solved for: the simulated sum rises in a straight line with it, so two simulations give it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from statistics import median
from typing import Final

import msgspec
from msgspec.structs import replace

from kvcore.scenario.profile import AUTO, CopyCost, Made, Profile
from kvmove.calibrate.plan import Ask, Part
from kvmove.calibrate.samples import Kind, Samples, Spread, Timed, spread, timed

CPU: Final[Kind] = ("cpu", "cpu", False)
TRIAL_NS: Final = 100_000
TRIALS: Final = 4
SHARED_FROM: Final = 32 << 20
"""Bytes: smaller copies may stay in a cache, and share nothing."""
FIXED_UP_TO: Final = 4 << 20
FASTEST: Final = 1e13
"""Bytes a second: where bytes are handed over rather than copied, or their time is lost in noise."""
INSIDE: Final = "memcpy"

Sizes = dict[tuple[int, int], list[Timed]]


class Fitted(msgspec.Struct):
    """``spreads``: of what a profile's numbers come from, by their names; in ns or bytes a second."""

    profile: Profile
    spreads: dict[str, Spread]


def fit(
    samples: Sequence[Samples], parts: dict[str, Part], journal_ns: Sequence[float], made: Made, name: str
) -> Fitted:
    """``samples``: of each transport, the preferred one first."""
    spreads: dict[str, Spread] = {"journal_ns": spread(journal_ns)}
    profile = Profile(name=name, made=made, journal_ns=_ns(median(journal_ns)), message_latency_ns=0)
    gaps = [gap for one in samples for gap in one.gaps]
    if gaps:
        spreads["service_ns"] = spread(gaps)
        profile = replace(profile, service_ns=_ns(median(gaps)))
    profile = _engine(profile, samples, spreads)
    profile = _messages(profile, samples, parts, spreads)
    copies = [cost for one in samples for cost in _copies(profile, one, parts, spreads)]
    inside = {(cost.source, cost.target): cost for cost in reversed(copies) if cost.inside}
    between = [cost for cost in copies if not cost.inside]
    return Fitted(_plain(replace(profile, copies=(*between, *inside.values()))), spreads)


# ---- control --------------------------------------------------------------------------------------------------------
def _messages(
    profile: Profile, samples: Sequence[Samples], parts: dict[str, Part], spreads: dict[str, Spread]
) -> Profile:
    """Latency from moves of one chunk, what chunks cost from moves of many, waking from moves of two ranks."""

    def told(one: Timed) -> float:
        return float(one.control_ns + one.commit_ns)

    single = _pooled(samples, "sizes", lambda ask: ask.chunks == 1)
    spreads["message_latency_ns"] = spread(told(one) for one in single)
    profile = _solve(profile, "message_latency_ns", parts["sizes"], _chunks(1), told, median(map(told, single)))
    most = max(ask.chunks for ask in parts["chunks"].asks.values())
    for field, phase in (("key_ns", _control), ("index_ns", _commit)):
        many = [phase(one) for one in _pooled(samples, "chunks", _chunks(most))]
        few = median(phase(one) for one in _pooled(samples, "chunks", _chunks(1)))
        more = median(many) - few
        simulated = _simulated(profile, parts["chunks"], AUTO)
        base = _middle(simulated, _chunks(1), phase)
        spreads[field] = spread(many)
        profile = _solve(profile, field, parts["chunks"], _chunks(most), phase, base + more)
    one, both = (list(map(told, _pooled(samples, f"ranks-{count}", _any))) for count in (1, 2))
    if one and both:
        spreads["wake_ns"] = spread(both)
        goal = _middle(_simulated(profile, parts["ranks-1"], AUTO), _any, told) + median(both) - median(one)
        profile = _solve(profile, "wake_ns", parts["ranks-2"], _any, told, goal)
    return profile


def _any(ask: Ask) -> bool:
    return True


def _control(one: Timed) -> float:
    return float(one.control_ns)


def _commit(one: Timed) -> float:
    return float(one.commit_ns)


def _chunks(count: int) -> Callable[[Ask], bool]:
    return lambda ask: ask.chunks == count


def _solve(
    profile: Profile,
    field: str,
    part: Part,
    wanted: Callable[[Ask], bool],
    phase: Callable[[Timed], float],
    goal: float,
) -> Profile:
    """The profile with which the simulated phase is as long as the measured one; the field is 0 so far. A straight line
    through 0 and a trial gives a better trial."""
    none = _middle(_simulated(profile, part, AUTO), wanted, phase)
    trial = TRIAL_NS
    for _ in range(TRIALS):
        some = _middle(_simulated(replace(profile, **{field: trial}), part, AUTO), wanted, phase)
        if goal <= none or some <= none:
            return profile
        trial = max(1, _ns((goal - none) * trial / (some - none)))
    return replace(profile, **{field: trial})


def _simulated(profile: Profile, part: Part, transport: str) -> list[Timed]:
    from kvsim.run import run

    return timed(part, run(part.built, profile=profile, transport=transport, check=False))


def _middle(moves: Iterable[Timed], wanted: Callable[[Ask], bool], phase: Callable[[Timed], float]) -> float:
    return median(phase(one) for one in moves if wanted(one.ask) and not one.ask.group)


def _pooled(samples: Sequence[Samples], what: str, wanted: Callable[[Ask], bool]) -> list[Timed]:
    return [one for each in samples for one in each.moves if one.ask.what == what and wanted(one.ask)]


# ---- engines --------------------------------------------------------------------------------------------------------
def _engine(profile: Profile, samples: Sequence[Samples], spreads: dict[str, Spread]) -> Profile:
    for name in ("fill", "read"):
        by_size: dict[int, list[float]] = {}
        for one in samples:
            for size, times in (one.fills if name == "fill" else one.reads).items():
                by_size.setdefault(size, []).extend(times)
        if len(by_size) < 2:
            continue
        small, large = min(by_size), max(size for size in by_size if size <= 1 << 26)
        if small == large:
            continue
        rate = (large - small) * 1e9 / max(1.0, median(by_size[large]) - median(by_size[small]))
        fixed = median(by_size[small]) - small * 1e9 / rate - profile.service_ns
        spreads[f"{name}_bytes_per_s"] = spread(large * 1e9 / took for took in by_size[large])
        profile = replace(profile, **{f"{name}_ns": _ns(fixed), f"{name}_bytes_per_s": _rate(rate)})
    return profile


# ---- copies ---------------------------------------------------------------------------------------------------------
def _copies(profile: Profile, samples: Samples, parts: dict[str, Part], spreads: dict[str, Spread]) -> list[CopyCost]:
    """One entry a kind of pair; what chunks cost, and what copies share, is measured between CPU memories."""
    found: list[CopyCost] = []
    first_ns = _first_ns(samples, spreads)
    descriptor_ns = _descriptor_ns(profile, samples, parts, spreads)
    for kind in samples.kinds():
        sizes = samples.of("sizes" if kind == CPU else "kinds", kind)
        if not sizes:
            continue
        cost = _curve(profile, samples, kind, sizes, descriptor_ns, spreads)
        if not cost.inside:
            cost = _shared(replace(cost, first_ns=first_ns), samples, spreads)
        found.append(cost)
    return found


def _first_ns(samples: Samples, spreads: dict[str, Spread]) -> int:
    """How much longer the first small copy between two processes takes than those that come after it."""
    later = samples.of("sizes")
    if not later:
        return 0
    smallest = min(later)
    firsts = [
        _bytes_phase(one)
        for one in samples.moves
        if one.first and one.ask.what == "sizes" and (one.ask.nbytes, one.ask.chunks) == smallest
    ]
    if not firsts:
        return 0
    spreads[f"{samples.transport} first_ns"] = spread(firsts)
    return _ns(median(firsts) - median(map(_bytes_phase, later[smallest])))


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
    free = replace(profile, transfer_ns=0, descriptor_ns=0, copy_bytes_per_s=1e17, host_bytes_per_s=1e17)
    simulated = _simulated(free, parts["chunks"], AUTO)
    for one in simulated:
        if one.ask.chunks == count:
            more -= _bytes_phase(one)
            break
    large = samples.of("sizes")
    near = min(large, key=lambda size: abs(size[0] - many))
    first = min(large)
    bytes_ns = (
        (median(map(_copy, large[near])) - median(map(_copy, large[first]))) * (many - few) / (near[0] - first[0])
    )
    return _ns((more - bytes_ns) / (count - 1))


def _bytes_phase(one: Timed) -> float:
    return float(one.queue_ns + one.copy_ns)


def _copy(one: Timed) -> float:
    return float(one.copy_ns)


def label(transport: str, kind: Kind) -> str:
    """Such copies' name in ``Fitted.spreads``."""
    source, target, inside = kind
    return f"{INSIDE if inside else transport} {source}-{target}"


def _curve(
    profile: Profile, samples: Samples, kind: Kind, sizes: Sizes, descriptor_ns: int, spreads: dict[str, Spread]
) -> CopyCost:
    """Fixed costs and rates: what the small sizes' times come to at 0 bytes is fixed, the rest is the bytes' own."""
    source, target, inside = kind
    name = label(samples.transport, kind)
    queues = [one.queue_ns for group in sizes.values() for one in group if one.ask.chunks == 1]
    spreads[f"{name} queue_ns"] = spread(queues)
    times: list[tuple[int, float]] = []
    for (nbytes, count), group in sizes.items():
        spreads[f"{name} {nbytes}"] = spread(nbytes * 1e9 / max(1, one.copy_ns) for one in group)
        times.append((nbytes, median(map(_copy, group)) - profile.service_ns - count * descriptor_ns))
    fixed = _height([one for one in times if one[0] <= FIXED_UP_TO] or times[:1])
    rates: list[tuple[int, float]] = []
    least_ns = float("inf")
    for nbytes, took_ns in reversed(
        times
    ):  # what disturbs a measurement makes it longer: a larger size's time bounds it
        least_ns = max(min(least_ns, took_ns - fixed), nbytes * 1e9 / FASTEST)
        rates.append((nbytes, _rate(nbytes * 1e9 / least_ns)))
    rates.reverse()
    return CopyCost(
        transport=INSIDE if inside else samples.transport,
        source=source,
        target=target,
        inside=inside,
        queue_ns=_ns(median(queues)),
        copy_ns=_ns(fixed),
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


def _shared(cost: CopyCost, samples: Samples, spreads: dict[str, Spread]) -> CopyCost:
    """Two large ones at once may be as fast as one, never slower than one alone."""
    best = max([rate for size, rate in cost.rates if size >= SHARED_FROM] or [cost.rates[-1][1]])
    values = {}
    for what, rates in samples.together.items():
        if rates:
            values[f"{what}_bytes_per_s"] = _rate(max(best, median(rates)))
            spreads[f"{samples.transport} {what}_bytes_per_s"] = spread(rates)
    cpu = 0.0
    gigabytes = sum(amount for amount, _ in samples.cpu_s)
    if gigabytes:
        cpu = round(sum(seconds for _, seconds in samples.cpu_s) / gigabytes, 3)
    return replace(cost, cpu_s_per_gb=cpu, **values)


def _plain(profile: Profile) -> Profile:
    """The plain numbers say of the first transport's large copies what its entry says."""
    cost = profile.cost(AUTO, "cpu", "cpu")
    if cost is None:
        return profile
    inside = profile.cost(AUTO, "cpu", "disk", True)
    return replace(
        profile,
        transfer_ns=cost.queue_ns + cost.copy_ns,
        descriptor_ns=cost.descriptor_ns,
        copy_bytes_per_s=cost.rates[-1][1],
        host_bytes_per_s=max(cost.host_bytes_per_s, cost.rates[-1][1]),
        memcpy_bytes_per_s=inside.rates[-1][1] if inside is not None else profile.memcpy_bytes_per_s,
    )


def _ns(value: float) -> int:
    """Nanoseconds to three figures: there are no more in them."""
    return max(0, int(float(f"{value:.3g}")))


def _rate(value: float) -> float:
    return float(f"{value:.3g}")
