"""In bfloat16 any hit is computed on in other pieces than cold: moved KV is held to what vLLM's own cache does."""

from __future__ import annotations

from examples.vllm.stage import Stage
from tests.vllm.prompts import fifty

TOKENS = 16
SLACK = 2
"""Prompts of fifty in which chance may be against moved KV."""


def test_moved_is_as_good_as_local(stage: Stage) -> None:
    one, two = stage.engines("one", "two", dtype="bfloat16")
    moved = local = 0
    firsts = {"moved": 0, "local": 0}
    for number, prompt in enumerate(fifty()):
        cold = one.complete(prompt, TOKENS, salt=f"cold {number}").tokens
        one.complete(prompt, 1)
        stage.stored("one", prompt)
        stage.move("one", "two", prompt, copy=True)
        two.forget()
        from_moved = two.complete(prompt, TOKENS)
        assert from_moved.cached == len(prompt) - 1
        from_local = two.complete(prompt, TOKENS)  # a whole block less, or (less than one block) moved KV again
        moved += from_moved.tokens == cold
        local += from_local.tokens == cold
        firsts["moved"] += from_moved.tokens[0] == cold[0]
        firsts["local"] += from_local.tokens[0] == cold[0]
    print(f"of 50 equal to cold: {moved} from moved KV, {local} from vLLM's own cache; first tokens: {firsts}")
    assert moved >= local - SLACK
    assert firsts["moved"] >= firsts["local"] - SLACK
