"""vLLM's connector without vLLM: what its scheduler and workers would call, real ranks in processes of their own."""

from __future__ import annotations

import ctypes
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

import msgspec
import pytest

from kvcore.protocol.messages import Namespace
from kvreal.engines.vllm import api
from kvreal.engines.vllm.link import Look, Prompt
from kvreal.engines.vllm.scheduler import Scheduler, prompt_of
from kvreal.engines.vllm.space import SpaceError, check, digest_of_folder, space_of

pytestmark = pytest.mark.real
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'kvmove[real]'")

from kvreal.engines.vllm.blocks import (  # noqa: E402
    DeviceCopier,
    HostCopier,
    LayoutError,
    Paged,
    Rows,
    Slots,
    lock_pages,
)
from kvreal.engines.vllm.worker import Child, StartError, Worker  # noqa: E402

BLOCK, CHUNK, BLOCKS = 4, 8, 64
BLOCK_BYTES = 2 * 2 * BLOCK * 16 * 4
SPACE = Namespace("m", "w", "float32", "test", CHUNK, 1, BLOCK_BYTES // BLOCK, BLOCK)


def until(condition: Callable[[], Any], within_s: float = 20.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.005)


class Harness:
    """An engine of ``ranks`` workers, as the connector sees it."""

    def __init__(
        self, folder: Path, ranks: int, chunks: int, lease_s: float, mode: str, name: str = "one", pull: int = 1,
        more: str = "",
    ) -> None:  # fmt: skip
        self.folder: Path = folder
        space = msgspec.structs.replace(SPACE, ranks=ranks)
        size = chunks * CHUNK * space.bytes_per_token
        path = folder / f"{name}.yaml"
        keys = f"lmcache_instance_id: {name}, controller_pull_url: 'localhost:{pull}'"
        path.write_text(
            f"{{chunk_size: 8, enable_controller: true, {keys}, max_local_cpu_size: {size / (1 << 30)!r}, "
            f"kvmove: {{transport: tcp}}{more}}}"
        )
        self.caches = [{f"layer {i}": torch.rand(BLOCKS, 2, BLOCK, 16) for i in range(2)} for _ in range(ranks)]
        self.workers = [Worker(str(path), space, rank, Paged(self.caches[rank], BLOCKS)) for rank in range(ranks)]
        self.scheduler = Scheduler(BLOCK, mode, lease_s)
        self.scheduler.connect([worker.address for worker in self.workers], BLOCK_BYTES, 0)
        self.count = 0

    def request(self, tokens: list[int], **more: Any) -> Any:
        self.count += 1
        fields = {"prompt_embeds": None, "lora_request": None, "mm_features": [], "cache_salt": None,
                  "skip_reading_prefix_cache": False, "pooling_params": None}  # fmt: skip
        request = SimpleNamespace(request_id=f"r{self.count}", prompt_token_ids=tokens, **{**fields, **more})
        self.scheduler.new_request(request)
        return request

    def matched(self, request: Any, local: int = 0) -> int:
        found: list[int] = []

        def answered() -> bool:
            count, _ = self.scheduler.matched(request, local)
            if count is not None:
                found.append(count)
            return count is not None

        until(answered)
        return found[0]

    def step(self, request: Any, blocks: list[int], count: int, computed: int) -> tuple[set[int], set[str], set[str]]:
        """Admit it with these blocks, compute the rest of its prompt, finish it; (errors, sent, received)."""
        self.scheduler.admitted(request, blocks, count)
        new = SimpleNamespace(req_id=request.request_id, num_computed_tokens=computed)
        output = SimpleNamespace(
            scheduled_new_reqs=[new],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens={request.request_id: len(request.prompt_token_ids) - computed},
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: (blocks,)),
            preempted_req_ids=set(),
        )
        plan = self.scheduler.plan(output)
        errors: set[int] = set()
        sent: set[str] = set()
        received: set[str] = set()
        for worker in self.workers:
            worker.start_loads(plan)
            worker.start_saves(plan)
            errors |= worker.take_errors()
        waits = self.scheduler.finished(request)
        for worker in self.workers:
            one, two = worker.finished({request.request_id})
            sent |= one
            received |= two
            while waits and request.request_id not in sent:
                one, two = worker.finished(set())
                sent |= one
                received |= two
            sent.discard(request.request_id) if worker is not self.workers[-1] else None
        return errors, sent, received

    def serve(self, tokens: list[int], blocks: list[int]) -> int:
        """Look, load, compute and store; how many tokens were loaded."""
        request = self.request(tokens)
        count = self.matched(request)
        errors, _, _ = self.step(request, blocks, count, count)
        assert not errors
        return count

    def block(self, rank: int, number: int) -> list[Any]:
        return [cache[number].clone() for cache in self.caches[rank].values()]

    def close(self) -> None:
        self.scheduler.close()
        for worker in self.workers:
            worker.close()


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def make(ranks: int = 1, chunks: int = 16, lease_s: float = 30.0, mode: str = "sync", **more: Any) -> Harness:
        made.append(Harness(tmp_path, ranks, chunks, lease_s, mode, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def same(one: list[Any], other: list[Any]) -> bool:
    return all(bool((a == b).all()) for a, b in zip(one, other))


# ---- blocks
LAYOUTS: list[tuple[tuple[int, ...], Callable[[Any], Any]]] = [
    ((8, 2, 4, 16), lambda t: t),
    ((2, 8, 4, 2, 16), lambda t: t),
    ((3, 8, 4, 16), lambda t: t.transpose(0, 1)),
]


@pytest.mark.parametrize("kind", [HostCopier, DeviceCopier])
@pytest.mark.parametrize(("shape", "turn"), LAYOUTS)
def test_blocks_go_out_and_come_back(kind: Any, shape: tuple[int, ...], turn: Callable[[Any], Any]) -> None:
    caches = {f"layer {i}": turn(torch.rand(shape)) for i in range(3)}
    paged = Paged(caches, 8)
    memory = torch.zeros(8 * paged.block_bytes, dtype=torch.uint8)
    first, size = memory.data_ptr(), paged.block_bytes
    slots = SimpleNamespace(address=lambda location, slot: first + slot * size, bases=[], maps=[])
    copier = kind(paged, slots)
    before = {name: cache.clone() for name, cache in caches.items()}
    axis = paged.tensors[0][1]
    out, back = Rows(slots, paged.block_bytes, 1), Rows(slots, paged.block_bytes, 1)  # type: ignore[arg-type]
    for i, block in enumerate((5, 1, 6)):
        out.add(block, "here", i, 0)
        back.add((0, 7, 2)[i], "here", i, 0)
    copier.store(out, copier.mark())
    for cache in caches.values():
        cache.zero_()
    copier.load(back, copier.mark())
    assert back.done == 3
    for name, cache in caches.items():
        for source, target in zip((5, 1, 6), (0, 7, 2)):
            assert (cache.select(axis, target) == before[name].select(axis, source)).all()
        assert not cache.select(axis, 3).any()


def test_cuda_is_told_of_pages_before_they_are_unmapped() -> None:
    """With a stand-in for CUDA: what it is told, and that the pages can still be read then."""
    told: list[tuple[str, int]] = []

    class Runtime:
        def cudaHostRegister(self, base: int, size: int, flags: int) -> int:
            told.append(("lock", size))
            return 1 if size == 8192 else 0

        def cudaHostUnregister(self, base: int) -> int:
            told.append(("forget", ctypes.string_at(base, 1)[0]))
            return 0

    fds = []
    for size, byte in ((4096, 7), (8192, 8)):
        fds.append(os.memfd_create("slab"))
        os.write(fds[-1], bytes([byte]) * size)
    slots = Slots((), fds)
    lock_pages(Runtime(), slots)
    assert told == [("lock", 4096), ("lock", 8192)]
    rows = Rows(slots, 1, 1)  # a copy that is under way
    del slots
    assert len(told) == 2
    del rows
    assert told[2:] == [("forget", 7)]  # the other was not locked
    for fd in fds:
        os.close(fd)


def test_tensors_that_are_not_made_of_blocks() -> None:
    with pytest.raises(LayoutError, match="axis of 9 blocks"):
        Paged({"a": torch.zeros(8, 2, 4)}, 9)
    with pytest.raises(LayoutError, match="not contiguous"):
        Paged({"a": torch.zeros(8, 4, 6)[:, :, :2]}, 8)
    with pytest.raises(LayoutError, match="other layers"):
        Paged({"a": torch.zeros(8, 4), "b": torch.zeros(8, 6)}, 8)


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
    harness: Callable[..., Harness], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from examples.vllm.stage import Stage

    said = ""

    def says(what: str) -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return what in said

    with Stage(tmp_path / "stage", tmp_path) as stage:
        stage.controller()
        first = harness(pull=stage.pull)
        stage.registered("one")
        first.serve(list(range(16)), [1, 2, 3, 4])
        stage.stored("one", list(range(16)))
        second = harness(pull=stage.pull)
        until(lambda: says("the instance one is there already"))
        assert "The engine serves on" in said
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


# ---- what keys are made of
def test_salt_adapter_and_media_are_part_of_a_prompt() -> None:
    def prompt(**more: Any) -> Prompt:
        fields: dict[str, Any] = {"prompt_embeds": None, "lora_request": None, "mm_features": [], "cache_salt": None,
                                  "pooling_params": None, "prompt_token_ids": [1, 2], **more}  # fmt: skip
        found = prompt_of(SimpleNamespace(**fields))
        assert found is not None
        return found

    lora = SimpleNamespace(lora_name="x", lora_path="")
    image = SimpleNamespace(identifier="f00d", mm_position=SimpleNamespace(offset=0, length=2))
    other = SimpleNamespace(identifier="beef", mm_position=SimpleNamespace(offset=0, length=2))
    alike = [prompt(), prompt(cache_salt="s"), prompt(lora_request=lora), prompt(mm_features=[image]),
             prompt(mm_features=[other]), prompt(cache_salt=prompt(mm_features=[image]).adapter)]  # fmt: skip
    assert len({(one.adapter, one.salt) for one in alike}) == len(alike)
    assert (prompt().adapter, prompt().salt) == ("", "")
    for embedded in ({"prompt_embeds": object()}, {"prompt_token_ids": None}, {"pooling_params": object()}):
        fields = {"prompt_embeds": None, "prompt_token_ids": [1], "pooling_params": None, **embedded}
        assert prompt_of(SimpleNamespace(**fields)) is None


def test_weights_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        (tmp_path / name).mkdir()
        generator = torch.Generator().manual_seed(seed)
        raw = torch.randint(0, 255, (3 << 20,), dtype=torch.uint8, generator=generator).numpy().tobytes()
        (tmp_path / name / "model.safetensors").write_bytes(raw)
    a, b, c = (digest_of_folder(str(tmp_path / name)) for name in "abc")
    assert a == c != b
    assert digest_of_folder(str(tmp_path)) == ""


def test_what_tells_the_kv_of_two_engines_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(
        where: str = "a", seed: int = 1, kv: str = "auto", shape: tuple[int, ...] = (BLOCKS, 2, 4, 16),
        item: Any = torch.float32, block: int = 4, ranks: int = 1, version: str = "0.32.0", **more: Any,
    ) -> Any:  # fmt: skip
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
        folder = tmp_path / where
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(bytes([seed]) * 5000)
        values = {"architectures": ["Llama"], "_name_or_path": where, "rope_theta": 1e4, **more.pop("values", {})}
        hf = SimpleNamespace(architectures=["Llama"], to_dict=lambda: values)
        model = {"hf_config": hf, "dtype": "torch.bfloat16", "quantization": None, "model": str(folder), **more}
        config = SimpleNamespace(
            model_config=SimpleNamespace(**model), cache_config=SimpleNamespace(cache_dtype=kv),
            parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
            compilation_config=SimpleNamespace(static_forward_context={}),
        )  # fmt: skip
        group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=block))
        paged = Paged({"one": torch.zeros(shape, dtype=item)}, BLOCKS)
        return space_of(config, SimpleNamespace(kv_cache_groups=[group]), paged)

    bytes_ = {"item": torch.uint8, "shape": (BLOCKS, 2, 4, 16)}
    assert engine() == engine(where="b") == engine(kv="bfloat16", version="0.32.1+cpu")  # path and name are nothing
    others = [
        engine(where="c", seed=2), engine(values={"rope_theta": 2e4}), engine(dtype="torch.float16"),
        engine(quantization="awq"), engine(shape=(BLOCKS, 4, 4, 8)), engine(block=2), engine(ranks=2),
        engine(version="0.33.0"), engine(item=torch.float16), engine(kv="fp8_e4m3", **bytes_),
        engine(kv="fp8_e5m2", **bytes_),
    ]  # fmt: skip
    assert len({engine(), *others}) == 1 + len(others)


