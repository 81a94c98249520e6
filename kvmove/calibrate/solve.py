"""Finding a number by simulating: what a profile must say for the simulator to take as long as was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Final

from msgspec.structs import replace

from kvcore.scenario.profile import Profile
from kvmove.calibrate.plan import Ask, Part
from kvmove.calibrate.samples import Samples, Timed, timed

TRIAL_NS: Final = 100_000
TRIALS: Final = 4


def solve(
    profile: Profile,
    field: str,
    part: Part,
    wanted: Callable[[Ask], bool],
    phase: Callable[[Timed], float],
    goal: float,
) -> Profile:
    """The profile with which the simulated phase is as long as the measured one; the field is 0 so far. A straight line
    through 0 and a trial gives a better trial."""
    none = middle(simulated(profile, part), wanted, phase)
    trial = TRIAL_NS
    for _ in range(TRIALS):
        some = middle(simulated(replace(profile, **{field: trial}), part), wanted, phase)
        if goal <= none or some <= none:
            return profile
        trial = max(1, to_ns((goal - none) * trial / (some - none)))
    return replace(profile, **{field: trial})


def simulated(profile: Profile, part: Part) -> list[Timed]:
    """A part's moves, as the simulator has them."""
    from kvsim.run import run

    return timed(part, run(part.built, profile=profile, check=False))


def middle(moves: Iterable[Timed], wanted: Callable[[Ask], bool], phase: Callable[[Timed], float]) -> float:
    """The middle one of the wanted moves that were alone."""
    return median(phase(one) for one in moves if wanted(one.ask) and not one.ask.group)


def pooled(samples: Sequence[Samples], what: str, wanted: Callable[[Ask], bool]) -> list[Timed]:
    """Of all transports, read: what messages take has nothing to do with them."""
    every = [one for each in samples for one in each.moves if one.ask.what == what and not one.ask.push]
    return [one for one in every if wanted(one.ask)]


def to_ns(value: float) -> int:
    """Nanoseconds to three figures: there are no more in them."""
    return max(0, int(float(f"{value:.3g}")))


def to_rate(value: float) -> float:
    return float(f"{value:.3g}")
