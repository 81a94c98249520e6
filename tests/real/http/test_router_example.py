"""The example router before a controller and two instances: it follows a prompt's KV, or takes it along."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the services are not installed: no fastapi")
pytest.importorskip("zmq", reason="the real world is not installed: no pyzmq")

import httpx
import uvicorn

from examples.router import Router
from examples.router_http import make_app
from kvreal.ports import free_ports
from tests.real.http.processes import ROOT, Command, commands, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

INSTANCE = """\
chunk_size: 256
enable_controller: true
lmcache_instance_id: {name}
controller_pull_url: localhost:{pull}
kvmove: {{model: demo, bytes_per_token: 1 KiB, locations: {{LocalCPUBackend: 16 MiB}}, transport: tcp}}
"""


class Town:
    """Two instances, a controller, and the router in front of them, in a thread of this process."""

    def __init__(self, folder: Path, start: Any) -> None:
        self.start = start
        self.folder = folder
        http, self.pull, reply, one, two, front = free_ports(6)
        monitor = f'{{"pull": {self.pull}, "reply": {reply}}}'
        argv = ["controller", "--host", "localhost", "--port", str(http), "--monitor-ports", monitor]
        self.controller: Command = start("controller", argv)
        self.engines = {"one": f"http://localhost:{one}", "two": f"http://localhost:{two}"}
        self.commands = {name: self.instance(name) for name in self.engines}
        for command in self.commands.values():
            command.until_says("registered at")
        self.api = httpx.Client(base_url=f"http://localhost:{http}", timeout=30)
        self.router = Router(f"http://localhost:{http}", self.engines)
        self.server = uvicorn.Server(uvicorn.Config(make_app(self.router), port=front, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{front}", timeout=60)
        until(lambda: self.server.started, lambda: "the router has not started")

    def instance(self, name: str) -> Command:
        (self.folder / f"{name}.yaml").write_text(INSTANCE.format(name=name, pull=self.pull))
        port = self.engines[name].rpartition(":")[2]
        return self.start(name, ["instance", "--config", f"{name}.yaml", "--host", "localhost", "--port", port])

    def complete(self, prompt: Any, **more: Any) -> httpx.Response:
        body = {"model": "demo", "prompt": prompt, "max_tokens": 4, **more}
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer

    def knows(self, tokens: list[int], **held: int) -> None:
        """The controller says that these instances hold so much of it, and no other any."""

        def found() -> dict[str, int]:
            answer = self.api.post("/lookup", json={"tokens": tokens}).json()
            return {name: max(places.values()) for name, places in answer["locations"].items()}

        until(lambda: found() == held, lambda: f"{found()}, expected {held}")

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.http.close()
        self.api.close()


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    folder = tmp_path_factory.mktemp("router")
    with commands(folder) as start:
        found = Town(folder, start)
        try:
            yield found
        finally:
            found.close()


def prompt(seed: int, count: int) -> list[int]:
    return [(seed * 7919 + at * 31) % 50_000 + 1 for at in range(count)]


def test_a_prompt_goes_where_its_kv_is(town: Town) -> None:
    tokens = prompt(1, 1000)
    httpx.post(f"{town.engines['two']}/v1/completions", json={"prompt": tokens, "max_tokens": 1}).raise_for_status()
    town.knows(tokens, two=1000)
    answer = town.complete(tokens)
    assert [answer.headers[f"x-kvmove-{word}"] for word in ("engine", "held", "moved")] == ["two", "1000", "0"]
    longer = town.complete([*tokens, *prompt(2, 600)])
    assert longer.headers["x-kvmove-engine"] == "two" and longer.headers["x-kvmove-held"] == "768"


def test_its_kv_is_moved_ahead_to_one_that_is_free(town: Town) -> None:
    tokens = prompt(3, 2000)
    httpx.post(f"{town.engines['two']}/v1/completions", json={"prompt": tokens, "max_tokens": 1}).raise_for_status()
    town.knows(tokens, two=2000)
    with town.router.serving("two"):
        answer = town.complete(tokens)
    assert [answer.headers[f"x-kvmove-{word}"] for word in ("engine", "held", "moved")] == ["one", "2000", "2000"]
    used = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert used >= 1999  # the engine itself says that it computed none of it anew
    town.knows(tokens, one=2000, two=2000)


def test_too_little_to_move_is_computed_again(town: Town) -> None:
    tokens = prompt(4, 100)
    httpx.post(f"{town.engines['two']}/v1/completions", json={"prompt": tokens, "max_tokens": 1}).raise_for_status()
    town.knows(tokens, two=100)
    with town.router.serving("two"):
        answer = town.complete(tokens)
    assert [answer.headers[f"x-kvmove-{word}"] for word in ("engine", "held", "moved")] == ["one", "0", "0"]


def test_text_is_tokenized_as_the_engine_does_it_and_a_stream_is_passed_on(town: Town) -> None:
    text = "Explain the significance of KV cache in language models. " * 20
    first = town.complete(text)
    ids = httpx.post(f"{town.engines['one']}/tokenize", json={"prompt": text}).json()["tokens"]
    town.knows(ids, **{first.headers["x-kvmove-engine"]: len(ids)})
    again = town.complete(text, stream=True)
    assert again.headers["x-kvmove-engine"] == first.headers["x-kvmove-engine"]
    assert again.headers["content-type"].startswith("text/event-stream")
    assert again.text.rstrip().endswith("data: [DONE]")
    assert town.router.running == {"one": 0, "two": 0}


def test_an_engines_refusal_is_passed_on(town: Town) -> None:
    answer = town.http.post("/v1/completions", json={"model": "another", "prompt": [1, 2], "max_tokens": 1})
    assert answer.status_code == 404 and "does not exist" in answer.text
    for body in (b"{", b"[1]"):
        answer = town.http.post("/v1/completions", content=body)
        assert answer.status_code == 400 and "the body is" in answer.text


def test_without_an_engine_and_without_the_controller(town: Town) -> None:
    """Last, for it ends them: what is left serves on, and where nothing is left that is said."""
    town.commands["two"].stop()
    assert town.complete(prompt(3, 2000)).headers["x-kvmove-engine"] == "one"
    town.controller.stop()
    assert town.complete(prompt(5, 40)).headers["x-kvmove-engine"] == "one"
    town.commands["one"].stop()
    answer = town.http.post("/v1/completions", json={"model": "demo", "prompt": [1, 2], "max_tokens": 1})
    assert answer.status_code == 503 and "none of the engines one, two can be reached" in answer.text
    assert town.http.get("/health").status_code == 503 and town.router.running == {"one": 0, "two": 0}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--engine", "one"], "--engine one: expected NAME=URL"),
        (["--engine", "one=http://a", "--engine", "one=http://b"], "one is named twice"),
        (["--engine", "one=http://a", "--busy", "0"], "--busy and --worth: expected at least 1"),
        ([], "required: --engine"),
    ],
)
def test_bad_arguments(argv: list[str], words: str) -> None:
    command = [sys.executable, "-m", "examples.router_http", "--controller", "http://localhost:1", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
