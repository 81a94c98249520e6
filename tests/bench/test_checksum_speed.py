"""What checksums cost a GB of chunks, at one end, beside a memory copy and crc32c in the same run.

    pytest tests/bench/test_checksum_speed.py --benchmark-enable -s
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvreal.checksum import MODES, mode_of, sums
from kvreal.memory import Memory
from tests.bench.rates import interleaved, table

CPU = "LocalCPUBackend"


@pytest.mark.parametrize("chunk_kib", [16, 1024, 8192])
def test_cost_of_each_mode(chunk_kib: int, request: pytest.FixtureRequest) -> None:
    full = request.config.getoption("--benchmark-enable")
    size = chunk_kib << 10
    slots = max(1, (512 << 20 if full else 16 << 20) // size)
    memory = Memory()
    memory.lay_out([(CPU, slots)], size)
    whole = memory.slabs()[0].bytes[4096 : 4096 + slots * size]
    whole[:] = np.random.default_rng(0).integers(0, 256, len(whole), dtype=np.uint8)
    target = np.empty_like(whole)
    keys = [random.Random(at).randbytes(32) for at in range(slots)]
    numbers, sizes = list(range(slots)), [size] * slots
    ways = {"memcpy": lambda: np.copyto(target, whole)}
    for mode in MODES:
        ways[f"checksums: {mode}"] = lambda mode=mode: sums(memory, CPU, numbers, sizes, keys, mode_of(mode))
    try:
        import google_crc32c
    except ImportError:
        print("\ncrc32c is not measured: google-crc32c is not installed")
    else:
        copies = [memory.view(CPU, at, size).tobytes() for at in numbers]  # it takes nothing but bytes
        ways["crc32c of copies, one thread"] = lambda: [google_crc32c.value(copy) for copy in copies]
    seconds = interleaved(ways, 15 if full else 1)
    print(table(f"{slots} chunks of {chunk_kib} KiB", slots * size, seconds, "memcpy"))
