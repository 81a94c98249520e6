"""Why a rank is a process of its own: how late a loop runs as a thread of vLLM's worker, and as a process beside it.

    python -m tests.vllm.lateness

Both sleep for a millisecond again and again, while the engine computes, and while its worker stands still for 2 s, and
say how much later they woke. Then, in turns, one of them does what a rank does for a lookup each time it wakes: how
fast does the engine write meanwhile?
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kvreal.engines.vllm.connector import KVMoveConnector
from tests.vllm.late import read, watch

VARIABLE = "KVMOVE_TEST_LATENESS"
ROUNDS = 5


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
    for old in (*folder.glob("*.late"), *folder.glob("*.work")):
        old.unlink()
    with Stage(folder, model("mid")) as stage:
        stage.controller()
        environ = {"PYTHONPATH": str(ROOT), VARIABLE: str(folder)}
        engine = stage.engine("one", connector=("LateConnector", "tests.vllm.lateness"), environ=environ)
        engine.ready(f"{engine.url}/health")
        for name in ("thread", "process"):
            stage.until((folder / f"{name}.late").exists, f"the {name} has begun")
        whens = (("idle", 0), ("computing prompts of 4,000 tokens", 6), ("writing 400 tokens", 1), ("stopped, 2 s", -1))
        for when, count in whens:
            before = {name: len(read(folder / f"{name}.late")) for name in ("thread", "process")}
            if count == 6:
                for i in range(count):
                    engine.complete(letters(i, 4000), 1)
            elif count < 0:
                (worker,) = engine.pids("VLLM::Worker")
                os.kill(worker, signal.SIGSTOP)
                time.sleep(2)
                os.kill(worker, signal.SIGCONT)
            elif count:
                engine.complete(letters(99, 100), 400)
            else:
                time.sleep(5)
            time.sleep(1.2)
            for name in ("thread", "process"):
                late = sorted(read(folder / f"{name}.late")[before[name] :])
                parts = [late[int(len(late) * part)] * 1e3 for part in (0.5, 0.99, 0.999)] + [late[-1] * 1e3]
                print(f"{when:36}{name:9}" + "".join(f"{part:9.2f}" for part in parts) + "  ms: 50, 99, 99.9, 100%")
        rates: dict[str, list[float]] = {"nobody": [], "thread": [], "process": []}
        for number in range(ROUNDS):
            for who, rate in rates.items():
                flag = folder / f"{who}.work"
                flag.touch()
                time.sleep(1.2)  # it is looked for every half second
                answer = engine.complete(letters(200 + number, 100), 300)
                rate.append(299 / (answer.total_s - answer.first_s))
                flag.unlink()
        for who, rate in rates.items():
            print(f"{who:9} works: {statistics.median(rate):6.0f} tokens a second, median of {ROUNDS}")


if __name__ == "__main__":
    main()
