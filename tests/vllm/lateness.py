"""Why a rank is a process of its own: how late a loop runs as a thread of vLLM's worker, and as a process beside it.

    python -m tests.vllm.lateness

Both sleep for a millisecond again and again, while the engine computes prompts, and say how much later they woke.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kvreal.engines.vllm.connector import KVMoveConnector
from tests.vllm.late import read, watch

VARIABLE = "KVMOVE_TEST_LATENESS"


class LateConnector(KVMoveConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)

    def make_worker(self, *args: Any) -> Any:
        folder = Path(os.environ[VARIABLE])
        threading.Thread(target=lambda: asyncio.run(watch(folder / "thread.late")), daemon=True).start()
        self.beside = subprocess.Popen([sys.executable, "-m", "tests.vllm.late", str(folder / "process.late")])
        return super().make_worker(*args)


def main() -> None:
    from examples.vllm.stage import Stage
    from tests.vllm.conftest import ROOT, model
    from tests.vllm.prompts import letters

    folder = ROOT / "out" / "vllm" / "lateness"
    for old in folder.glob("*.late"):
        old.unlink()
    with Stage(folder, model("mid")) as stage:
        stage.controller()
        environ = {"PYTHONPATH": str(ROOT), VARIABLE: str(folder)}
        engine = stage.engine("one", connector=("LateConnector", "tests.vllm.lateness"), environ=environ)
        engine.ready(f"{engine.url}/health")
        for name in ("thread", "process"):
            stage.until((folder / f"{name}.late").exists, f"the {name} has begun")
        for when, count in (("idle", 0), ("computing prompts of 4,000 tokens", 6), ("writing 400 tokens", 1)):
            before = {name: len(read(folder / f"{name}.late")) for name in ("thread", "process")}
            if count == 6:
                for i in range(count):
                    engine.complete(letters(i, 4000), 1)
            elif count:
                engine.complete(letters(99, 100), 400)
            else:
                time.sleep(5)
            time.sleep(1.2)
            for name in ("thread", "process"):
                late = sorted(read(folder / f"{name}.late")[before[name] :])
                parts = [late[int(len(late) * part)] * 1e3 for part in (0.5, 0.99, 0.999)] + [late[-1] * 1e3]
                print(f"{when:36}{name:9}" + "".join(f"{part:9.2f}" for part in parts) + "  ms: 50, 99, 99.9, 100%")


if __name__ == "__main__":
    main()
