"""A real model's KV, stored by one engine, moved, used by another: the output is that of a run never cut."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from pathlib import Path
from typing import Any, Iterator, List, Tuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvreal.checksum import Mismatch, compare, mode_of, sums
from kvreal.engines.transformers import EngineFull, Server, TransformersEngine
from kvreal.instance_file import read
from kvreal.layout.shape import LayoutError
from tests.real.engines.models import CHUNK, CPU, VOCABULARY, Pair, deepseek, llama, uncut
from tests.real.http.cluster import eventually

pytestmark = pytest.mark.real
AHEAD = 12
FRESH = itertools.count()
BLOCKS = 64
WAYS = {
    "llama": ("part block token head channel", "head block channel token part layer"),
    "deepseek": ("block token channel", "token block channel"),
}
"""How the first engine of a pair lays its blocks, and how the second does."""


def engines(kind: str) -> Tuple[TransformersEngine, TransformersEngine]:
    make = llama if kind == "llama" else deepseek
    one, other = WAYS[kind]
    return (
        TransformersEngine(make(), CHUNK, 8, BLOCKS, one, kind),
        TransformersEngine(make(), CHUNK, 32, BLOCKS // 2, other, kind),
    )


@pytest.fixture(scope="module", params=["llama", "deepseek"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    found = Pair(tmp_path_factory.mktemp(request.param))
    try:
        for name, engine in zip("ab", engines(request.param)):
            found.add(name, engine)
        yield found
        for server in found.servers.values():  # whatever happened: no block is lost, nobody waits for a chunk
            assert len(server.engine.free) == server.engine.paged.blocks[0] and not server.engine.there
    finally:
        found.close()


def words(seed: Any, count: int) -> List[int]:
    return [random.Random(f"{seed} {at}").randrange(VOCABULARY) for at in range(count)]


@pytest.mark.parametrize("count", [1, 2, 12, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 100])
def test_moved_kv_continues_as_if_never_cut(pair: Pair, count: int) -> None:
    """Tokens and logits, every bit; the source no longer has it, and never helps."""
    prompt = words(("moved", count), count)
    ids, logits = uncut(pair.servers["b"].engine, prompt, AHEAD)
    first = pair.serve("a", prompt, AHEAD)
    assert (first.loaded, first.stored) == (0, count) and first.tokens == ids and torch.equal(first.logits, logits)
    assert pair.move("a", "b", prompt)["state"] == "done"
    after = pair.serve("b", prompt, AHEAD)
    assert after.loaded == count and after.tokens == ids and torch.equal(after.logits, logits)
    assert pair.serve("a", prompt, 1, store=False).loaded == 0


def test_a_copy_serves_both(pair: Pair) -> None:
    prompt = words("copied", 40)
    ids, _ = uncut(pair.servers["a"].engine, prompt, AHEAD)
    pair.serve("a", prompt, 1)
    assert pair.move("a", "b", prompt, copy=True)["state"] == "done"
    for name in "ab":
        again = pair.serve(name, prompt, AHEAD)
        assert again.loaded == 40 and again.tokens == ids


def test_a_shared_prefix_is_used_and_no_more_of_it(pair: Pair) -> None:
    prompt = words("shared", 3 * CHUNK)
    pair.serve("a", prompt, 1)
    assert pair.move("a", "b", prompt)["state"] == "done"
    for tail, held in ((words("tail", 20), 3 * CHUNK), ([], 2 * CHUNK)):
        other = [*prompt[:held], *tail] if tail else [*prompt[: held + 5], *words("other", 9)]
        ids, logits = uncut(pair.servers["b"].engine, other, AHEAD)
        found = pair.serve("b", other, AHEAD)
        assert found.loaded == held and found.tokens == ids
        torch.testing.assert_close(found.logits, logits, rtol=1e-3, atol=1e-4)  # computed in other pieces


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 40), st.booleans())
def test_any_prompt_after_any_other(pair: Pair, count: int, shared: int, more: int, copy: bool) -> None:
    """One prompt is moved; the next begins as it does, for a while. Whatever b finds of it, its answer is as if never
    cut. Words are new each time: what an example before this one stored would be found, too."""
    fresh = next(FRESH)
    first = words((fresh, "first"), count)
    second = [*first[:shared], *words((fresh, "more"), max(more, shared == 0))]
    pair.serve("a", first, 1)
    pair.move("a", "b", first, copy)
    common = next((at for at, (x, y) in enumerate(zip(first, second)) if x != y), min(count, len(second)))
    for prompt, held in ((first, count), (second, count if second == first else common // CHUNK * CHUNK)):
        ids, logits = uncut(pair.servers["b"].engine, prompt, 4)
        found = pair.serve("b", prompt, 4, store=False)
        assert found.loaded == held and found.tokens == ids
        if held in (0, len(prompt)):
            assert torch.equal(found.logits, logits)  # nothing was computed in other pieces


def test_there_and_back_again(pair: Pair) -> None:
    """The bytes have been through both layouts, and what b adds goes to a."""
    prompt = words("back", 37)
    ids, logits = uncut(pair.servers["a"].engine, prompt, AHEAD)
    pair.serve("a", prompt, 1)
    pair.move("a", "b", prompt)
    longer = [*prompt, *ids]
    assert pair.serve("b", longer, 1).loaded == 2 * CHUNK  # the partial chunk's key is that of 37 tokens
    pair.move("b", "a", longer)
    expected, _ = uncut(pair.servers["a"].engine, longer, AHEAD)
    found = pair.serve("a", longer, AHEAD)
    assert found.loaded == len(longer) and found.tokens == expected


@pytest.mark.parametrize("mode", ["sample", "all"])
def test_one_corrupt_byte_changes_the_output_and_a_checksum_finds_it(pair: Pair, mode: str) -> None:
    """The comparisons above have teeth: they fail on what is planted here."""
    prompt = words(("corrupt", mode), 3 * CHUNK)
    _, logits = uncut(pair.servers["b"].engine, prompt, AHEAD)
    pair.serve("a", prompt, 1)
    keys, slots, sizes = pair.slots("a", prompt)
    there = sums(pair.memory("a"), CPU, slots, sizes, keys, mode_of(mode))
    pair.move("a", "b", prompt)
    keys, slots, sizes = pair.slots("b", prompt)
    memory = pair.memory("b")
    compare(memory, CPU, slots, sizes, keys, mode_of(mode), there)
    memory.view(CPU, slots[1], sizes[1])[sizes[1] // 2 + 3] ^= 0x40  # a float's exponent
    with pytest.raises(Mismatch, match=f"1 of 3 chunks have wrong bytes, the first is {keys[1].hex()[:16]}"):
        compare(memory, CPU, slots, sizes, keys, mode_of(mode), there)
    found = pair.serve("b", prompt, AHEAD, store=False)
    assert found.loaded == len(prompt) and not torch.equal(found.logits, logits)


def test_another_tenants_salt_finds_nothing(pair: Pair) -> None:
    prompt = words("salted", 20)
    pair.serve("a", prompt, 1, salt="one")
    assert pair.serve("a", prompt, 1, store=False, salt="two").loaded == 0
    assert pair.serve("a", prompt, 1, store=False).loaded == 0
    assert pair.serve("a", prompt, 1, store=False, salt="one").loaded == 20


def test_too_long_for_the_blocks_is_refused_and_costs_none(pair: Pair) -> None:
    with pytest.raises(EngineFull, match="blocks are needed, 64 are free"):
        pair.serve("a", words("long", BLOCKS * 8), 1)
    assert pair.serve("a", words("long", 3), 1).stored == 3


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_a_client_that_leaves_frees_no_block_that_is_still_written(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    server = pair.servers["a"]
    began, go_on = threading.Event(), threading.Event()
    real = server.engine.run

    def slowly(*args: Any) -> Any:
        began.set()
        assert go_on.wait(20)
        return real(*args)

    monkeypatch.setattr(server.engine, "run", slowly)
    before = len(server.engine.free)
    waiting = asyncio.run_coroutine_threadsafe(server.serve(words("left", 20), 1), pair.loop)
    assert began.wait(20)
    waiting.cancel()
    pair.run(turns(10))  # the loop has seen that it was cancelled
    assert len(server.engine.free) < before and server.turn.locked()
    go_on.set()
    eventually(lambda: len(server.engine.free) == before and not server.engine.there, 20, "all is free again")


def test_what_does_not_fit_the_slots_is_served_and_said(tmp_path: Path) -> None:
    """Room for one chunk: the answer is right, and that it was not stored whole is told."""
    engine = TransformersEngine(llama(), CHUNK, 8, BLOCKS)
    pair = Pair(tmp_path)
    try:
        pair.add("a", engine, f"{CHUNK * engine.layout.bytes_per_token} B")
        prompt = words("small", 40)
        found = pair.serve("a", prompt, AHEAD)
        assert found.tokens == uncut(engine, prompt, AHEAD)[0] and found.stored == CHUNK
        assert pair.serve("a", prompt, AHEAD, store=False).loaded == CHUNK
    finally:
        pair.close()


def test_other_weights_are_refused_by_name(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    try:
        for name, seed in (("a", 0), ("b", 1)):
            pair.add(name, TransformersEngine(llama(seed), CHUNK, 8, BLOCKS))
        prompt = words("weights", 20)
        pair.serve("a", prompt, 1)
        answer = pair.controller.move("a", "b", prompt)
        weights = [pair.locals[name].file.namespace.weights for name in "ab"]
        assert weights[0] != weights[1]
        assert answer.status_code == 409 and all(f"weights={one}" in answer.text for one in weights), answer.text
        assert pair.serve("a", prompt, 1, store=False).loaded == 20
    finally:
        pair.close()


def test_bytes_of_another_count_are_refused_at_once(tmp_path: Path) -> None:
    engine = TransformersEngine(llama(), CHUNK, 8, 8)
    assert engine.layout.form == "2 x (k 2x16 float32, v 2x16 float32)" and engine.layout.bytes_per_token == 512
    path = tmp_path / "a.yaml"
    path.write_text(
        f"chunk_size: {CHUNK}\nenable_controller: true\nlmcache_instance_id: a\n"
        "controller_pull_url: localhost:8300\nkvmove: {bytes_per_token: 1 KiB}\n"
    )
    with pytest.raises(LayoutError, match="the namespace has 1024 bytes a token"):
        Server(engine, None, read(path))  # type: ignore[arg-type]
    mla = TransformersEngine(deepseek(), CHUNK, 8, 8, "block token channel")
    assert mla.layout.form == "3 x (k 1x24 float32, v 1x8 float32)"


def test_a_model_that_keeps_something_else_is_refused() -> None:
    """A window's layers forget: their KV is not that of the whole prompt."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(LayoutError, match="layer 0 of tiny keeps its KV in a DynamicSlidingWindowLayer, expected full"):
        TransformersEngine(MistralForCausalLM(config), CHUNK, 8, 8)
