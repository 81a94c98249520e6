"""Generated tiny scenarios (3 instances, 2 moves, 1-2 faults) a second of one core: each from its seed, in a fresh
world, with the touched node checked after every input; and where the time goes.

    pytest tests/bench/test_swarm.py --benchmark-enable -s
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from kvcore.scenario.arbitrary import TINY, scenario_from, seeded
from kvcore.scenario.build import build
from kvsim.run import run

#: scenarios/s of one core asked for
GOAL = 4_000


def test_tiny_scenarios_a_second(request: pytest.FixtureRequest) -> None:
    count = 2_000 if request.config.getoption("--benchmark-enable") else 50
    run(build(scenario_from(seeded(count), TINY)))
    scenarios, generating_s = timed(lambda: [scenario_from(seeded(seed), TINY) for seed in range(count)])
    builds, building_s = timed(lambda: [build(scenario) for scenario in scenarios])
    results, running_s = timed(lambda: [run(built, check=False) for built in builds])
    checked, checking_s = timed(lambda: [run(built) for built in builds])
    inputs = sum(int(result.metrics["inputs"]) for result in checked)
    whole_s = generating_s + building_s + checking_s
    parts = {
        "generate": generating_s,
        "build": building_s,
        "run": running_s,
        "check": checking_s - running_s,
    }
    shares = ", ".join(f"{name} {1e6 * spent / count:.0f} us" for name, spent in parts.items())
    print(
        f"\n{count / whole_s:,.0f} scenarios/s ({count / whole_s / GOAL:.2f} of the goal), {inputs / count:.0f} inputs"
        f" each, {1e6 * checking_s / inputs:.1f} us an input: {shares}"
    )
    assert all(not result.hung for result in results + checked)
    assert all(not result.violations or any("corrupt" in label for label in result.fired) for result in checked)


def timed(what: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and its CPU seconds."""
    started = time.process_time()
    found = what()
    return found, time.process_time() - started
