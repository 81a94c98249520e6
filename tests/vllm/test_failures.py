"""Whatever fails in the connector: the engine lives, and what it says is right or an error, never wrong."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from examples.vllm.stage import Engine, Stage
from tests.vllm.conftest import ROOT
from tests.vllm.faulty import GUARDED
from tests.vllm.prompts import letters

TOKENS = 12
MODULE = ("FaultyConnector", "tests.vllm.faulty")


class Faults:
    def __init__(self, path: Path) -> None:
        self.path: Path = path

    def __call__(self, **what: object) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(what))
        new.rename(self.path)


@pytest.fixture
def faults(folder: Path) -> Iterator[Faults]:
    found = Faults(folder / "faults.json")
    found()
    yield found
    found()


@pytest.fixture(scope="module", params=["async", "sync"])
def two(stage: Stage, folder: Path, request: pytest.FixtureRequest) -> Iterator[list[Engine]]:
    """``one`` recomputes what failed to load, ``two`` fails the request."""
    environ = {"PYTHONPATH": str(ROOT), "KVMOVE_TEST_FAULTS": str(folder / "faults.json")}
    made = []
    for i, (name, policy) in enumerate((("one", "recompute"), ("two", "fail"))):
        extra = {"load": request.param, "lease_s": 2.0}
        made.append(
            stage.engine(name, core=str(i), dtype="float32", policy=policy, connector=MODULE, extra=extra,
                         environ=environ)  # fmt: skip
        )
    try:
        for engine in made:
            engine.ready(f"{engine.url}/health")
            stage.registered(engine.name)
        yield made
    finally:
        for engine in made:
            engine.stop()
    for engine in made:
        stage.until(lambda name=engine.name: stage.instance(name) is None, f"{engine.name} is gone")


def prepared(stage: Stage, engine: Engine, seed: int, count: int = 700) -> tuple[list[int], list[int]]:
    """(a prompt that the engine's rank holds and vLLM has forgotten, what comes after it)."""
    prompt = letters(seed, count)
    right = engine.complete(prompt, TOKENS).tokens
    stage.stored(engine.name, prompt)
    engine.forget()
    return prompt, right


def counted(engine: Engine, name: str) -> float:
    return sum(value for key, value in engine.metrics().items() if key.startswith(f"kvmove_engine_{name}_total"))


@pytest.mark.parametrize("blocks", [0, 3])
def test_a_failed_load_is_computed_anew(stage: Stage, two: list[Engine], faults: Faults, blocks: int) -> None:
    one = two[0]
    prompt, right = prepared(stage, one, 10 + blocks)
    before = counted(one, "load_failures"), counted(one, "failed_load_tokens"), counted(one, "loaded_tokens")
    faults(load=blocks)
    assert one.complete(prompt, TOKENS).tokens == right
    faults()
    assert counted(one, "load_failures") == before[0] + 1  # offered once: no round and round
    assert counted(one, "failed_load_tokens") == before[1] + 699 - 128 * blocks
    assert counted(one, "loaded_tokens") == before[2]
    one.forget()
    again = one.complete(prompt, TOKENS)
    assert (again.tokens, again.cached) == (right, 699)


def test_a_hold_that_ended_before_its_load(stage: Stage, two: list[Engine], faults: Faults) -> None:
    one = two[0]
    prompt, right = prepared(stage, one, 20)
    faults(slow=3.0)  # the lease is 2 s
    assert one.complete(prompt, TOKENS).tokens == right
    assert counted(one, "load_failures") >= 1
    assert one.metrics()['kvmove_engine_load_failures_total{reason="lease_ended"}'] >= 1


def test_under_policy_fail_the_request_fails_and_no_other(stage: Stage, two: list[Engine], faults: Faults) -> None:
    other = two[1]
    prompt, right = prepared(stage, other, 30)
    faults(load=0)
    body = {"model": "m", "prompt": prompt, "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{other.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 500
    faults()
    other.forget()
    again = other.complete(prompt, TOKENS)
    assert (again.tokens, again.cached) == (right, 699)


def test_a_failed_store_is_a_miss_later(stage: Stage, two: list[Engine], faults: Faults) -> None:
    one = two[0]
    prompt = letters(40, 600)
    faults(store=True)
    right = one.complete(prompt, TOKENS).tokens
    faults()
    stage.until(lambda: counted(one, "store_short") >= 1, "the store has failed")
    assert stage.held(prompt).get("one", 0) == 0
    one.forget()
    answer = one.complete(prompt, TOKENS)
    assert (answer.tokens, answer.cached) == (right, 0)
    stage.stored("one", prompt)


def test_a_client_that_hangs_up_while_its_prompt_is_loaded(stage: Stage, two: list[Engine], faults: Faults) -> None:
    one = two[0]
    prompt, right = prepared(stage, one, 45)
    faults(slow=1.0)
    body = {"model": "m", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{one.url}/v1/completions", json=body, timeout=httpx.Timeout(10.0, read=0.4))
    faults()
    other = letters(46, 400)
    assert one.complete(other, TOKENS).tokens == one.complete(other, TOKENS, salt="cold 46").tokens
    stage.until(lambda: one.metrics()["vllm:kv_cache_usage_perc"] == 0, "no block is kept for ever")
    one.forget()
    again = one.complete(prompt, TOKENS)
    assert (again.tokens, again.cached) == (right, 699)


def test_no_exception_reaches_vllm(stage: Stage, two: list[Engine], faults: Faults) -> None:
    for number, name in enumerate(GUARDED):
        one = two[0]
        prompt, right = prepared(stage, one, 50 + number, 400)
        faults(**{"raise": name, "number": number})
        assert one.complete(prompt, TOKENS).tokens == right, name
        assert one.complete(letters(150 + number, 300), 2).tokens, name
        faults()
        one.forget()
        assert one.complete(prompt, TOKENS).tokens == right, name
    assert httpx.get(f"{two[0].url}/health").status_code == 200
    stage.until(lambda: two[0].metrics()["vllm:kv_cache_usage_perc"] == 0, "no block is kept for ever")


def test_without_its_rank_an_engine_serves_on_and_gets_a_new_one(
    stage: Stage, two: list[Engine], faults: Faults
) -> None:
    other = two[1]
    prompt, right = prepared(stage, other, 60)
    ranks = other.pids("engines.vllm.rank")
    os.kill(ranks[0], signal.SIGKILL)
    assert other.complete(prompt, TOKENS).tokens == right
    stage.until(lambda: other.pids("engines.vllm.rank") not in ([], ranks), "there is another rank")
    other.forget()
    assert other.complete(prompt, TOKENS).tokens == right

    def from_the_new_rank() -> bool:
        other.forget()
        answer = other.complete(prompt, TOKENS)
        assert answer.tokens == right
        return answer.cached == 699

    stage.until(from_the_new_rank, "the new rank is stored to and loaded from")
