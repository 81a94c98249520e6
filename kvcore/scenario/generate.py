"""Workloads: from a few numbers and a seed to prompts and steps, one after another and the same everywhere.

Each subsystem draws from its own stream (arrivals, lengths, choices), so that changing one leaves the others as they
were. Only ``Random.random`` is used: it is the same in every version of Python.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from typing import Dict, Final, Iterator, List, Optional, Tuple

import msgspec

from kvcore.scenario.schema import Arrival, Lengths, Lookup, Move, Prompt, Scenario, Step, Store, Use, Workload
from kvcore.scenario.units import Duration, Tokens

#: Prompts of a workload that does not say how many: one an operation, at most so many.
PROMPTS_MAX: Final = 64
#: What a prompt of a workload is called: this and its number; a group's shared beginning: the other and its number.
PROMPT: Final = "work-"
SHARED: Final = "shared-"
_STANDARD_MIX: Final[Dict[str, float]] = {"store": 1.0, "use": 6.0, "lookup": 1.0, "move": 2.0}


def expand(scenario: Scenario, seed: Optional[int] = None) -> Scenario:
    """The scenario with its workload's prompts and steps after its own, and no workload. ``seed`` replaces its own."""
    if scenario.workload is None:
        return scenario
    prompts = {**scenario.prompts, **workload_prompts(scenario, seed)}
    steps = (*scenario.steps, *workload_steps(scenario, seed))
    return msgspec.structs.replace(scenario, prompts=prompts, steps=steps, workload=None)


def stream(scenario: Scenario, seed: Optional[int], what: str) -> random.Random:
    """The random stream of one subsystem."""
    return random.Random(f"{scenario.seed if seed is None else seed}/workload/{what}")


# ---- prompts --------------------------------------------------------------------------------------------------------
def workload_prompts(scenario: Scenario, seed: Optional[int] = None) -> Dict[str, Prompt]:
    """The prompts of ``scenario.workload``, longest-shared first, by name. Each belongs to a group drawn for it."""
    work = scenario.workload
    if work is None:
        return {}
    chunk = scenario.kv.chunk_tokens
    lengths = prompt_lengths(work.prompt_tokens, chunk, stream(scenario, seed, "lengths"))
    grouping = stream(scenario, seed, "groups")
    shared = work.shared_prefix
    prompts: Dict[str, Prompt] = {}
    common = shared.tokens.count(chunk) if shared is not None else 0
    if shared is not None and common:
        prompts = {f"{SHARED}{g}": Prompt(tokens=Tokens(common)) for g in range(shared.groups)}
    for i in range(prompt_count(work)):
        tokens = next(lengths)
        shares: Dict[str, int] = {}
        if shared is not None and common:
            shares = {f"{SHARED}{int(grouping.random() * shared.groups)}": min(common, tokens)}
        prompts[f"{PROMPT}{i}"] = Prompt(tokens=Tokens(tokens), shares=shares)
    return prompts


def prompt_count(work: Workload) -> int:
    return work.prompts or min(PROMPTS_MAX, work.moves + work.requests)


