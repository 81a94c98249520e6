"""Moves while both engines serve, and a drain after which one serves what the other had."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from examples.router import Router
from examples.vllm.stage import CPU, Engine, Stage
from tests.vllm.prompts import letters

TOKENS = 12


@pytest.fixture(scope="module")
def two(stage: Stage) -> list[Engine]:
    return stage.engines("one", "two", dtype="float32")


def test_eight_prompts_at_once_while_others_move_both_ways(stage: Stage, two: list[Engine]) -> None:
    one, other = two
    prompts = [letters(i, 200 + 90 * i) for i in range(8)]
    right = [one.complete(prompt, TOKENS, salt=f"cold {i}").tokens for i, prompt in enumerate(prompts)]
    for i, prompt in enumerate(prompts):
        two[i % 2].complete(prompt, 1)
        stage.stored(("one", "two")[i % 2], prompt)
    going = threading.Event()
    states: list[str] = []

    def move_about(src: str, dst: str) -> None:
        while not going.is_set():
            for prompt in prompts:
                states.append(stage.move(src, dst, prompt)["end"]["state"])

    movers = [threading.Thread(target=move_about, args=pair) for pair in (("one", "two"), ("two", "one"))]
    for mover in movers:
        mover.start()
    try:
        for _ in range(3):
            for engine in two:
                engine.forget()
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda i: two[i % 2].complete(prompts[i], TOKENS), range(8)))
                swapped = list(pool.map(lambda i: two[(i + 1) % 2].complete(prompts[i], TOKENS), range(8)))
            assert [answer.tokens for answer in answers] == right
            assert [answer.tokens for answer in swapped] == right
    finally:
        going.set()
        for mover in movers:
            mover.join()
    assert "done" in states
    assert one.metrics()["vllm:num_requests_running"] == 0
    stage.until(lambda: one.metrics()["vllm:kv_cache_usage_perc"] == 0, "no block is kept for ever")


def test_a_salt_is_another_cache(stage: Stage, two: list[Engine]) -> None:
    prompt = letters(77, 300)
    two[0].complete(prompt, 1, salt="hers")
    stage.stored("one", prompt, salt="hers")
    assert stage.held(prompt).get("one", 0) == 0
    assert stage.move("one", "two", prompt)["num_tokens"] == 0
    assert stage.move("one", "two", prompt, cache_salt="hers")["num_tokens"] == 300
    assert two[1].complete(prompt, 1).cached == 0
    assert two[1].complete(prompt, 1, salt="hers").cached == 299


def test_a_router_sends_a_prompt_where_it_is_or_moves_it_ahead(stage: Stage, two: list[Engine]) -> None:
    router = Router(f"http://localhost:{stage.http}", {engine.name: engine.url for engine in two})
    prompt = letters(78, 900)
    first = router.choose(prompt)
    assert first.held == 0
    with router.serving(first.engine):
        two[first.engine == "two"].complete(prompt, 1)
        stage.stored(first.engine, prompt)
        router.pays = lambda src, dst, tokens: True  # type: ignore[method-assign]  # what it costs is another test's
        second = router.choose(prompt)
    assert (second.engine != first.engine, second.held, second.moved) == (True, 900, 900)
    assert router.choose(prompt).moved == 0


def test_a_whole_cache_is_drained_and_its_engine_stopped(stage: Stage, two: list[Engine]) -> None:
    one, other = two
    stage.api.post("/clear", json={"instance_id": "two", "location": CPU}).raise_for_status()
    prompts = [letters(200 + i, count) for i, count in enumerate((12, 256, 300, 700, 1100, 2100))]
    right = [other.complete(prompt, TOKENS, salt="cold").tokens for prompt in prompts]
    for prompt in prompts:
        one.complete(prompt, 1)
        stage.stored("one", prompt)
    event = stage.api.post("/drain", json={"instance_id": "one", "to": ["two"]}).raise_for_status().json()["event_id"]
    end = stage.api.get(f"/events/{event}/wait", params={"timeout": 60}).json()
    assert end["state"] == "done", end
    one.stop()
    other.forget()
    for prompt, expected in zip(prompts, right):
        answer = other.complete(prompt, TOKENS)
        assert (answer.cached, answer.tokens) == (len(prompt) - 1, expected)
        other.forget()
