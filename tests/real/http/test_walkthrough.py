"""The reference's own walkthrough of ``move``, with our binaries: its two files, its flags, its curl lines.

Only the port numbers are others, so that tests can run beside each other.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("zmq")

import httpx

from kvreal.ports import free_ports
from kvreal.transfer import available
from tests.real.http.processes import Command, commands, until

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(240),
    pytest.mark.skipif("nixl" not in available(), reason="the walkthrough's files name nixl, which is not installed"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]

INSTANCE_1 = """\
# instance1.yaml
chunk_size: 256
local_cpu: True
max_local_cpu_size: 5

# cache controller configurations
enable_controller: True
lmcache_instance_id: "lmcache_instance_1"
controller_pull_url: "localhost:8300"
controller_reply_url: "localhost:8400"
lmcache_worker_ports: 8500

# P2P configurations
enable_p2p: True
p2p_host: "localhost"
p2p_init_ports: 8200
p2p_lookup_ports: 8201
transfer_channel: "nixl"
"""
INSTANCE_2 = """\
# instance2.yaml
chunk_size: 256
local_cpu: True
max_local_cpu_size: 5

# cache controller configurations
enable_controller: True
lmcache_instance_id: "lmcache_instance_1"
controller_pull_url: "localhost:8300"
controller_reply_url: "localhost:8400"
lmcache_worker_ports: 8501

# P2P configurations
enable_p2p: True
p2p_host: "localhost"
p2p_init_ports: 8202
p2p_lookup_ports: 8203
transfer_channel: "nixl"
"""
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
PROMPT = "Explain the significance of KV cache in language models."
COMPLETION = """\
curl -X POST http://localhost:8000/v1/completions \\
  -H "Content-Type: application/json" \\
  -d '{
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "prompt": "Explain the significance of KV cache in language models.",
        "max_tokens": 10
      }'
"""
TOKENIZE = """\
curl -X POST http://localhost:8000/tokenize \\
  -H "Content-Type: application/json" \\
  -d '{
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "prompt": "Explain the significance of KV cache in language models."
      }'
"""
LITERAL = [128000, 849, 21435, 279, 26431, 315, 85748, 6636, 304, 4221, 4211, 13]
MOVE = """\
curl -X POST http://localhost:9000/move \\
  -H "Content-Type: application/json" \\
  -d '{
        "old_position": ["lmcache_instance_1", "LocalCPUBackend"],
        "new_position": ["lmcache_instance_2", "LocalCPUBackend"],
        "tokens": [128000, 849, 21435, 279, 26431, 315, 85748, 6636, 304, 4221, 4211, 13]
      }'
