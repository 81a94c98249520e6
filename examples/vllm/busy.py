"""What moves cost an engine that is at work: tokens a second with and without moves beside it, in turns.

    python -m examples.vllm.busy [--rounds 10] [--cap 100]

Engine ``two`` writes for eight requests at once; meanwhile KV of other prompts moves to it and away again, at no more
than ``--cap`` MB a second.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List

from examples.vllm.model import make
from examples.vllm.stage import Engine, Stage
from examples.vllm.ttft import prompt

REQUESTS = 8
TOKENS = 64


def round_of(engine: Engine, number: int) -> float:
    """Tokens a second: prompts of 300, 64 new ones each, nothing of them cached."""
    prompts = [prompt(50_000 + number * REQUESTS + i, 300) for i in range(REQUESTS)]
    began = time.monotonic()
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(lambda tokens: engine.complete(tokens, TOKENS), prompts))
    return REQUESTS * TOKENS / (time.monotonic() - began)


class Mover:
    """While ``on``: moves, one after the other, there and back."""

    def __init__(self, stage: Stage, prompts: List[List[int]], cap: int) -> None:
        self.stage: Stage = stage
        self.prompts: List[List[int]] = prompts
        self.cap: int = cap
        self.on: threading.Event = threading.Event()
        self.over: bool = False
        self.tokens: int = 0
        self.seconds: float = 0.0
        self.thread: threading.Thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        places = ["one", "two"]
        while not self.over:
            for tokens in self.prompts:
                self.on.wait()
                if self.over:
                    return
                began = time.monotonic()
                answer = self.stage.move(places[0], places[1], tokens, bandwidth_cap_bytes_per_s=self.cap)
                self.tokens += answer["num_tokens"]
                self.seconds += time.monotonic() - began
            places.reverse()

    def stop(self) -> None:
        self.over = True
        self.on.set()
        self.thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.vllm.busy", description="An engine at work beside moves.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cap", type=int, default=100, help="MB a second")
    args = parser.parse_args()
    with Stage(Path("out/vllm/busy"), make("mid", Path("out/vllm/mid"))) as stage:
        stage.controller()
        one, two = stage.engines("one", "two")
        prompts = [prompt(90_000 + i, 4000) for i in range(3)]
        for tokens in prompts:
            one.complete(tokens, 1)
            stage.stored("one", tokens)
        round_of(two, 999)
        mover = Mover(stage, prompts, args.cap * 1_000_000)
        found: Dict[bool, List[float]] = {False: [], True: []}
        try:
            for number in range(args.rounds * 2):
                moving = number % 2 == 1
                (mover.on.set if moving else mover.on.clear)()
                found[moving].append(round_of(two, number))
        finally:
            mover.stop()
        alone, beside = (statistics.median(found[moving]) for moving in (False, True))
        rate = mover.tokens * 8192 / max(mover.seconds, 1e-9) / 1e6
        print(f"{alone:.0f} tokens/s alone, {beside:.0f} beside moves of {rate:.0f} MB/s (cap {args.cap}), medians of "
              f"{args.rounds} rounds in turns: {100 * (1 - beside / alone):.1f}% less")  # fmt: skip


if __name__ == "__main__":
    main()