class FullAttentionSpec:
    """By its name, as vLLM's; so are these."""


class MLAAttentionSpec(FullAttentionSpec):
    pass


class SlidingWindowSpec:
    pass


class UniformTypeKVCacheSpecs:
    def __init__(self, *specs: Any) -> None:
        self.kv_cache_specs = dict(enumerate(specs))


def test_engines_whose_kv_cannot_be_exchanged_are_refused_by_name() -> None:
    def said(*specs: Any, dtype: str = "auto", scales: bool = False, **parallel: int) -> str:
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(**{"pipeline_parallel_size": 1, "data_parallel_size": 1, **parallel}),
            cache_config=SimpleNamespace(cache_dtype=dtype, calculate_kv_scales=scales),
        )
        groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs or (FullAttentionSpec(),)]
        try:
            check(config, SimpleNamespace(kv_cache_groups=groups))
        except SpaceError as error:
            return str(error)
        return ""

    full, sliding = FullAttentionSpec(), SlidingWindowSpec()
    assert said() == said(MLAAttentionSpec()) == said(UniformTypeKVCacheSpecs(full, full)) == said(dtype="fp8") == ""
    assert "SlidingWindowSpec, expected that of full attention" in said(sliding)
    assert "SlidingWindowSpec" in said(UniformTypeKVCacheSpecs(sliding))
    assert "2 groups of KV (FullAttentionSpec, SlidingWindowSpec), expected one" in said(full, sliding)
    assert "pipeline parallel size 2, expected 1" in said(pipeline_parallel_size=2)
    assert "data parallel size 2, expected 1" in said(data_parallel_size=2)
    assert "decode_context_parallel_size is 2" in said(decode_context_parallel_size=2)
    assert "KV scales" in said(dtype="fp8", scales=True)


def test_an_unknown_connector_api_is_refused_by_name() -> None:
    class Base:
        pass

    for name, parameters in api.METHODS.items():
        lines = f"def {name}(self, {', '.join(p if p != 'kwargs' else '**kwargs' for p in parameters)}): ..."
        scope: dict[str, Any] = {}
        exec(lines, scope)
        setattr(Base, name, scope[name])
    api.check(Base, "9.9")
    Base.on_new_request = lambda self, request, more: None  # type: ignore[attr-defined]
    del Base.shutdown  # type: ignore[attr-defined]
    said = r"vLLM 9.9 .*on_new_request\(request, more\) instead.*shutdown is missing.*0.32"
    with pytest.raises(api.ApiError, match=said):
        api.check(Base, "9.9")


def test_a_look_is_small() -> None:
    """A long prompt's question is its tokens and little more."""
    prompt = Prompt(bytes(4 * 8000))
    assert len(msgspec.msgpack.encode(Look("r", prompt, 1.0))) < 4 * 8000 + 100