def prompt_lengths(lengths: Lengths, chunk: int, rng: random.Random) -> Iterator[int]:
    """Tokens of one prompt after another, without end."""
    if lengths.uniform is not None:
        low, high = lengths.uniform.least.count(chunk), lengths.uniform.most.count(chunk)
        while True:
            yield low + int(rng.random() * (high - low + 1))
    elif lengths.zipf is not None:
        low = lengths.zipf.least.count(chunk)
        table = popularity(lengths.zipf.most.count(chunk) // low, lengths.zipf.exponent)
        while True:
            yield low * (1 + draw(table, rng))
    elif lengths.lognormal is not None:
        shape = lengths.lognormal
        low, high = shape.least.count(chunk), shape.most.count(chunk)
        while True:
            normal = math.sqrt(-2 * math.log(1 - rng.random())) * math.cos(2 * math.pi * rng.random())
            drawn = shape.median.count(chunk) * math.exp(min(shape.sigma * normal, 50.0))
            yield max(low, min(high, round(drawn)))
    else:
        fixed = lengths.fixed.count(chunk) if lengths.fixed is not None else chunk
        yield from itertools.repeat(fixed)


def popularity(count: int, exponent: float) -> List[float]:
    """Running sums of the Zipf weights of 1 .. ``count``; exponent 0: all alike."""
    return list(itertools.accumulate([k**-exponent for k in range(1, count + 1)]))


def draw(table: List[float], rng: random.Random) -> int:
    """A number from 0, by running sums of weights."""
    return min(bisect.bisect_right(table, rng.random() * table[-1]), len(table) - 1)


# ---- steps ----------------------------------------------------------------------------------------------------------
class Pace:
    """When each operation is issued: (after, background, window) of one step after another."""

    def __init__(self, arrival: Arrival, rng: random.Random) -> None:
        self.arrival: Arrival = arrival
        self.rng: random.Random = rng

    def next(self) -> Tuple[Optional[Duration], bool, int]:
        arrival = self.arrival
        if arrival.poisson is not None:
            gap_s = -math.log(1 - self.rng.random()) / arrival.poisson
            return Duration.of_ns(round(gap_s * 1e9)), True, 0
        if arrival.constant is not None:
            return Duration.of_ns(round(1e9 / arrival.constant)), True, 0
        window = arrival.closed or 1
        return None, window > 1, window if window > 1 else 0


def workload_steps(scenario: Scenario, seed: Optional[int] = None) -> Iterator[Step]:
    """The steps of ``scenario.workload``, drawn one after another: nothing is kept but where each prompt is."""
    work = scenario.workload
    if work is None:
        return iter(())
    pace = Pace(work.arrival, stream(scenario, seed, "arrivals"))
    choosing = stream(scenario, seed, "choices")
    places = _places(scenario, work)
    return _moves(work, places, pace, choosing) if work.moves else _requests(work, places, pace, choosing)


def _places(scenario: Scenario, work: Workload) -> List[str]:
    """One position an instance: the workload's location there, or its first."""
    found: List[str] = []
    for name, instance in scenario.instances.items():
        location = work.location or next(iter(instance.locations))
        if location in instance.locations:
            found.append(f"{name}/{location}")
    return found


def _moves(work: Workload, places: List[str], pace: Pace, rng: random.Random) -> Iterator[Step]:
    """Every prompt is stored, round the instances; then they are moved on, popular ones more often."""
    count = prompt_count(work)
    where = [i % len(places) for i in range(count)]
    for i in range(count):
        yield Step(store=Store(at=places[where[i]], prompt=f"{PROMPT}{i}"))
    table = popularity(count, work.zipf) if work.zipf else None
    for number in range(work.moves):
        # Without an exponent they take turns, so that a prompt's moves are as far apart as they can be.
        i = draw(table, rng) if table is not None else number % count
        source = where[i]
        where[i] = _elsewhere(source, len(places), rng)
        yield _move(places[source], places[where[i]], i, False, pace)


def _elsewhere(here: int, count: int, rng: random.Random) -> int:
    return (here + 1 + int(rng.random() * (count - 1))) % count


def _move(source: str, to: str, i: int, copy: bool, pace: Pace) -> Step:
    after, background, window = pace.next()
    return Step(
        move=Move(
            src=source, dst=to, prompt=f"{PROMPT}{i}", copy=copy, after=after, background=background, window=window
        )
    )


def _requests(work: Workload, places: List[str], pace: Pace, rng: random.Random) -> Iterator[Step]:
    """Operations of the mix on popular prompts. One that nobody has stored yet is stored first, whatever was drawn."""
    mix = {name: weight for name, weight in (work.mix or _STANDARD_MIX).items() if weight > 0}
    if len(places) < 2 and not work.mix:
        del mix["move"]
    kinds = list(mix)
    weights = list(itertools.accumulate(mix.values()))
    count = prompt_count(work)
    table = popularity(count, work.zipf)
    where: Dict[int, int] = {}
    for _ in range(work.requests):
        kind = kinds[draw(weights, rng)]
        i = draw(table, rng)
        here = where.get(i)
        if here is None or kind == "store":
            here = where[i] = int(rng.random() * len(places))
            kind = "store"
        if kind in ("move", "copy"):
            there = _elsewhere(here, len(places), rng)
            where[i] = there
            yield _move(places[here], places[there], i, kind == "copy", pace)
        else:
            yield _plain_step(kind, places[here], i, pace)


def _plain_step(kind: str, at: str, i: int, pace: Pace) -> Step:
    after, background, window = pace.next()
    prompt = f"{PROMPT}{i}"
    if kind == "store":
        return Step(store=Store(at=at, prompt=prompt, after=after, background=background, window=window))
    if kind == "use":
        return Step(use=Use(at=at, prompt=prompt, after=after, background=background, window=window))
    return Step(lookup=Lookup(prompt=prompt, after=after, background=background, window=window))
