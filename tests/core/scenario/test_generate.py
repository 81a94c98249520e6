"""Workloads: the same from the same seed, in any process; shaped as they say; each stream by itself."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from kvcore.protocol.config import Config
from kvcore.scenario.generate import draw, expand, popularity, prompt_lengths, stream, workload_prompts, workload_steps
from kvcore.scenario.loader import dump, loads
from kvcore.scenario.schema import Lengths, Scenario, Step
from kvcore.scenario.valid import check

ROOT = Path(__file__).resolve().parents[3]
BASE = """\
name: w
seed: 5
kv: {bytes_per_token: 1 KiB, chunk: 16 tokens}
instances:
  a: {locations: {cpu: 4 MiB}}
  b: {locations: {cpu: 4 MiB}}
  c: {locations: {disk: 4 MiB, cpu: 4 MiB}}
workload:
  location: cpu
"""


def workload(more: str) -> Scenario:
    return loads(BASE + "".join(f"  {line.strip()}\n" for line in more.split(";")))


def moves(scenario: Scenario) -> list[Step]:
    return [step for step in workload_steps(scenario) if step.move is not None]


def test_moves_start_where_the_prompt_is() -> None:
    scenario = workload("moves: 200; prompts: 7; zipf: 1.1")
    where: dict[str, str] = {}
    for step in workload_steps(scenario):
        if step.store is not None:
            where[step.store.prompt] = step.store.at
        elif step.move is not None:
            assert where[step.move.prompt] == step.move.src != step.move.dst
            where[step.move.prompt] = step.move.dst
    assert len(where) == 7
    assert len(moves(scenario)) == 200
    assert set(where.values()) <= {"a/cpu", "b/cpu", "c/cpu"}


def test_requests_use_what_was_stored() -> None:
    scenario = workload("requests: 500; prompts: 20; zipf: 1.0; mix: {use: 5, store: 1, lookup: 1, move: 1, copy: 1}")
    stored: set[str] = set()
    kinds: Counter[str] = Counter()
    for step in workload_steps(scenario):
        kinds[step.kind] += 1
        body = step.body
        if step.store is not None:
            stored.add(step.store.prompt)
        else:
            assert getattr(body, "prompt", "") in stored
    assert sum(kinds.values()) == 500
    assert kinds["use"] > kinds["move"] > 0
    assert any(step.move.copy for step in workload_steps(scenario) if step.move is not None)


def test_popularity_follows_its_exponent() -> None:
    scenario = workload("requests: 4000; prompts: 50; zipf: 1.2; mix: {use: 1}")
    asked = Counter(getattr(step.body, "prompt", "") for step in workload_steps(scenario))
    assert asked["work-0"] > 2 * asked["work-3"] > 0
    table = popularity(3, 0.0)
    rng = stream(scenario, None, "x")
    assert {draw(table, rng) for _ in range(100)} == {0, 1, 2}


@pytest.mark.parametrize(
    ("said", "low", "high"),
    [
        ("{fixed: 48}", 48, 48),
        ("48", 48, 48),
        ("{uniform: {min: 10, max: 2 chunks}}", 10, 32),
        ("{zipf: {exponent: 1.5, min: 1 chunk, max: 9 chunks}}", 16, 144),
        ("{lognormal: {median: 64, sigma: 1.0, min: 5, max: 500}}", 5, 500),
    ],
)
def test_lengths_stay_in_their_bounds(said: str, low: int, high: int) -> None:
    prompts = workload_prompts(workload(f"requests: 300; prompts: 300; prompt_tokens: {said}"))
    counts = [prompt.tokens.count(16) for prompt in prompts.values() if prompt.tokens is not None]
    assert len(counts) == 300
    assert low <= min(counts) <= max(counts) <= high
    if low < high:
        assert len(set(counts)) > 5


def test_lengths_have_the_shape_that_they_say() -> None:
    scenario = workload("requests: 1; prompt_tokens: {lognormal: {median: 1000, sigma: 1.0}}")
    assert scenario.workload is not None
    drawn = sorted(
        itertools.islice(prompt_lengths(scenario.workload.prompt_tokens, 16, stream(scenario, 1, "x")), 4001)
    )
    assert 900 < drawn[2000] < 1100
    zipf = loads(BASE + "  requests: 1\n  prompt_tokens: {zipf: {exponent: 2, min: 16, max: 1600}}\n").workload
    assert zipf is not None
    drawn = list(itertools.islice(prompt_lengths(zipf.prompt_tokens, 16, stream(scenario, 1, "y")), 4000))
    assert 0.5 < drawn.count(16) / 4000 < 0.7  # 1 / zeta(2) = 0.61
    assert next(prompt_lengths(Lengths(), 16, stream(scenario, 1, "z"))) == 16


def test_shared_prefixes() -> None:
    scenario = workload(
        "requests: 40; prompts: 40; prompt_tokens: {uniform: {min: 8, max: 64}};"
        " shared_prefix: {groups: 3, tokens: 2 chunks}"
    )
    prompts = workload_prompts(scenario)
    groups = {other for prompt in prompts.values() for other in prompt.shares}
    assert groups == {"shared-0", "shared-1", "shared-2"}
    for name, prompt in prompts.items():
        assert prompt.tokens is not None
        if name.startswith("work-"):
            assert list(prompt.shares.values()) == [min(32, prompt.tokens.count(16))]


@pytest.mark.parametrize(
    ("arrival", "background", "window"),
    [("{closed: 1}", False, 0), ("{closed: 8}", True, 8), ("{poisson: 50}", True, 0), ("{constant: 50}", True, 0)],
)
def test_arrivals(arrival: str, background: bool, window: int) -> None:
    scenario = workload(f"moves: 2000; arrival: {arrival}")
    bodies = [step.body for step in moves(scenario)]
    assert {(body.background, body.window) for body in bodies} == {(background, window)}
    gaps = [body.after.ns(Config()) for body in bodies if body.after is not None]
    if "closed" in arrival:
        assert not gaps
    else:
        assert 0.9 < sum(gaps) / len(gaps) / 20_000_000 < 1.1
        assert (len(set(gaps)) == 1) == ("constant" in arrival)


def test_streams_are_apart() -> None:
    """Another arrival process leaves what is asked, and how long prompts are, as they were."""
    base = "requests: 100; prompts: 10; prompt_tokens: {uniform: {min: 1, max: 99}}"
    one, other = workload(base), workload(base + "; arrival: {poisson: 10}")
    assert workload_prompts(one) == workload_prompts(other)
    assert [step.kind for step in workload_steps(one)] == [step.kind for step in workload_steps(other)]


def test_the_seed_decides() -> None:
    scenario = workload("requests: 50; prompts: 10; arrival: {poisson: 9}")
    assert expand(scenario) == expand(scenario)
    assert expand(scenario) == expand(scenario, 5)
    assert expand(scenario) != expand(scenario, 6)


def test_expansion_is_a_scenario_without_a_workload() -> None:
    text = BASE.replace("workload:", "steps:\n  - store: {at: a/cpu, prompt: mine, tokens: 5}\nworkload:")
    scenario = loads(text + "  moves: 9\n")
    whole = expand(scenario)
    assert whole.workload is None
    assert whole.steps[0].store is not None and whole.steps[0].store.prompt == "mine"
    assert check(whole) is None
    assert loads(dump(whole)) == whole
    assert expand(whole) is whole
    assert not list(workload_steps(whole)) and not workload_prompts(whole)


def test_steps_are_drawn_one_at_a_time() -> None:
    """The first of ten million costs no more than the first of ten."""
    scenario = workload("moves: 10000000; prompts: 3")
    first = list(itertools.islice(workload_steps(scenario), 5))
    assert [step.kind for step in first] == ["store", "store", "store", "move", "move"]


def test_the_same_in_every_process() -> None:
    program = (
        "from kvcore.scenario.loader import loads, dump; from kvcore.scenario.generate import expand; import sys;"
        "sys.stdout.write(dump(expand(loads(sys.stdin.read()))))"
    )
    text = (
        BASE + "  requests: 60\n  zipf: 0.9\n  arrival: {poisson: 9}\n  prompt_tokens: {uniform: {min: 1, max: 99}}\n"
    )
    said = {dump(expand(loads(text)))}
    for seed in ("0", "4242"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", program], input=text, env=env, capture_output=True, text=True, check=True
        )
        said.add(done.stdout)
    assert len(said) == 1
