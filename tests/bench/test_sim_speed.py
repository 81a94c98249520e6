"""Moves and inputs a second of one core, history off and on, and beside them what the issue asks for.

    pytest tests/bench/test_sim_speed.py --benchmark-enable -s

Without ``--benchmark-enable`` each workload runs once and small: that it works, not how fast. In build/fast the same
tests measure the compiled form. Read the ratios: absolute numbers are this machine's.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final, Optional

import pytest

from kvcore.scenario.build import build
from kvcore.scenario.loader import loads
from kvsim.run import run
from kvsim.workloads import LOADS, Bench

#: workload -> moves/s asked for, pure
GOALS: Final = {"a": 18_000, "b": 10_000, "c": 8_000, "b256": 2_000, "b1024": 0, "a4": 0}
SMALL: Final = {"a": 200, "b": 200, "b256": 200}


@pytest.mark.parametrize("history", [False, True], ids=["history off", "history on"])
@pytest.mark.parametrize("name", list(GOALS))
def test_moves_a_second(name: str, history: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    measured = request.config.getoption("--benchmark-enable")
    if not measured and name not in SMALL:
        pytest.skip("measured with --benchmark-enable only")
    load = LOADS[name]
    moves = load.moves if measured else SMALL[name]
    path: Optional[Path] = tmp_path / "history.jsonl" if history else None
    bench = Bench(load, time.process_time, path)
    bench.run(moves // 10)
    bench.run(moves)
    rate = moves / bench.cpu_s
    goal = GOALS[name]
    print(f"\n{bench.report(moves)}{', ' + format(rate / goal, '.2f') + ' of the goal' if goal else ''}")
    assert bench.pump.failed == 0
    assert bench.inputs > 10 * moves
    if path is not None:
        assert path.stat().st_size > 1000 * moves


TINY = """
name: tiny
kv: {bytes_per_token: 1 KiB, chunk: 16 tokens}
constants: {scale: 0.05, dead: 1 s}
instances:
  a: {locations: {cpu: 256 KiB}}
  b: {locations: {cpu: 256 KiB}}
  c: {locations: {cpu: 256 KiB}}
steps:
  - store: {at: a/cpu, prompt: p, tokens: 16}
  - move: {from: a/cpu, to: b/cpu, prompt: p}
  - move: {from: b/cpu, to: c/cpu, prompt: p}
faults:
  - {when: {sent: Committed, by: b}, drop: 1}
"""


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
def test_tiny_scenarios_a_second(check: bool, benchmark) -> None:  # type: ignore[no-untyped-def]
    """A fresh world each: three instances, two moves, a fault; every property after every input. Asked for: 4,000/s."""
    built = build(loads(TINY, "tiny"))
    result = benchmark(run, built, check=check)
    assert result.clean and result.metrics["moves"] == 2
    if benchmark.stats is not None:
        each = benchmark.stats.stats.median
        inputs = result.metrics["inputs"]
        print(f"\n{1 / each:,.0f} scenarios/s, {1e6 * each / inputs:.1f} us an input, {inputs} inputs")
