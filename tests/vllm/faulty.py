"""The connector with faults in it, which a test switches on while the engine runs.

``KVMOVE_TEST_FAULTS`` names a file: {"load": N} fails each load after N blocks, {"slow": S} makes loads wait S seconds,
{"store": true} fails stores, {"raise": NAME, "number": N} raises in that method of ours, once for each N.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from kvreal.engines.vllm.blocks import Paged, Rows
from kvreal.engines.vllm.connector import KVMoveConnector
from kvreal.engines.vllm.plan import Load
from kvreal.engines.vllm.worker import Worker

GUARDED = ("new_request", "matched", "admitted", "plan", "failed", "start_loads", "start_saves", "finished",
           "take_errors", "take_counts", "preempted")  # fmt: skip


def faults() -> dict[str, Any]:
    path = Path(os.environ["KVMOVE_TEST_FAULTS"])
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


class FaultyWorker(Worker):
    def copy_in(self, load: Load, rows: Rows, mark: Any) -> None:
        fault = faults()
        time.sleep(fault.get("slow", 0))
        if "load" in fault:
            short = Load(load.request, load.name, load.sync, load.first, load.blocks[: fault["load"]], load.found,
                         load.num_tokens, load.moved, load.event)  # fmt: skip
            super().copy_in(short, rows, mark)
            raise OSError("planted")
        super().copy_in(load, rows, mark)

    def copy_out(self, *args: Any) -> None:
        if "store" in faults():
            raise OSError("planted")
        super().copy_out(*args)


def raising(side: Any) -> Any:
    """Each of our methods that vLLM's calls end in raises when the test says so."""

    done: set[int] = set()

    def wrap(name: str, method: Any) -> Any:
        def guarded(*args: Any) -> Any:
            fault = faults()
            if fault.get("raise") == name and fault["number"] not in done:
                done.add(fault["number"])
                raise RuntimeError(f"planted in {name}")
            return method(*args)

        return guarded

    for name in GUARDED:
        if hasattr(side, name):
            setattr(side, name, wrap(name, getattr(side, name)))
    return side


class FaultyConnector(KVMoveConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if self.scheduler is not None:
            raising(self.scheduler)

    def make_worker(self, config: str, space: Any, rank: int, paged: Paged) -> Worker:
        worker: Worker = raising(FaultyWorker(config, space, rank, paged))
        return worker
