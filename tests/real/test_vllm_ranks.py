"""Ranks beside an engine: vLLM's connector without vLLM, with real ranks in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvreal.engines.vllm.scheduler import Scheduler, prompt_of

pytestmark = pytest.mark.real
pytest.importorskip("torch", reason="torch is not installed: pip install 'kvmove[real]'")

from kvreal.engines.vllm.worker import Child, StartError  # noqa: E402
from tests.real.vllm_harness import BLOCK, BLOCK_BYTES, SPACE, Harness, same, stderr_in, until  # noqa: E402


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def make(ranks: int = 1, chunks: int = 16, lease_s: float = 30.0, mode: str = "sync", **more: Any) -> Harness:
        made.append(Harness(tmp_path, ranks, chunks, lease_s, mode, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


# ---- a rank beside an engine
def test_a_prompt_is_stored_and_loaded_elsewhere(harness: Callable[..., Harness]) -> None:
    one = harness()
    tokens = list(range(19))  # two chunks and a tail: 5 blocks
    assert one.serve(tokens, [1, 2, 3, 4, 5]) == 0
    stored = [one.block(0, i) for i in (1, 2, 3, 4, 5)]
    assert one.serve(tokens, [11, 12, 13, 14, 15]) == 18  # the last token is computed
    assert all(same(one.block(0, 11 + i), stored[i]) for i in range(5))
    request = one.request(tokens)
    assert one.matched(request, 8) == 10  # beyond what vLLM has itself
    one.step(request, [1, 2, 23, 24, 25], 10, 18)
    assert all(same(one.block(0, 23 + i), stored[2 + i]) for i in range(3))
    assert one.workers[0].take_counts()["loaded_tokens|stored|LocalCPUBackend"] == 28


def test_a_disk_is_a_tier_too(harness: Callable[..., Harness], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    more = f", local_disk: {disk}, max_local_disk_size: 0.0001, store_location: LocalDiskBackend"
    one = harness(more=more)
    tokens = list(range(19))
    one.serve(tokens, [1, 2, 3, 4, 5])
    request = one.request(tokens)
    assert one.matched(request) == 18
    assert one.scheduler.source_of(request) == "LocalDiskBackend"
    one.step(request, [11, 12, 13, 14, 15], 18, 18)
    assert all(same(one.block(0, 11 + i), one.block(0, 1 + i)) for i in range(5))
    assert one.workers[0].take_counts()["loaded_tokens|stored|LocalDiskBackend"] == 18
    maps = Path(f"/proc/{one.workers[0].child.process.pid}/maps").read_text()
    assert str(disk) in maps


def test_the_tail_of_a_prompt_moves_as_whole_blocks(harness: Callable[..., Harness], tmp_path: Path) -> None:
    from examples.vllm.stage import Stage

    with Stage(tmp_path / "stage", tmp_path) as stage:
        stage.controller()
        one, two = (harness(name=name, pull=stage.pull, ranks=2) for name in ("one", "two"))
        for name in ("one", "two"):
            stage.registered(name)
        tokens = list(range(19))
        one.serve(tokens, [1, 2, 3, 4, 5])
        stage.stored("one", tokens)
        body = {"old_position": ["one", "LocalCPUBackend"], "new_position": ["two", "LocalCPUBackend"]}
        dry = stage.api.post("/move", json={**body, "tokens": tokens, "dry_run": True}).json()
        moved = stage.move("one", "two", tokens)
        # 19 tokens lie in 5 blocks, of each rank: that is what crosses, and what is said
        assert [rank["bytes"] for rank in moved["end"]["ranks"]] == [5 * BLOCK_BYTES] * 2
        assert (dry["num_tokens"], dry["bytes"]) == (19, 2 * 5 * BLOCK_BYTES)
        places = stage.api.get("/instances").json()["instances"]
        (there,) = [one for one in places if one["instance_id"] == "two"]
        assert [rank["locations"][0]["bytes"] for rank in there["ranks"]] == [5 * BLOCK_BYTES] * 2
        assert (moved["num_tokens"], moved["end"]["state"]) == (19, "done")
        assert two.serve(tokens, [11, 12, 13, 14, 15]) == 18
        for rank in (0, 1):
            assert all(same(two.block(rank, 11 + i), one.block(rank, 1 + i)) for i in range(5))
        counts = two.workers[0].take_counts()
        assert counts["loaded_tokens|moved|LocalCPUBackend"] == 18
        assert one.matched(one.request(tokens)) == 0  # it has left


def test_a_rank_that_is_moved_to_dies_and_the_source_keeps_all(harness: Callable[..., Harness], tmp_path: Path) -> None:
    from examples.vllm.stage import Stage

    def ended() -> bool:
        return all(event["state"] in ("done", "failed") for event in stage.api.get("/events").json()["events"])

    with Stage(tmp_path / "stage", tmp_path) as stage:
        stage.controller()
        one, two = (harness(name=name, pull=stage.pull) for name in ("one", "two"))
        for name in ("one", "two"):
            stage.registered(name)
        tokens = list(range(19))
        one.serve(tokens, [1, 2, 3, 4, 5])
        stage.stored("one", tokens)
        child = two.workers[0].child.process
        child.send_signal(signal.SIGSTOP)  # it answers nothing: the move waits for its room
        body = {"old_position": ["one", "LocalCPUBackend"], "new_position": ["two", "LocalCPUBackend"]}
        with ThreadPoolExecutor(1) as pool:
            moving = pool.submit(stage.api.post, "/move", json={**body, "tokens": tokens})
            until(lambda: not ended())
            child.kill()
            answer = moving.result()
        until(ended, 60.0)
        event = answer.json().get("event_id")
        if event is not None:
            assert stage.api.get(f"/events/{event}").json()["state"] == "failed"
        assert stage.held(tokens) == {"one": 19}
        assert one.serve(tokens, [11, 12, 13, 14, 15]) == 18
        assert all(same(one.block(0, 11 + i), one.block(0, 1 + i)) for i in range(5))


def test_the_second_with_an_id_is_told_and_registered_once_the_first_has_gone(
    harness: Callable[..., Harness], tmp_path: Path
) -> None:
    from examples.vllm.stage import Stage

    with Stage(tmp_path / "stage", tmp_path) as stage, stderr_in(tmp_path / "stderr") as said:
        stage.controller()
        first = harness(pull=stage.pull)
        stage.registered("one")
        first.serve(list(range(16)), [1, 2, 3, 4])
        stage.stored("one", list(range(16)))
        second = harness(pull=stage.pull)
        until(lambda: "the instance one is there already" in said.read_text())
        assert "The engine serves on" in said.read_text()
        other = list(range(50, 66))
        second.serve(other, [1, 2, 3, 4])
        assert second.serve(other, [5, 6, 7, 8]) == 15  # for itself
        assert stage.held(other) == {}
        assert stage.held(list(range(16))) == {"one": 16}  # the first one's place is its own
        first.close()
        until(lambda: stage.held(other) == {"one": 16}, 30.0)
        assert stage.held(list(range(16))) == {}


def test_a_longer_prompt_finds_the_tail_of_a_shorter_one(harness: Callable[..., Harness]) -> None:
    one = harness()
    one.serve(list(range(11)), [1, 2, 3])
    assert one.matched(one.request([*range(11), 90, 91, 92, 93, 94, 95, 96])) == 11
    assert one.matched(one.request([*range(10), 80, 81, 82, 83])) == 8
    one.serve([7, 8, 9], [4])
    assert one.matched(one.request([7, 8, 9, 10, 11])) == 3


def test_all_ranks_or_none(harness: Callable[..., Harness]) -> None:
    two = harness(ranks=2)
    tokens = list(range(16))
    two.serve(tokens, [1, 2, 3, 4])
    assert [two.block(rank, 1)[0][0, 0, 0].item() for rank in (0, 1)] != []
    assert two.serve(tokens, [11, 12, 13, 14]) == 15
    for rank in (0, 1):  # each its own part
        assert same(two.block(rank, 11), two.block(rank, 1))
    assert not same(two.block(0, 11), two.block(1, 11))
    # Rank 1 alone stores another prompt: half of it is nothing.
    request = two.request([*range(50, 66)])
    plan_for_one = SimpleNamespace(
        request="x", name="x!1", prompt=prompt_of(request), blocks=(5, 6, 7, 8)
    )
    two.workers[1].start_saves(SimpleNamespace(saves=(plan_for_one,)))  # type: ignore[arg-type]
    until(lambda: not two.workers[1].saving["x"])
    assert two.matched(two.request([*range(50, 66)])) == 0


@pytest.mark.parametrize("ranks, overlapping", [(1, False), (2, False), (1, True)])
def test_what_a_step_computes_is_stored_once_its_loads_are_known_to_be_good(
    harness: Callable[..., Harness], ranks: int, overlapping: bool
) -> None:
    """Of two ranks, one cannot know that the other's load failed, and that what it computed from there on is wrong;
    where steps overlap nobody knows before the step after the next."""
    one = harness(ranks=ranks)
    one.scheduler.overlapping = overlapping
    one.serve(list(range(16)), [1, 2, 3, 4])
    request = one.request(list(range(24)))
    assert one.matched(request) == 16
    blocks = [11, 12, 13, 14, 15, 16]
    one.scheduler.admitted(request, blocks, 16)

    def planned(computed: int, count: int) -> int:
        return len(one.scheduler.plan(SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=request.request_id, num_computed_tokens=computed)],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens={request.request_id: count},
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: (blocks,)),
            preempted_req_ids=set(),
        )).saves)  # fmt: skip

    expected = [0, 0, 1, 0] if overlapping else [1, 0, 0, 0] if ranks == 1 else [0, 1, 0, 0]
    assert [planned(16, 8), planned(24, 1), planned(25, 1), planned(26, 1)] == expected


def test_what_was_looked_up_is_not_evicted(harness: Callable[..., Harness]) -> None:
    one = harness(chunks=2)
    tokens = list(range(16))
    one.serve(tokens, [1, 2, 3, 4])
    stored = [one.block(0, i) for i in (1, 2, 3, 4)]
    held = one.request(tokens)
    assert one.matched(held) == 15
    one.serve(list(range(100, 116)), [5, 6, 7, 8])  # no room: both slots are held
    assert one.workers[0].take_counts()["store_short|full"] == 1
    one.step(held, [11, 12, 13, 14], 15, 15)
    assert all(same(one.block(0, 11 + i), stored[i]) for i in range(4))
    one.serve(list(range(100, 116)), [5, 6, 7, 8])
    assert one.matched(one.request(list(range(100, 116)))) == 15  # let go, and evicted


def test_a_load_after_its_lease_is_an_error(harness: Callable[..., Harness]) -> None:
    one = harness(lease_s=0.2)
    tokens = list(range(16))
    one.serve(tokens, [1, 2, 3, 4])
    request = one.request(tokens)
    assert one.matched(request) == 15
    name = one.scheduler.requests[request.request_id].name
    until(lambda: not one.workers[0].here.ask(_loaded(name)).ok)
    errors, _, _ = one.step(request, [11, 12, 13, 14], 15, 15)
    assert errors == {11, 12, 13, 14}
    assert one.workers[0].take_counts()["load_failures|lease_ended"] == 1


def _loaded(name: str) -> Any:
    """A question about another hold, so that the answer does not end this one."""
    from kvreal.engines.vllm.link import Loaded

    return Loaded(name)


def test_loads_beside_the_steps(harness: Callable[..., Harness]) -> None:
    one = harness(mode="async")
    tokens = list(range(16))
    one.serve(tokens, [1, 2, 3, 4])
    request = one.request(tokens)
    until(lambda: one.scheduler.matched(request, 0)[0] is not None)
    assert one.scheduler.matched(request, 0) == (15, True)
    _, _, received = one.step(request, [11, 12, 13, 14], 15, 15)
    while request.request_id not in received:
        received |= one.workers[0].finished(set())[1]
    assert same(one.block(0, 14), one.block(0, 4))


def test_a_stopped_rank_keeps_nobody_waiting(harness: Callable[..., Harness]) -> None:
    one = harness()
    tokens = list(range(16))
    one.serve(tokens, [1, 2, 3, 4])
    pid = one.workers[0].child.process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        assert one.matched(one.request(tokens)) == 0
        began = time.monotonic()
        assert one.matched(one.request(tokens)) == 0  # those after it do not wait at all
        assert time.monotonic() - began < 0.2
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: one.matched(one.request(tokens)) == 15)


def test_what_is_read_from_blocks_that_changed_hands_is_not_stored(
    harness: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = harness()
    worker = one.workers[0]
    request = one.request(list(range(16)))
    save = SimpleNamespace(request="x", name="x!1", prompt=prompt_of(request), blocks=(1, 2, 3, 4))
    pid = worker.child.process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        worker.start_saves(SimpleNamespace(saves=(save,)))  # type: ignore[arg-type]
        monkeypatch.setattr("kvreal.engines.vllm.worker.HANDS_S", 0.05)
        worker.preempted(SimpleNamespace(preempted=True))  # type: ignore[arg-type]
        for cache in one.caches[0].values():
            cache.zero_()  # another request's by now
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: not worker.saving["x"])
    assert worker.take_counts() == {"store_short|preempted": 1}
    assert one.matched(one.request(list(range(16)))) == 0
    assert one.serve(list(range(16)), [1, 2, 3, 4]) == 0
    assert one.serve(list(range(16)), [5, 6, 7, 8]) == 15


def test_a_killed_rank_is_a_miss_until_it_is_there_again(harness: Callable[..., Harness]) -> None:
    two = harness(ranks=2)
    tokens = list(range(16))
    two.serve(tokens, [1, 2, 3, 4])
    assert two.serve(tokens, [21, 22, 23, 24]) == 15  # all that talk to it have talked to it
    first, other = two.workers[0].child.process, two.workers[1].child.process
    first.kill()
    first.wait()
    request = two.request(tokens)
    assert two.matched(request) == 0
    two.step(request, [1, 2, 3, 4], 0, 0)  # nothing is raised
    until(lambda: two.workers[0].child.process is not first)
    until(lambda: two.matched(two.request([99, 98])) == 0 and two.scheduler.lost and len(two.scheduler.links) == 2)
    assert other.poll() is None  # the other one has seen nothing of it
    two.serve(tokens, [1, 2, 3, 4])
    assert two.serve(tokens, [11, 12, 13, 14]) == 15
    assert all(same(two.block(rank, 11), two.block(rank, 1)) for rank in (0, 1))


@pytest.mark.parametrize("who", ["scheduler", "server", "worker"])
def test_a_rank_ends_with_each_process_of_its_engine(harness: Callable[..., Harness], who: str) -> None:
    one = harness()
    child = one.workers[0].child
    if who == "scheduler":
        one.scheduler.close()
    elif who == "worker":
        child.sock.close()
    else:
        server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        first, one.scheduler = one.scheduler, Scheduler(BLOCK, "sync")
        one.scheduler.connect([one.workers[0].address], BLOCK_BYTES, server.pid)
        assert one.matched(one.request([1, 2, 3])) == 0
        assert first.links
        server.kill()
        server.wait()
    child.process.wait(10)


def test_an_instance_file_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    keys = "enable_controller: true, lmcache_instance_id: a, controller_pull_url: 'localhost:1'"
    path.write_text(f"{{chunk_size: 10, {keys}}}")
    with pytest.raises(StartError, match=r"chunk_size.*found 10, expected a multiple of the engine's block of 4"):
        Child(str(path), SPACE, 0, "kvmove-test-none")
