"""From samples to a profile: the numbers with which the simulator, playing the same scenarios, takes as long.

What can be read off is read off (a service time, a copy's phases); what shows only in sums (a message's latency, a
chunk's share) is solved for: the simulated sum rises in a straight line with it, so a few simulations give it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import msgspec
from msgspec.structs import replace

from kvcore.scenario.profile import AUTO, Made, Profile
from kvmove.calibrate.copies import copies_inside, copies_of
from kvmove.calibrate.plan import Ask, Part
from kvmove.calibrate.samples import Samples, Timed
from kvmove.calibrate.solve import middle, pooled, simulated, solve, to_ns, to_rate
from kvmove.spread import Spread, spread


class Fitted(msgspec.Struct):
    """``spreads``: of what a profile's numbers come from, by their names; in ns or bytes a second."""

    profile: Profile
    spreads: dict[str, Spread]


def fit(
    samples: Sequence[Samples],
    parts: dict[str, Part],
    journal_ns: Sequence[float],
    made: Made,
    name: str,
    sums_per_s: Sequence[float] = (),
) -> Fitted:
    """``samples``: of each transport, the preferred one first."""
    spreads: dict[str, Spread] = {"journal_ns": spread(journal_ns)}
    profile = Profile(name=name, made=made, journal_ns=to_ns(median(journal_ns)), message_latency_ns=0)
    if sums_per_s:
        spreads["sum_bytes_per_s"] = spread(sums_per_s)
        profile = replace(profile, sum_bytes_per_s=to_rate(median(sums_per_s)))
    gaps = [gap for one in samples for gap in one.gaps]
    if gaps:
        spreads["service_ns"] = spread(gaps)
        profile = replace(profile, service_ns=to_ns(median(gaps)))
    profile = _engine(profile, samples, spreads)
    profile = _messages(profile, samples, parts, spreads)
    between = [cost for one in samples for cost in copies_of(profile, one, parts, spreads)]
    descriptor_ns = min((cost.descriptor_ns for cost in between), default=0)
    inside = copies_inside(profile, samples, descriptor_ns, spreads)
    return Fitted(_plain(replace(profile, copies=(*between, *inside))), spreads)


# ---- control --------------------------------------------------------------------------------------------------------
def _messages(
    profile: Profile, samples: Sequence[Samples], parts: dict[str, Part], spreads: dict[str, Spread]
) -> Profile:
    """Latency from moves of one chunk, what chunks cost from moves of many, waking from moves of two ranks."""

    def told(one: Timed) -> float:
        return float(one.control_ns + one.commit_ns)

    single = pooled(samples, "sizes", lambda ask: ask.chunks == 1)
    spreads["message_latency_ns"] = spread(told(one) for one in single)
    profile = solve(profile, "message_latency_ns", parts["sizes"], _chunks(1), told, median(map(told, single)))
    most = max(ask.chunks for ask in parts["chunks"].asks.values())
    for field, phase in (("key_ns", _control), ("index_ns", _commit)):
        many = [phase(one) for one in pooled(samples, "chunks", _chunks(most))]
        few = median(phase(one) for one in pooled(samples, "chunks", _chunks(1)))
        more = median(many) - few
        base = middle(simulated(profile, parts["chunks"]), _chunks(1), phase)
        spreads[field] = spread(many)
        profile = solve(profile, field, parts["chunks"], _chunks(most), phase, base + more)
    one, both = (list(map(told, pooled(samples, f"ranks-{count}", _any))) for count in (1, 2))
    if one and both:
        spreads["wake_ns"] = spread(both)
        goal = middle(simulated(profile, parts["ranks-1"]), _any, told) + median(both) - median(one)
        profile = solve(profile, "wake_ns", parts["ranks-2"], _any, told, goal)
    return profile


def _any(ask: Ask) -> bool:
    return True


def _control(one: Timed) -> float:
    return float(one.control_ns)


def _commit(one: Timed) -> float:
    return float(one.commit_ns)


def _chunks(count: int) -> Callable[[Ask], bool]:
    return lambda ask: ask.chunks == count


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
        profile = replace(profile, **{f"{name}_ns": to_ns(fixed), f"{name}_bytes_per_s": to_rate(rate)})
    return profile


def _plain(profile: Profile) -> Profile:
    """The plain numbers say of the first transport's large copies what its entry says."""
    cost = profile.cost(AUTO, "cpu", "cpu")
    if cost is None:
        return profile
    return replace(
        profile,
        transfer_ns=cost.queue_ns + cost.copy_ns,
        descriptor_ns=cost.descriptor_ns,
        copy_bytes_per_s=cost.rates[-1][1],
        host_bytes_per_s=max(cost.host_bytes_per_s, cost.rates[-1][1]),
    )
