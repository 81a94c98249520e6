"""Why a rank is a process of its own: how late a loop runs as a thread of vLLM's worker, and as a process beside it.

    python -m tests.vllm.lateness

Both sleep for a millisecond again and again, while the engine computes prompts, and say how much later they woke.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kvreal.engines.vllm.connector import KVMoveConnector
from kvreal.engines.vllm.worker import on_all_cores

VARIABLE = "KVMOVE_TEST_LATENESS"
SLEEP_S = 0.001


async def watch(path: Path) -> None:
    """Write how late each wake-up was (s), every half second, over and over."""
    on_all_cores()
    late: list[float] = []
    written = time.monotonic()
    while True:
        due = time.monotonic() + SLEEP_S
        await asyncio.sleep(SLEEP_S)
        now = time.monotonic()
        late.append(now - due)
        if now - written > 0.5:
            new = path.with_suffix(".new")
            new.write_text(json.dumps(late))
            new.rename(path)
            written = time.monotonic()


class LateConnector(KVMoveConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)

    def make_worker(self, *args: Any) -> Any:
        folder = Path(os.environ[VARIABLE])
        threading.Thread(target=lambda: asyncio.run(watch(folder / "thread.json")), daemon=True).start()
        self.beside = subprocess.Popen([sys.executable, "-m", "tests.vllm.lateness", str(folder / "process.json")])
        return super().make_worker(*args)


def main() -> None:
    from examples.vllm.stage import Stage
    from tests.vllm.conftest import ROOT, model
    from tests.vllm.prompts import letters

    folder = ROOT / "out" / "vllm" / "lateness"
    with Stage(folder, model("mid")) as stage:
        stage.controller()
        environ = {"PYTHONPATH": str(ROOT), VARIABLE: str(folder)}
        engine = stage.engine("one", connector=("LateConnector", "tests.vllm.lateness"), environ=environ)
        engine.ready(f"{engine.url}/health")
        sizes = {}
        for when, count in (("idle", 0), ("computing prompts of 4,000 tokens", 6), ("writing 400 tokens", 1)):
            before = {name: len(json.loads((folder / f"{name}.json").read_text())) for name in ("thread", "process")}
            if count == 6:
                for i in range(count):
                    engine.complete(letters(i, 4000), 1)
            elif count:
                engine.complete(letters(99, 100), 400)
            else:
                time.sleep(5)
            time.sleep(1.2)
            sizes[when] = before
            for name in ("thread", "process"):
                late = sorted(json.loads((folder / f"{name}.json").read_text())[before[name] :])
                parts = [late[int(len(late) * part)] * 1e3 for part in (0.5, 0.99, 0.999)] + [late[-1] * 1e3]
                print(f"{when:36}{name:9}" + "".join(f"{part:9.2f}" for part in parts) + "  ms: 50, 99, 99.9, 100%")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(watch(Path(sys.argv[1])))
    else:
        main()
