"""An instance as processes: two ranks, one of them killed; a taken port; a whole topology by ``kvmove up``."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("zmq")

import httpx

import kvmove
from kvmove.client import Refused
from kvreal.ports import free_ports
from tests.conftest import children
from tests.real.http.processes import Command, commands, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

TWO_RANKS = """\
chunk_size: 16
enable_controller: true
lmcache_instance_id: tp2
controller_pull_url: localhost:{pull}
kvmove: {{bytes_per_token: 4 KiB, ranks: 2, locations: {{LocalCPUBackend: 1 MiB}}, transport: tcp}}
"""
TOPOLOGY = """\
name: two of two ranks
kv: {bytes_per_token: 4 KiB, chunk: 16 tokens}
constants: {beat: 200 ms, dead: 1 s}
instances:
  a: {ranks: 2, locations: {LocalCPUBackend: 1 MiB, LocalDiskBackend: 1 MiB}}
  b: {ranks: 2, locations: {LocalCPUBackend: 1 MiB, LocalDiskBackend: 1 MiB}}
"""


def complete(port: int, prompt: object) -> int:
    answer = httpx.post(f"http://localhost:{port}/v1/completions", json={"prompt": prompt}, timeout=60)
    assert answer.status_code == 200, answer.text
    cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


def ranks_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_two_ranks_store_and_use_and_end_together(tmp_path: Path) -> None:
    port, pull = free_ports(2)
    (tmp_path / "i.yaml").write_text(TWO_RANKS.format(pull=pull))
    with commands(tmp_path) as start:
        one = start("one", ["instance", "--config", "i.yaml", "--port", str(port)])
        one.until_says("2 ranks")  # there is no controller: an engine needs none
        prompt = list(range(40))
        assert complete(port, prompt) == 0 and complete(port, prompt) == 40
        metrics = httpx.get(f"http://localhost:{port}/metrics").text
        assert 'kvmove_engine_pool_chunks{location="LocalCPUBackend"} 3.0' in metrics
        assert 'kvmove_engine_pool_slots{location="LocalCPUBackend"} 32.0' in metrics
        (rank,) = ranks_of(one.process.pid)
        os.kill(rank, signal.SIGKILL)
        assert one.until_ends() == 1
        assert "rank 1 has ended with status -9" in one.text() and "Traceback" not in one.text()
        two = start("two", ["instance", "--config", "i.yaml", "--port", str(port)])
        two.until_says("2 ranks")
        assert complete(port, prompt) == 0  # a new life holds nothing of the old one
        (rank,) = ranks_of(two.process.pid)
        two.process.kill()
        two.until_ends()
        until(lambda: gone(rank), lambda: "rank 1 outlived rank 0", 10)


def test_what_cannot_start_is_one_line(tmp_path: Path) -> None:
    port, pull = free_ports(2)
    (tmp_path / "i.yaml").write_text(TWO_RANKS.format(pull=pull))
    (tmp_path / "bad.yaml").write_text("enable_controler: true\n")
    cases = [
        (["--config", "bad.yaml"], "bad.yaml:1:1: enable_controler: unknown key 'enable_controler'"),
        (["--config", "missing.yaml"], "missing.yaml"),
        ([], "KVMOVE_CONFIG_FILE"),
        (["--config", "i.yaml", "--host", "0.0.0.0"], "--api-key-file"),
        (["--config", "i.yaml", "--engine", "other"], "expected one of synthetic"),
        (["--config", "i.yaml", "--port", str(port)], f"cannot listen at localhost:{port}"),
    ]
    with commands(tmp_path) as start:
        holder = start("holder", ["instance", "--config", "i.yaml", "--port", str(port)])
        holder.until_says("2 ranks")
        running = [(start(f"case{n}", ["instance", *argv]), says) for n, (argv, says) in enumerate(cases)]
        for one, says in running:
            assert one.until_ends() == 2, one.text()
            assert len(one.text().strip().splitlines()) == 1 and says in one.text(), one.text()
        assert holder.stop() == 0


KEYED = """\
chunk_size: 16
enable_controller: true
lmcache_instance_id: {name}
controller_pull_url: localhost:{pull}
kvmove: {{bytes_per_token: 4 KiB, locations: {{LocalCPUBackend: 1 MiB}}, transport: tcp, keys: {keys}}}
"""


def test_with_keys_everything_moves_and_who_has_none_is_not_heard(tmp_path: Path) -> None:
    port, pull, reply, a, b, c = free_ports(6)
    with commands(tmp_path) as start:
        assert start("keys", ["keys", "new", "ctl"]).until_ends() == 0
        assert start("keys2", ["keys", "add", "ctl", "worker", "--name", "w"]).until_ends() == 0
        monitor = f'{{"pull": {pull}, "reply": {reply}}}'
        argv = ["controller", "--port", str(port), "--monitor-ports", monitor, "--keys", "ctl"]
        start("controller", argv).until_says("controller: http://")
        for name, keys, at in (("a", "ctl", a), ("b", "worker", b), ("c", '""', c)):
            (tmp_path / f"{name}.yaml").write_text(KEYED.format(name=name, pull=pull, keys=keys))
            started = start(name, ["instance", "--config", f"{name}.yaml", "--port", str(at)])
            started.until_says("c: http://" if name == "c" else "registered at")
        prompt = list(range(40))
        assert complete(a, prompt) == 0 and complete(c, prompt) == 0
        place = ["LocalCPUBackend"]
        body = {"old_position": ["a", *place], "new_position": ["b", *place], "tokens": prompt}
        moved = httpx.post(f"http://localhost:{port}/move", json=body, timeout=30).json()
        assert moved["num_tokens"] == 40
        event = httpx.get(f"http://localhost:{port}/events/{moved['event_id']}/wait", timeout=60).json()
        assert event["state"] == "done", event
        assert complete(b, prompt) == 40
        known = [one["instance_id"] for one in httpx.get(f"http://localhost:{port}/instances").json()["instances"]]
        assert known == ["a", "b"]


def up(tmp_path: Path, start: object, text: str = "") -> tuple[Command, int, int]:
    (tmp_path / "t.yaml").write_text(text or TOPOLOGY)
    port, a = free_ports(2)
    argv = ["up", "t.yaml", "--port", str(port), "--instance-port", "0", "--pull-port", "0", "--reply-port", "0"]
    one: Command = start("up", [*argv, "--transport", "tcp"])  # type: ignore[operator]
    one.until_says("up: http://")
    return one, port, a


def test_up_starts_a_topology_and_ctrl_c_ends_it_cleanly(tmp_path: Path) -> None:
    with commands(tmp_path) as start:
        one, port, _ = up(tmp_path, start)
        lines = one.text().splitlines()
        assert [line.split(":")[0] for line in lines if "http://" in line] == ["controller", *sorted_names(lines), "up"]
        instances = httpx.get(f"http://localhost:{port}/instances").json()["instances"]
        assert [(found["instance_id"], len(found["ranks"])) for found in instances] == [("a", 2), ("b", 2)]
        assert [place["name"] for place in instances[0]["ranks"][0]["locations"]] == [
            "LocalCPUBackend",
            "LocalDiskBackend",
        ]
        up_lines = [line for line in lines if "ranks" in line]
        ports = {line.split(":")[0]: int(line.split("localhost:")[1].split(",")[0]) for line in up_lines}
        prompt = list(range(100))
        complete(ports["a"], prompt)
        for source, target, via in (
            ("a/LocalCPUBackend", "b/LocalCPUBackend", "tcp"),
            ("b/LocalCPUBackend", "b/LocalDiskBackend", "file"),  # within one process
        ):
            argv = ["move", source, target, "--tokens", str(prompt), "--url", f"http://localhost:{port}"]
            moved = start("move", argv)
            assert moved.until_ends() == 0, moved.text()
            assert "done: 100 tokens" in moved.text() and f"over {via}" in moved.text()
        assert complete(ports["b"], prompt) == 100
        asyncio.run(library_moves_it_on(f"http://localhost:{port}", prompt))
        assert complete(ports["a"], prompt) == 100
        processes = ranks_of(one.process.pid)
        assert len(processes) == 3
        assert one.stop(signal.SIGINT) == 0
        assert "Traceback" not in one.text() and all(gone(pid) for pid in processes)


async def library_moves_it_on(url: str, prompt: list[int]) -> None:
    """From b's disk to a's memory, and within b to its memory, by both clients."""
    disk, memory = ("b", "LocalDiskBackend"), ("b", "LocalCPUBackend")
    async with kvmove.AsyncClient(url) as both:
        event_id, num_tokens = await both.move(disk, memory, prompt, copy=True)
        assert num_tokens == 100 and (await both.wait(event_id))["state"] == "done"
        assert (await both.lookup(prompt))["locations"] == {
            "b": {"LocalDiskBackend": 100, "LocalCPUBackend": 100}
        }
        with pytest.raises(Refused, match="unknown location") as caught:
            await both.move(disk, ("a", "nowhere"), prompt)
        assert caught.value.status == 404
    with kvmove.Client(url, retry_s=5) as one:
        event_id, num_tokens = one.move(disk, ("a", "LocalCPUBackend"), prompt)
        assert num_tokens == 100 and one.wait(event_id)["state"] == "done"
        assert one.event(event_id)["ranks"][1]["deleted"] == 7
        assert [event["event_id"] for event in one.events(limit=1)] == [event_id]


def test_up_of_a_scenario_whose_sources_push(tmp_path: Path) -> None:
    with commands(tmp_path) as start:
        text = TOPOLOGY.replace("kv: {", "kv: {direction: push, ", 1)
        assert text != TOPOLOGY
        one, port, _ = up(tmp_path, start, text)
        lines = one.text().splitlines()
        serving = sorted(line for line in lines if line.startswith(("a: http://", "b: http://")))
        a, b = (int(line.split("localhost:")[1].split(",")[0]) for line in serving)
        prompt = list(range(100))
        complete(a, prompt)
        places = {"old_position": ["a", "LocalCPUBackend"], "new_position": ["b", "LocalCPUBackend"]}
        moved: dict[str, object] = {}
        until(lambda: moved.update(_post(port, places, prompt)) or moved["num_tokens"], lambda: str(moved))
        event = httpx.get(f"http://localhost:{port}/events/{moved['event_id']}/wait", timeout=60).json()
        assert (event["state"], event["num_tokens"], event["bytes"] > 0) == ("done", 100, True)
        assert complete(b, prompt) == 100
        assert one.stop(signal.SIGINT) == 0


PUSHES = """\
name: pushes
copies:
  - {transport: tcp, from: cpu, to: cpu, rates: [[1048576, 2.3e+9]]}
  - {transport: tcp, from: cpu, to: cpu, push: true, rates: [[1048576, 5.1e+9]]}
  - {transport: tcp, from: cpu, to: disk, rates: [[1048576, 2.0e+9]]}
  - {transport: tcp, from: cpu, to: disk, push: true, rates: [[1048576, 1.5e+9]]}
