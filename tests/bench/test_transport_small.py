"""Every transport that is here in the small: one copy between two processes, no protocol. Saved and compared by
`make bench-compare`; `kvmove bench` measures whole moves beside their limits.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("zmq")

from kvreal.transfer import available
from kvreal.transfer.conformance import Pair

pytestmark = pytest.mark.real

KIB = 1 << 10
#: name -> (chunks, tokens of a chunk, bytes of a token)
SHAPES = {
    "12 tokens": (1, 12, 128 * KIB),
    "64 MiB in 8 MiB": (8, 64, 128 * KIB),
    "16 MiB in 16 KiB": (1024, 1, 16 * KIB),
}


@pytest.mark.parametrize("read", [True, False], ids=["read", "push"])
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("transport", available())
def test_a_copy(benchmark: Any, transport: str, shape: str, read: bool) -> None:
    chunks, tokens, token_bytes = SHAPES[shape]
    pair = Pair(transport, {})
    try:
        pair.begin(tokens, chunks, token_bytes)
        pairs = [(number, number) for number in range(chunks)]

        def copy() -> None:
            pair.copy(read, pairs)
            (end,) = pair.ends_of(read, 1)
            assert end["state"] == "done", end

        benchmark.pedantic(copy, rounds=20, warmup_rounds=3)
        assert set(pair.check_all(pairs)) == {-1}
    finally:
        pair.close()
    if benchmark.stats is not None:
        rate = chunks * tokens * token_bytes / benchmark.stats.stats.median
        benchmark.extra_info["gb_per_s"] = round(rate / 1e9, 3)
