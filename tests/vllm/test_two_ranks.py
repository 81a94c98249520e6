"""Tensor parallel 2: each rank has its own part of the KV under the same keys, and all of them move or none."""

from __future__ import annotations

from examples.vllm.stage import CPU, Stage
from tests.vllm.prompts import letters

TOKENS = 12
LENGTHS = (5, 12, 128, 255, 256, 257, 300, 700, 1024, 2500)


def test_prompts_from_moved_kv_and_who_may_have_it(stage: Stage) -> None:
    options = {"dtype": "float32", "ranks": 2, "kv_bytes": 128 << 20}
    pair = [stage.engine(name, core="0|1", **options) for name in ("one", "two")]  # type: ignore[arg-type]
    for engine in pair:
        engine.ready(f"{engine.url}/health")
        stage.registered(engine.name)
    one, two = pair
    found = stage.instance("one")
    assert found is not None and len(found["ranks"]) == 2
    prompts = [letters(n, n) for n in LENGTHS]
    right = [one.complete(prompt, TOKENS, salt="cold").tokens for prompt in prompts]
    for prompt in prompts:
        one.complete(prompt, 1)
        stage.stored("one", prompt)
        moved = stage.move("one", "two", prompt)
        assert (moved["num_tokens"], moved["end"]["state"]) == (len(prompt), "done")
    one.stop()
    for prompt, expected in zip(prompts, right):
        two.forget()
        answer = two.complete(prompt, TOKENS)
        assert (answer.cached, answer.tokens) == (len(prompt) - 1, expected), len(prompt)

    # One rank, or another dtype, is another kind of KV: refused, and both values said.
    three = stage.engine("three", core="0", dtype="bfloat16")
    three.ready(f"{three.url}/health")
    stage.registered("three")
    body = {"old_position": ["two", CPU], "new_position": ["three", CPU], "tokens": prompts[-1]}
    answer = stage.api.post("/move", json=body)
    assert answer.status_code == 409
    for said in ("ranks=2", "ranks=1", "float32", "bfloat16"):
        assert said in answer.text, answer.text
    assert stage.held(prompts[-1])["two"] == LENGTHS[-1]
