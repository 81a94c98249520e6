"""How fast chunks are gathered from an engine's blocks and scattered into others, beside a memory copy in the same run.

    pytest tests/bench/test_layout_speed.py --benchmark-enable -s

Chunks of 256 tokens of Llama-3.1-8B's KV (32 layers, 128 KiB a token), scattered over the blocks of an engine that has
64 of them; each round takes another chunk, so that little of it is still in a cache. On CUDA: the Triton kernel too.
"""

from __future__ import annotations

import itertools
import random
from typing import Any, Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the real world is not installed: no torch")

from kvreal.layout.bind import allocate  # noqa: E402
from kvreal.layout.gpu import Copier, why_not  # noqa: E402
from kvreal.layout.paged import Paged  # noqa: E402
from kvreal.layout.shape import Layout, Part, like  # noqa: E402
from tests.bench.rates import interleaved, table  # noqa: E402

KV = (Part("k", 8, 128, "bfloat16"), Part("v", 8, 128, "bfloat16"))
MLA = (Part("latent", 1, 512, "bfloat16"), Part("rope", 1, 64, "bfloat16"))
CHUNK = 256
LAYOUTS = {
    "K and V together, blocks of 16": like(KV, 32, 16, "part block token head channel"),
    "K and V together, blocks of 128": like(KV, 32, 128, "block part token head channel"),
    "K and V apart, blocks of 16": like(KV, 32, 16, "block token head channel"),
    "heads outside tokens, blocks of 16": like(KV, 32, 16, "part block head token channel"),
    "MLA, 61 layers, blocks of 64": like(MLA, 61, 64, "block token channel"),
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def chunks(layout: Layout, count: int) -> Iterator[int]:
    """First tokens of chunks, in an order that no cache likes."""
    order = [at * CHUNK for at in range(count)]
    random.Random(0).shuffle(order)
    return itertools.cycle(order)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_rates(name: str, device: str, request: pytest.FixtureRequest) -> None:
    full = request.config.getoption("--benchmark-enable")
    layout = LAYOUTS[name]
    count = 24 if full else 2
    size = CHUNK * layout.bytes_per_token
    blocks = count * CHUNK // layout.groups[0].block_tokens
    given = allocate(layout, [blocks], device)
    paged = Paged(layout, given)
    whole = torch.zeros(count * size, dtype=torch.uint8, device=device)
    slots = list(whole.split(size))
    order = list(range(blocks))
    random.Random(1).shuffle(order)
    starts = chunks(layout, count)
    where = itertools.cycle(range(count))

    def run(what: Any, tokens: int = CHUNK) -> None:
        start = next(starts)
        what([order], start, tokens, slots[next(where)][: tokens * layout.bytes_per_token])
        if device == "cuda":
            torch.cuda.synchronize()

    def memcpy() -> None:
        one = next(where)
        target, source = slots[one], slots[(one + count // 2) % count]
        if device == "cpu":
            np.copyto(target.numpy(), source.numpy())  # one thread, as gather and scatter are
        else:
            target.copy_(source)
            torch.cuda.synchronize()

    ways = {
        "memcpy": memcpy,
        "gather": lambda: run(paged.gather),
        "scatter": lambda: run(paged.scatter),
        "gather, all but one token": lambda: run(paged.gather, CHUNK - 1),
    }
    if device == "cpu":
        plain = Paged(layout, [list(group) for group in given], plain=True)
        ways["gather, torch"] = lambda: run(plain.gather)
        ways["scatter, torch"] = lambda: run(plain.scatter)
    why = why_not(paged)
    if not why:
        copier = Copier(paged)
        ways["gather, Triton"] = lambda: run(copier.gather)
        ways["scatter, Triton"] = lambda: run(copier.scatter)
    seconds = interleaved(ways, 40 if full else 1)
    kernel = f" (no kernel: {why})" if why else ""
    print(table(f"{name}, {device}: chunks of {size >> 10} KiB{kernel}", size, seconds, "memcpy"))
