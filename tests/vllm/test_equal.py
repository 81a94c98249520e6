"""What an engine says from moved KV is what it says when it computes everything itself."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from examples.vllm.stage import Engine, Stage
from tests.vllm.prompts import fifty, letters

TOKENS = 16


@pytest.fixture(scope="module")
def two(stage: Stage) -> list[Engine]:
    return stage.engines("one", "two", dtype="float32")


def cold(engine: Engine, prompts: list[list[int]], label: str) -> list[list[int]]:
    """Each under a salt of its own: neither vLLM nor we have anything under that."""
    found = []
    for i, prompt in enumerate(prompts):
        answer = engine.complete(prompt, TOKENS, salt=f"{label} {i}")
        assert answer.cached == 0
        found.append(answer.tokens)
    return found


def test_fifty_prompts_after_their_source_has_gone(stage: Stage, two: list[Engine]) -> None:
    one, other = two
    prompts = fifty()
    expected = cold(one, prompts, "cold")
    for prompt in prompts:
        one.complete(prompt, 1)
        stage.stored("one", prompt)
        assert stage.move("one", "two", prompt, copy=True)["end"]["state"] == "done"
        assert stage.held(prompt)["two"] == len(prompt)
    before = other.metrics()
    one.stop()
    wrong = []
    cached = 0
    for prompt, right in zip(prompts, expected):
        other.forget()  # each by what was moved, none by what vLLM still has of the one before
        answer = other.complete(prompt, TOKENS)
        assert answer.cached == len(prompt) - 1, (len(prompt), answer.cached)
        cached += answer.cached
        if answer.tokens != right:
            wrong.append((len(prompt), answer.tokens, right))
    assert not wrong
    after = other.metrics()
    name = 'kvmove_engine_loaded_tokens_total{source="moved",tier="LocalCPUBackend"}'
    assert after[name] - before.get(name, 0) == cached
    assert after["vllm:external_prefix_cache_hits_total"] - before["vllm:external_prefix_cache_hits_total"] == cached


def test_a_longer_prompt_finds_the_tail_of_a_shorter_one(stage: Stage, two: list[Engine]) -> None:
    other = two[1]
    short = letters(500, 300)
    long = [*short, *letters(501, 250)]
    (right,) = cold(other, [long], "long")
    other.complete(short, 1)
    stage.stored("two", short)
    other.forget()
    answer = other.complete(long, TOKENS)
    assert answer.cached == 300
    assert answer.tokens == right


def test_what_vllm_has_itself_is_not_loaded(stage: Stage, two: list[Engine]) -> None:
    other = two[1]
    prompt = letters(503, 300)
    right = other.complete(prompt, TOKENS)
    stage.stored("two", prompt)
    name = 'kvmove_engine_loaded_tokens_total{source="stored",tier="LocalCPUBackend"}'
    before = other.metrics().get(name, 0)
    again = other.complete(prompt, TOKENS)
    assert (again.tokens, again.cached) == (right.tokens, 299)
    assert other.metrics()[name] - before == 43  # two blocks of 128 are vLLM's own, and the last token is computed


def test_a_corrupted_chunk_is_seen(stage: Stage, two: list[Engine]) -> None:
    """The comparison has teeth: bytes that are turned over in the slab make other tokens."""
    other = two[1]
    prompt = letters(502, 500)
    right = other.complete(prompt, TOKENS).tokens
    stage.stored("two", prompt)
    other.forget()
    assert other.complete(prompt, TOKENS).tokens == right
    with slab(stage, "two") as memory:
        spoil(memory)
        other.forget()
        assert other.complete(prompt, TOKENS).tokens != right
        spoil(memory)
    other.forget()
    assert other.complete(prompt, TOKENS).tokens == right


def slab(stage: Stage, name: str) -> mmap.mmap:
    """The memory of an instance's rank, as its process has it open."""
    (pid,) = stage.processes[name].pids("engines.vllm.rank")
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if "kvreal-slab" in os.readlink(entry):
            with open(entry, "r+b") as file:
                return mmap.mmap(file.fileno(), 0)
    raise AssertionError("the rank has no slab")


def spoil(memory: mmap.mmap) -> None:
    """Turn over a bit in every 32nd byte (an exponent's, in float32) of what was written; twice is never."""
    for start in range(4096, len(memory), 1 << 20):
        piece = bytearray(memory[start : start + (1 << 20)])
        if any(piece):
            piece[3::32] = bytes(byte ^ 0x04 for byte in piece[3::32])
            memory[start : start + len(piece)] = bytes(piece)

