"""Time to the first token of prompts that are computed, that were moved here, and that vLLM's own cache has.

    python -m examples.vllm.ttft [--rounds 20] [--tokens 512,2048,4000] [--model mid]

Two engines of one core each, side by side; every prompt is a new one. A round of one length is: computed by the first
engine (cold; it stores the KV beside), moved, and answered by the second from moved KV (moved), and once more by the
second, now from vLLM's own prefix cache (local).
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path
from typing import Dict, Final, List, Sequence, Tuple

from examples.vllm.model import make
from examples.vllm.stage import Engine, Stage

WAYS: Final = ("cold", "moved", "local")

Times = Dict[Tuple[int, str], List[float]]
"""(tokens, way) -> seconds, one a round."""


def prompt(seed: int, count: int) -> List[int]:
    """Letters."""
    draw = random.Random(seed)
    return [draw.randrange(97, 123) for _ in range(count)]


def measure(stage: Stage, src: str, dst: str, lengths: Sequence[int], rounds: int) -> Times:
    """Rounds go through all lengths, so that a slow minute hits all alike."""
    one, two = (engine for name in (src, dst) if isinstance(engine := stage.processes[name], Engine))
    for engine in (one, two):  # what only the first request pays
        engine.complete(prompt(7, 64), 4)
        engine.complete(prompt(8, lengths[-1]), 1)
    found: Times = {(n, way): [] for n in lengths for way in WAYS}
    for number in range(rounds):
        for n in lengths:
            tokens = prompt(1000 + number * 10_000 + n, n)
            cold = one.complete(tokens, 1)
            stage.stored(src, tokens)
            stage.move(src, dst, tokens)
            moved = two.complete(tokens, 1)
            local = two.complete(tokens, 1)
            if moved.cached < n - 1 or cold.tokens != moved.tokens:
                print(f"{n} tokens, round {number}: {moved.cached} cached, tokens {cold.tokens} and {moved.tokens}")
            for way, run in zip(WAYS, (cold, moved, local)):
                found[n, way].append(run.first_s)
    return found


def table(found: Times, lengths: Sequence[int]) -> str:
    rounds = len(next(iter(found.values())))
    lines = [
        f"time to first token, ms, median of {rounds}",
        "prompt   " + "".join(f"{way:>9}" for way in WAYS) + "   moved / local   cold / moved",
    ]
    for n in lengths:
        cold, moved, local = (statistics.median(found[n, way]) * 1e3 for way in WAYS)
        lines.append(f"{n:>6}   {cold:>9.0f}{moved:>9.1f}{local:>9.1f}{moved / local:>13.2f}{cold / moved:>17.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.vllm.ttft", description="Time to first token.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", default="512,2048,4000")
    parser.add_argument("--model", default="mid", choices=("tiny", "pair", "mid"))
    parser.add_argument("--load", default="auto", choices=("sync", "async", "auto"))
    args = parser.parse_args()
    lengths = [int(part) for part in args.tokens.split(",")]
    model = make(args.model, Path("out/vllm") / args.model)
    with Stage(Path("out/vllm/ttft"), model) as stage:
        stage.controller()
        stage.engines("one", "two", extra={"load": args.load})
        print(table(measure(stage, "one", "two", lengths, args.rounds), lengths))


if __name__ == "__main__":
    main()
