"""An engine as vLLM's connector sees it, without vLLM: workers with tensors of their own, real ranks beside them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvcore.protocol.messages import Namespace
from kvreal.engines.vllm.scheduler import Scheduler

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'kvmove[real]'")

from kvreal.engines.vllm.blocks import Paged  # noqa: E402
from kvreal.engines.vllm.worker import Worker  # noqa: E402

BLOCK, CHUNK, BLOCKS = 4, 8, 64
BLOCK_BYTES = 2 * 2 * BLOCK * 16 * 4
SPACE = Namespace("m", "w", "float32", "test", CHUNK, 1, BLOCK_BYTES // BLOCK, BLOCK)


def until(condition: Callable[[], Any], within_s: float = 20.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.005)


@contextmanager
def stderr_in(path: Path) -> Iterator[Path]:
    """What this process and those that it starts say to stderr is in ``path``. To be read while they speak: pytest's
    own capture empties its file after each reading, and a line that another process writes just then is lost."""
    before = os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield path
    finally:
        os.dup2(before, 2)
        os.close(before)


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


def same(one: list[Any], other: list[Any]) -> bool:
    return all(bool((a == b).all()) for a, b in zip(one, other))
