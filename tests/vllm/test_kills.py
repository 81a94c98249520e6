"""SIGKILL to each process of an engine, and to the controller, in the middle of a move."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.vllm.stage import CPU, Engine, Process, Stage, tree
from tests.vllm.prompts import letters

TOKENS = 12
WHO = {"server": "vllm serve", "scheduler": "VLLM::EngineCore", "worker": "VLLM::Worker", "rank": "vllm.rank"}


def pid_of(process: Process, who: str) -> int:
    return process.pids(WHO[who])[0]


def living(pids: list[int]) -> list[int]:
    """Those that are there, zombies aside."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


@pytest.fixture(scope="module")
def survivor(stage: Stage) -> Engine:
    (engine,) = stage.engines("two", dtype="float32")
    return engine


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def asked(stage: Stage, src: str, dst: str, prompt: list[int], found: dict[str, Any]) -> threading.Thread:
    """A move in a thread; what came of it is in ``found``."""

    def ask() -> None:
        body = {"old_position": [src, CPU], "new_position": [dst, CPU], "tokens": prompt}
        try:
            found["status"] = httpx.post(f"http://localhost:{stage.http}/move", json=body, timeout=60).status_code
        except httpx.HTTPError as error:
            found["error"] = str(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def every_slot_can_be_used(stage: Stage, engine: Engine) -> None:
    """Nothing holds a slot that is not a visible chunk's: prompts fill the place to the last one."""
    stage.api.post("/clear", json={"instance_id": engine.name, "location": CPU}).raise_for_status()

    def place() -> dict[str, Any]:
        found = stage.instance(engine.name)
        assert found is not None
        place: dict[str, Any] = found["ranks"][0]["locations"][0]
        return place

    for seed in range(10_000):
        if place()["chunks"] >= place()["slots"]:
            return
        engine.complete(letters(10_000 + seed, 8000), 1)
    raise AssertionError(f"{place()['chunks']} of {place()['slots']} slots are used, and no more can be")


@pytest.mark.parametrize("who", ["server", "scheduler", "worker", "rank"])
def test_an_engine_dies_in_the_middle_of_a_move(stage: Stage, survivor: Engine, who: str) -> None:
    (one,) = stage.engines("one", dtype="float32")
    prompt, other = letters(20 + list(WHO).index(who), 700), letters(2, 600)  # nobody has seen the first one yet
    right = survivor.complete(prompt, TOKENS, salt="cold").tokens
    also = survivor.complete(other, TOKENS).tokens
    stage.stored("two", other)
    one.complete(prompt, 1)
    stage.stored("one", prompt)
    found: dict[str, Any] = {}
    everyone = [pid for pids in tree(one.process.pid).values() for pid in pids]
    with stopped(pid_of(one, "rank")):  # it does not answer its pin: the move waits
        moving = asked(stage, "one", "two", prompt, found)
        stage.until(lambda: in_flight(stage) == 1, "the move has begun")
        os.kill(pid_of(one, who), signal.SIGKILL)
    rank_too = [pid for pid in everyone if who != "rank"]
    stage.until(lambda: not living(rank_too), f"all of the engine has gone with its {who}", 30.0)
    moving.join()
    one.stop()
    stage.until(lambda: stage.instance("one") is None, "the controller knows that it has gone")
    stage.until(lambda: in_flight(stage) == 0, "the move has ended")
    newest = max(stage.api.get("/events").json()["events"], key=lambda event: number(event["event_id"]))
    assert stage.held(prompt) == ({"two": 700} if newest["state"] == "done" else {})
    assert survivor.complete(other, TOKENS).tokens == also
    assert survivor.complete(prompt, TOKENS).tokens == right


@pytest.mark.parametrize("who", ["server", "rank"])
def test_the_engine_that_is_moved_to_dies(stage: Stage, survivor: Engine, who: str) -> None:
    (one,) = stage.engines("one", dtype="float32")
    prompt = letters(30 + list(WHO).index(who), 700)
    right = survivor.complete(prompt, TOKENS).tokens
    stage.stored("two", prompt)
    found: dict[str, Any] = {}
    everyone = [pid for pids in tree(one.process.pid).values() for pid in pids]
    with stopped(pid_of(one, "rank")):  # it answers nothing: the move waits for its room
        moving = asked(stage, "two", "one", prompt, found)
        stage.until(lambda: in_flight(stage) == 1, "the move has begun")
        os.kill(pid_of(one, who), signal.SIGKILL)
        if who == "server":  # before its rank goes on: else the move may end well, and the KV go with the engine
            stage.until(lambda: not living(everyone), "all of the engine has gone with its server", 30.0)
    moving.join()
    one.stop()
    stage.until(lambda: in_flight(stage) == 0, "the move has ended", 60.0)
    stage.until(lambda: stage.instance("one") is None, "the controller knows that it has gone")
    assert stage.held(prompt) == {"two": 700}  # it has left its source for nowhere: it is there still
    survivor.forget()
    answer = survivor.complete(prompt, TOKENS)
    assert (answer.cached, answer.tokens) == (699, right)


def number(event_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in event_id.split("-"))


def in_flight(stage: Stage) -> int:
    events = stage.api.get("/events").json()["events"]
    return sum(event["state"] not in ("done", "failed") for event in events)


def test_the_controller_dies_in_the_middle_of_a_move(stage: Stage, survivor: Engine) -> None:
    (one,) = stage.engines("one", dtype="float32")
    prompts = [letters(10 + i, 500 + i) for i in range(3)]
    right = [survivor.complete(prompt, TOKENS, salt="cold").tokens for prompt in prompts]
    for prompt in prompts:
        one.complete(prompt, 1)
        stage.stored("one", prompt)
    found: dict[str, Any] = {}
    controller = stage.processes["controller"]
    with stopped(pid_of(survivor, "rank")):  # the destination does not answer
        moving = asked(stage, "one", "two", prompts[0], found)
        stage.until(lambda: in_flight(stage) == 1, "the move has begun")
        os.kill(controller.process.pid, signal.SIGKILL)
        moving.join()
    controller.stop()
    assert "error" in found  # nobody answered
    assert one.complete(prompts[1], TOKENS).tokens == right[1]  # no controller is needed to serve
    stage.controller()
    for name in ("one", "two"):
        stage.registered(name)
    stage.until(lambda: in_flight(stage) == 0, "the move of before has ended", 60.0)
    stage.until(lambda: max(stage.held(prompts[0]).values(), default=0) == 500, "nothing is lost")
    assert stage.move("one", "two", prompts[2])["end"]["state"] == "done"
    for prompt, expected in zip(prompts, right):
        for engine in (one, survivor):
            engine.forget()
            assert engine.complete(prompt, TOKENS).tokens == expected
    for engine in (one, survivor):
        every_slot_can_be_used(stage, engine)