"""


def test_up_by_a_profile_goes_the_quicker_way_and_the_event_says_why(tmp_path: Path) -> None:
    (tmp_path / "pushes.yaml").write_text(PUSHES)
    with commands(tmp_path) as start:
        one, port, _ = up(tmp_path, start, f"{TOPOLOGY}network: {{profile: pushes.yaml}}\n")
        serving = next(line for line in one.text().splitlines() if line.startswith("a: http://"))
        prompt, other = list(range(100)), list(range(500, 600))
        for one_prompt in (other, prompt):  # what of the later one is seen, is of the earlier one too
            complete(int(serving.split("localhost:")[1].split(",")[0]), one_prompt)
        for location, why in (
            ("LocalCPUBackend", "push: 5.1 GB/s, read 2.3 by profile pushes"),
            ("LocalDiskBackend", "read: 2 GB/s, push 1.5 by profile pushes"),
        ):
            moved = _copied(port, ["b", location], prompt)
            event = httpx.get(f"http://localhost:{port}/events/{moved['event_id']}/wait", timeout=60).json()
            said = {rank["chosen"].partition("; ")[2] for rank in event["ranks"]}
            assert (event["state"], said) == ("done", {why})
            asked = {"old_position": ["a", "LocalCPUBackend"], "new_position": ["b", location], "tokens": other}
            dry = httpx.post(f"http://localhost:{port}/move", json={**asked, "copy": True, "dry_run": True}).json()
            assert (dry["num_tokens"], dry["direction"]) == (100, why.partition(":")[0])
        assert one.stop(signal.SIGINT) == 0


TWO_MODELS = """\
name: two models
kv: {bytes_per_token: 4 KiB, chunk: 16 tokens, model: target}
instances:
  a: &one
    ranks: 2
    locations:
      LocalCPUBackend: 1 MiB
      DraftCPU: {size: 64 KiB, slot: 2 KiB, namespace: {model: draft, bytes_per_token: 64, chunk_tokens: 8}}
  b:
    ranks: 2
    locations:
      LocalCPUBackend: {size: 1 MiB, slot: 128 KiB}
      DraftCPU: {size: 64 KiB, namespace: {model: draft, bytes_per_token: 64, chunk_tokens: 8}}
