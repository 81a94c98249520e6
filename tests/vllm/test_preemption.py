"""An engine with too little KV takes blocks from running requests: what is stored and loaded meanwhile stays right."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from examples.vllm.stage import Stage
from tests.vllm.prompts import letters

TOKENS = 300


def test_requests_that_lose_their_blocks(stage: Stage) -> None:
    # 1 KiB of KV a token: room for 9,216 tokens, asked for by eight requests of up to 1,800.
    (one,) = stage.engines("one", dtype="float32", kv_bytes=9 << 20)
    prompts = [letters(i, 1500 - 100 * (i % 3)) for i in range(8)]
    right = [one.complete(prompt, TOKENS, salt=f"cold {i}").tokens for i, prompt in enumerate(prompts)]
    for _ in range(3):  # first all is stored, then all is loaded, and preempted on the way
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda prompt: one.complete(prompt, TOKENS), prompts))
        assert [answer.tokens for answer in answers] == right
        one.forget()
    assert one.metrics()["vllm:num_preemptions_total"] > 0
    for prompt in prompts:
        stage.stored("one", prompt)
    for prompt, expected in zip(prompts, right):
        one.forget()
        answer = one.complete(prompt, TOKENS)
        assert (answer.cached, answer.tokens) == (len(prompt) - 1, expected)
    stage.until(lambda: one.metrics()["vllm:kv_cache_usage_perc"] == 0, "no block is kept for ever")
