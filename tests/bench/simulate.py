"""Measure the simulator's workloads by hand, or see where their time goes.

    python tests/bench/simulate.py [a] [a4] [b] [b256] [b1024] [c] [--history] [--profile] [--moves N]

CPU time of one core; building and storing are not measured. Run it in build/fast for the compiled form (``make fast``).
"""

from __future__ import annotations

import cProfile
import pstats
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvsim.workloads import LOADS, Bench


def main(arguments: list[str]) -> None:
    names = [name for name in arguments if name in LOADS] or ["a", "b", "b256", "c"]
    moves = int(arguments[arguments.index("--moves") + 1]) if "--moves" in arguments else 0
    with tempfile.TemporaryDirectory() as folder:
        history = Path(folder) / "history.jsonl" if "--history" in arguments else None
        for name in names:
            count = moves or LOADS[name].moves
            bench = Bench(LOADS[name], time.process_time, history)
            bench.run(max(100, count // 10))
            if "--profile" in arguments:
                profile(bench, count)
                continue
            bench.run(count)
            memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(f"{bench.report(count)} {memory_mb} MB{' with history' if history else ''}", flush=True)


def profile(bench: Bench, moves: int) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    bench.run(moves)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main(sys.argv[1:])