"""


def test_one_instance_serves_two_models_and_moves_the_kv_of_each(tmp_path: Path) -> None:
    with commands(tmp_path) as start:
        one, port, _ = up(tmp_path, start, TWO_MODELS.replace("&one", ""))
        serving = sorted(line for line in one.text().splitlines() if line.startswith(("a: http://", "b: http://")))
        a, b = (int(line.split("localhost:")[1].split(",")[0]) for line in serving)
        models = httpx.get(f"http://localhost:{a}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["target", "draft"]
        prompt = list(range(100))

        def cached(at: int, model: str) -> int:
            body = {"prompt": prompt, "model": model}
            answer = httpx.post(f"http://localhost:{at}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200 and answer.json()["model"] == model, answer.text
            found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return found

        assert (cached(a, "target"), cached(a, "draft")) == (0, 0)
        unknown = httpx.post(f"http://localhost:{a}/v1/completions", json={"prompt": prompt, "model": "x"})
        assert unknown.status_code == 404 and "serves `target`, `draft`" in unknown.text
        found = until_found(port, prompt, {"a/DraftCPU", "a/LocalCPUBackend"})
        assert set(found.values()) == {100}
        for place, size in (("LocalCPUBackend", 4096), ("DraftCPU", 128)):
            moved = _copied(port, ["b", place], prompt, ["a", place])
            event = httpx.get(f"http://localhost:{port}/events/{moved['event_id']}/wait", timeout=60).json()
            assert (event["state"], event["bytes"]) == ("done", 100 * size)
        wrong = {"old_position": ["a", "DraftCPU"], "new_position": ["b", "LocalCPUBackend"], "tokens": prompt}
        refused = httpx.post(f"http://localhost:{port}/move", json=wrong)
        assert refused.status_code == 409 and "draft" in refused.text and "target" in refused.text
        assert (cached(b, "target"), cached(b, "draft")) == (100, 100)
        ranks = httpx.get(f"http://localhost:{port}/instances").json()["instances"][1]["ranks"]
        rooms = {place["name"]: place["capacity_bytes"] for place in ranks[0]["locations"]}
        assert rooms == {"LocalCPUBackend": 512 << 10, "DraftCPU": 32 << 10}
        assert one.stop(signal.SIGINT) == 0


def until_found(port: int, prompt: list[int], places: set[str]) -> dict[str, int]:
    """What a lookup finds, once it finds all of ``places``."""
    found: dict[str, int] = {}

    def asked() -> bool:
        locations = httpx.post(f"http://localhost:{port}/lookup", json={"tokens": prompt}).json()["locations"]
        found.update({f"{name}/{place}": n for name, held in locations.items() for place, n in held.items()})
        return set(found) == places

    until(asked, lambda: str(found))
    return found


def _copied(port: int, place: list[str], prompt: list[int], source: list[str] | None = None) -> dict[str, object]:
    """Asked for until there is something to copy."""
    places = {"old_position": source or ["a", "LocalCPUBackend"], "new_position": place}
    moved: dict[str, object] = {}

    def asked() -> object:
        answer = httpx.post(f"http://localhost:{port}/move", json={**places, "tokens": prompt, "copy": True})
        moved.update(answer.json())
        return moved["num_tokens"]

    until(lambda: bool(asked()), lambda: str(moved))
    return moved


def _post(port: int, places: dict[str, list[str]], tokens: list[int]) -> dict[str, object]:
    answer: dict[str, object] = httpx.post(f"http://localhost:{port}/move", json={**places, "tokens": tokens}).json()
    return answer


def sorted_names(lines: list[str]) -> list[str]:
    """Instances come up in any order."""
    return [line.split(":")[0] for line in lines if "http://" in line and "ranks" in line]


def test_up_ends_when_one_of_its_processes_does(tmp_path: Path) -> None:
    before = set(children())
    with commands(tmp_path) as start:
        one, _, _ = up(tmp_path, start)
        processes = ranks_of(one.process.pid)
        os.kill(processes[0], signal.SIGKILL)  # the controller
        assert one.until_ends() == 1
        assert "controller has ended with status -9" in one.text()
        assert all(gone(pid) for pid in processes)
    assert set(children()) <= before


def test_up_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(TOPOLOGY)
    (tmp_path / "bad.yaml").write_text(TOPOLOGY.replace("ranks: 2", "ranks: two"))
    with commands(tmp_path) as start:
        bad = start("bad", ["up", "bad.yaml"])
        assert bad.until_ends() == 2 and "bad.yaml:5:14: instances.a.ranks" in bad.text()
        one, port, _ = up(tmp_path, start)
        argv = ["up", "t.yaml", "--port", str(port), "--instance-port", "0", "--pull-port", "0", "--reply-port", "0"]
        two = start("two", argv)
        assert two.until_ends() == 2 and f"cannot listen at localhost:{port}" in two.text().splitlines()[-1]
        assert one.process.poll() is None
        assert one.stop(signal.SIGTERM) == 0