"""
KEPT = [21, 22, 23]
PORTS = (8000, 8001, 8200, 8201, 8202, 8203, 8300, 8400, 8500, 8501, 9000)


class Walk:
    """The first engine, then the controller, then the second file verbatim, then with ``lmcache_instance_2`` in it."""

    def __init__(self, folder: Path, start: Callable[..., Command]) -> None:
        self.folder = folder
        self.start = start
        self.started = 0
        self.port = dict(zip(PORTS, free_ports(len(PORTS))))
        (folder / "instance1.yaml").write_text(self.here(INSTANCE_1))
        (folder / "verbatim.yaml").write_text(self.here(INSTANCE_2))
        second = INSTANCE_2.replace('"lmcache_instance_1"', '"lmcache_instance_2"')
        (folder / "instance2.yaml").write_text(self.here(second))
        self.first = self.instance("instance1.yaml", 8000)
        monitor = self.here('{"pull": 8300, "reply": 8400}')
        argv = ["controller", "--host", "localhost", "--port", str(self.port[9000]), "--monitor-ports", monitor]
        self.controller = start("controller", argv, {"PYTHONHASHSEED": "123"})
        self.first.until_says("registered at")
        self.complete(8000, KEPT)
        self.before = self.instances()
        self.refused = self.instance("verbatim.yaml", 8001)
        self.refused_status = self.refused.until_ends()
        self.after = self.instances()
        self.second = self.instance("instance2.yaml", 8001)
        self.second.until_says("registered at")

    def instances(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{self.url(9000)}/instances").json()["instances"]
        return found

    def here(self, text: str) -> str:
        return re.sub(r"\b[89]\d{3}\b", lambda found: str(self.port.get(int(found[0]), found[0])), text)

    def instance(self, file: str, port: int) -> Command:
        env = {"PYTHONHASHSEED": "123", "UCX_TLS": "rc", "CUDA_VISIBLE_DEVICES": "0", "LMCACHE_CONFIG_FILE": file}
        argv = ["instance", "--engine", "synthetic", "--port", str(self.port[port])]
        self.started += 1
        return self.start(f"{file}-{self.started}", argv, env)

    def curl(self, text: str) -> Any:
        quiet = self.here(text).replace("curl ", "curl -sS ")
        done = subprocess.run(["bash", "-c", quiet], capture_output=True, check=True)
        return json.loads(done.stdout)

    def url(self, port: int) -> str:
        return f"http://localhost:{self.port[port]}"

    def complete(self, port: int, prompt: object) -> int:
        """Tokens that this instance had of it."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 10}
        answer = httpx.post(f"{self.url(port)}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached

    def ended(self, event_id: str) -> dict[str, Any]:
        answer = httpx.get(f"{self.url(9000)}/events/{event_id}/wait", params={"timeout": 60}, timeout=90)
        event: dict[str, Any] = answer.json()
        return event

    def move(self, tokens: list[int]) -> dict[str, Any]:
        """As the walkthrough's line has it, of these tokens."""
        found: dict[str, Any] = self.curl(MOVE.replace(str(LITERAL), str(tokens)))
        return found


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    folder = tmp_path_factory.mktemp("walkthrough")
    with commands(folder) as start:
        yield Walk(folder, start)


def test_the_curl_lines_as_written(walk: Walk) -> None:
    """The prompt as text: its ids come from /tokenize, as the walkthrough says."""
    answer = walk.curl(COMPLETION)
    assert answer["model"] == MODEL and answer["usage"]["completion_tokens"] == 10 and answer["choices"][0]["text"]
    ids = walk.curl(TOKENIZE)["tokens"]
    assert len(ids) == answer["usage"]["prompt_tokens"]
    moved = walk.move(ids)
    assert list(moved) == ["num_tokens", "event_id"] and moved["num_tokens"] == len(ids)
    event = walk.ended(moved["event_id"])
    assert event["state"] == "done" and event["num_tokens"] == len(ids)
    # the bytes are at the second engine, which checks each of them, and have left the first one
    assert walk.complete(8001, PROMPT) == len(ids)
    lookup = httpx.post(f"{walk.url(9000)}/lookup", json={"tokens": ids}).json()
    assert lookup["layout_info"] == {"lmcache_instance_2": ["LocalCPUBackend", len(ids)]}


def test_prior_art_24_and_25_the_literal_ids_move_twelve_tokens_and_no_more_bytes(walk: Walk) -> None:
    assert walk.complete(8000, LITERAL) == 0
    moved = walk.curl(MOVE)
    assert moved["num_tokens"] == 12
    event = walk.ended(moved["event_id"])
    assert event["state"] == "done" and event["bytes"] == 12 * 131072
    assert walk.complete(8001, LITERAL) == 12


def test_absent_hardware_is_one_warning_and_the_event_names_what_carried(walk: Walk) -> None:
    assert walk.complete(8000, [*LITERAL, 7]) in (0, 12)
    event = walk.ended(walk.move([*LITERAL, 7])["event_id"])
    assert event["state"] == "done" and event["transport"].startswith("nixl/ucx/")
    if "rc" not in event["transport"]:
        for one in (walk.first, walk.second):
            assert one.text().count("UCX_TLS=rc") == 1, one.text()
    assert walk.first.text().count("p2p_lookup_ports") == 1


def test_nothing_held_is_said(walk: Walk) -> None:
    moved = walk.move([5, 6, 7])
    assert moved["num_tokens"] == 0
    event = walk.ended(moved["event_id"])
    assert (event["state"], event["reason"]) == ("failed", "nothing_held")


def test_prior_art_27_the_second_file_verbatim_is_refused_by_name_and_disturbs_nobody(walk: Walk) -> None:
    assert walk.refused_status == 2
    line = walk.refused.text().strip().splitlines()[-1]
    assert "lmcache_instance_1" in line and f"127.0.0.1:{walk.port[8500]}" in line
    assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", line)
    assert "Traceback" not in walk.refused.text()
    assert [one["instance_id"] for one in walk.after] == ["lmcache_instance_1"]
    assert walk.after[0]["ranks"][0]["epoch"] == walk.before[0]["ranks"][0]["epoch"]
    assert httpx.get(f"{walk.url(8000)}/health").status_code == 200
    assert walk.complete(8000, KEPT) == 3


def test_prior_art_19_the_controller_dies_and_the_instances_come_back_by_themselves(walk: Walk) -> None:
    prompt = [31, 32, 33, 34]
    walk.complete(8000, prompt)
    walk.controller.process.kill()
    walk.controller.until_ends()
    assert walk.complete(8000, prompt) == 4  # an engine needs no controller
    monitor = walk.here('{"pull": 8300, "reply": 8400}')
    argv = ["controller", "--host", "localhost", "--port", str(walk.port[9000]), "--monitor-ports", monitor]
    walk.controller = walk.start("controller-again", argv)
    walk.controller.until_says("controller: http://")

    def there() -> bool:
        found = httpx.post(f"{walk.url(9000)}/lookup", json={"tokens": prompt}).json()
        return found.get("layout_info") == {"lmcache_instance_1": ["LocalCPUBackend", 4]}

    until(there, lambda: "the view did not converge: " + walk.controller.text())

    def both() -> bool:
        return len(walk.instances()) == 2

    until(both, lambda: "the second instance did not come back: " + walk.second.text())
    moved = walk.move(prompt)
    assert moved["num_tokens"] == 4 and walk.ended(moved["event_id"])["state"] == "done"


def test_an_engine_that_is_killed_comes_back_as_a_new_life(walk: Walk) -> None:
    prompt = [41, 42, 43]
    walk.complete(8000, prompt)
    old = walk.instances()[0]["ranks"][0]["epoch"]
    walk.first.process.kill()
    walk.first.until_ends()
    walk.first = walk.instance("instance1.yaml", 8000)
    walk.first.until_says("registered at")

    def new_life() -> bool:
        ranks = [one["ranks"][0] for one in walk.instances() if one["instance_id"] == "lmcache_instance_1"]
        return bool(ranks) and ranks[0]["epoch"] != old

    until(new_life, lambda: "the controller does not believe the new one: " + walk.first.text())
    assert walk.move(prompt)["num_tokens"] == 0  # nothing of the old life is believed
    assert walk.complete(8000, prompt) == 0
    assert walk.move(prompt)["num_tokens"] == 3


def test_told_to_stop_each_ends_with_status_0(walk: Walk) -> None:
    assert walk.first.stop(signal.SIGINT) == 0
    assert walk.second.stop(signal.SIGTERM) == 0
    assert walk.controller.stop(signal.SIGINT) == 0
    for one in (walk.first, walk.second, walk.controller):
        assert "Traceback" not in one.text(), one.text()
