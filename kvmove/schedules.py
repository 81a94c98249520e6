"""Other simulated schedules of one scenario: the same steps and faults, with everything taking another while.

What a racing scenario answers depends on who is first. A schedule draws each cost of the profile anew, delays some
messages, and starts the background steps a little later; its number and the scenario's seed say all of that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from kvcore.protocol.config import WorkerSpec
from kvcore.scenario.build import Built
from kvcore.scenario.client import ClientSpec
from kvcore.scenario.result import Result
from kvcore.scenario.schema import Fault, When
from kvcore.scenario.units import Duration
from kvsim.costs import Profile
from kvsim.run import run

#: Each cost is multiplied by 2 to the power of something between minus this and this.
OCTAVES: Final = 3.0
#: Messages of which some are delayed: those whose order decides who wins.
DELAYED: Final = (
    *("MoveRequest", "Pin", "Pinned", "Fetch", "Reserved", "Committed", "Release", "Released", "End"),
    *("Delta", "Beat", "Renew", "Retain", "Clear", "CancelRequest", "StoreRequest", "UseRequest", "Answer"),
)
MESSAGES: Final = {"read": ("Fence", "Fenced"), "push": ("Push", "Pushed", "Stop")}
DELAYS: Final = 10
SHORTEST_DELAY_NS: Final = 50_000
LONGEST_DELAY_NS: Final = 20_000_000
LONGEST_START_NS: Final = 100_000_000
LATEST_START_NS: Final = 5_000_000


def schedules(built: Built, count: int) -> Iterator[Result]:
    """Up to ``count`` results, the first one cheap to reproduce: ``schedule(built, 1)``."""
    for number in range(1, count + 1):
        yield schedule(built, number)


def schedule(built: Built, number: int) -> Result:
    draw = random.Random(f"{built.seed}/schedule/{number}")
    for change in (_slow_starts, _late, _delayed, _out_of_step):
        built = change(built, draw)
    return run(built, profile=_profile(draw))


def _profile(draw: random.Random) -> Profile:
    standard = Profile()
    values: dict[str, Any] = {}
    for name in Profile.__struct_fields__:
        value = getattr(standard, name)
        factor = 2 ** draw.uniform(-OCTAVES, OCTAVES)
        if isinstance(value, int):
            values[name] = round(value * factor)
        elif isinstance(value, float):
            values[name] = value * factor
    return msgspec.structs.replace(standard, **values)


def _slow_starts(built: Built, draw: random.Random) -> Built:
    """A process that is started again takes a while until it hears anything; what is sent to it meanwhile is lost."""
    faults = []
    for fault in built.faults:
        crash = fault.crash
        if crash is not None and crash.restart_after is not None:
            after_ns = crash.restart_after.ns(built.config) + _short_ns(draw, SHORTEST_DELAY_NS, LONGEST_START_NS)
            crash = msgspec.structs.replace(crash, restart_after=Duration.of_ns(after_ns))
            fault = msgspec.structs.replace(fault, crash=crash)
        faults.append(fault)
    return msgspec.structs.replace(built, faults=tuple(faults))


def _late(built: Built, draw: random.Random) -> Built:
    """Steps that do not wait for one another start within a few milliseconds, each time in another order."""
    specs = []
    for spec in built.specs:
        if isinstance(spec, ClientSpec):
            ops = [
                msgspec.structs.replace(op, after_ns=op.after_ns + _short_ns(draw, 1000, LATEST_START_NS))
                for op in spec.ops
            ]
            spec = msgspec.structs.replace(spec, ops=tuple(ops))
        specs.append(spec)
    return msgspec.structs.replace(built, specs=tuple(specs))


def _delayed(built: Built, draw: random.Random) -> Built:
    """Most delays are on the way from one node or to one only: moves overtake each other, and the ranks of an instance
    do not march in step."""
    longest = min(LONGEST_DELAY_NS, 2 * built.config.retry_ns)
    names = (*DELAYED, *(message for way in _directions(built) for message in MESSAGES[way]))
    faults = []
    for _ in range(DELAYS):
        side = draw.random()
        when = When(
            sent=draw.choice(names),
            by=draw.choice(built.nodes) if side < 0.3 else "",
            to=draw.choice(built.nodes) if side > 0.6 else "",
            nth=draw.choice((1, 1, 2, 3)),
        )
        delay = Duration.of_ns(_short_ns(draw, SHORTEST_DELAY_NS, longest))
        faults.append(Fault(when=when, delay=delay, times=draw.choice((1, 1, 2, 4))))
    return msgspec.structs.replace(built, faults=(*built.faults, *faults))


def _directions(built: Built) -> list[str]:
    """Who may move bytes here."""
    found: set[str] = set()
    for spec in built.specs:
        if isinstance(spec, WorkerSpec):
            told = built.config.direction if spec.config.direction == "auto" else spec.config.direction
            found |= {"read", "push"} if told == "auto" and spec.measured else {"read" if told == "auto" else told}
    return sorted(found, reverse=True)


def _out_of_step(built: Built, draw: random.Random) -> Built:
    """Processes do not start at one instant: each worker registers some time within a beat of the others, and beats as
    much out of step with the workload from then on."""
    config = built.config
    faults = []
    for spec in built.specs:
        if isinstance(spec, WorkerSpec) and draw.random() < 0.5:
            late_ns = round(draw.random() * config.beat_ns)
            asked = 1 + late_ns // config.retry_ns
            when = When(sent="Register", by=spec.name)
            faults.append(Fault(when=when, delay=Duration.of_ns(max(1, late_ns)), times=asked))
    return msgspec.structs.replace(built, faults=(*built.faults, *faults))


def _short_ns(draw: random.Random, shortest: int, longest: int) -> int:
    """All magnitudes between the two are alike."""
    return round(shortest * math.exp(draw.random() * math.log(longest / shortest)))
