"""`make demo-vllm`: two vLLM engines, a controller, and a prompt whose KV moves from one to the other.

    python -m examples.vllm.demo [--tokens 4000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Dict

from examples.router import Router
from examples.vllm.model import make
from examples.vllm.stage import CPU, Engine, Stage, StageError
from examples.vllm.ttft import measure, table

WORDS = "What a KV cache is: for each token the keys and the values that attention has computed for it, kept. "
HITS = (
    "vllm:external_prefix_cache_hits_total",
    'vllm:prompt_tokens_by_source_total{source="external_kv_transfer"}',
    'vllm:prompt_tokens_cached_by_source_total{source="host"}',
    'kvmove_engine_loaded_tokens_total{source="moved",tier="LocalCPUBackend"}',
)


def say(text: str = "") -> None:
    print(text, flush=True)


def show(engine: Engine, before: Dict[str, float]) -> None:
    after = engine.metrics()
    for name in HITS:
        say(f"    {name}  +{after.get(name, 0) - before.get(name, 0):.0f}")


def play(stage: Stage, tokens: int, rounds: int) -> bool:
    say(f"a controller, and two engines serving {stage.model} (about half a minute)")
    began = time.monotonic()
    stage.controller()
    one, two = stage.engines("one", "two")
    say(f"    ready after {time.monotonic() - began:.0f} s: {one.url}, {two.url}, controller http://localhost:{stage.http}")
    for engine in (one, two):
        engine.complete(list(range(97, 123)) * 3, 4)

    say("\n1. The prompt is tokenized by engine one, and served by it.")
    text = (WORDS * (tokens // len(WORDS) + 1))[:tokens]
    ids = one.tokenize(text)
    first = one.complete(ids, 16)
    stage.stored("one", ids)
    say(f"    {len(ids)} tokens computed: first token after {first.first_s * 1e3:.0f} ms; held at {stage.held(ids)}")

    say("\n2. Its KV is moved to engine two, ahead of any request.")
    answer = stage.move("one", "two", ids)
    end = answer["end"]
    say(f"    POST /move -> num_tokens {answer['num_tokens']}, event_id {answer['event_id']}, ended {end['state']}")
    say(f"    held at {stage.held(ids)}")

    say("\n3. Engine two serves it from moved KV.")
    before = two.metrics()
    moved = two.complete(ids, 16)
    say(f"    {moved.cached} of {len(ids)} tokens were not computed: first token after {moved.first_s * 1e3:.0f} ms")
    show(two, before)

    say("\n4. And as if it had never seen it (another cache_salt), and from its own cache.")
    cold = two.complete(ids, 16, salt="nothing has this")
    local = two.complete(ids, 16)
    say(f"    cold: first token after {cold.first_s * 1e3:.0f} ms; its own cache: {local.first_s * 1e3:.0f} ms")
    equal = cold.tokens == moved.tokens == first.tokens
    say(f"    16 tokens of one, of two from moved KV, and of two cold: {'the same' if equal else 'NOT the same'}")

    say("\n5. A router: engine two holds the prompt and is busy, so a copy goes to one.")
    router = Router(f"http://localhost:{stage.http}", {"one": one.url, "two": two.url})
    with router.serving("two"):
        choice = router.choose(ids)
    say(f"    {choice}")

    say("\n6. Time to first token, as a table.")
    say(table(measure(stage, "one", "two", [512, tokens], rounds), [512, tokens]))
    return equal and moved.cached == len(ids) - 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.vllm.demo", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = make("mid", Path("out/vllm/mid"))
    try:
        with Stage(Path("out/vllm/demo"), model) as stage:
            good = play(stage, args.tokens, args.rounds)
    except StageError as error:
        say(str(error))
        return 1
    say(f"\nlogs: out/vllm/demo; {CPU} is what the reference calls an instance's CPU memory")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
