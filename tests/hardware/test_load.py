"""Sustained load: prompts go to and fro, again and again, and the processes stay as large as they were."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvreal.pool import Pool
from kvreal.run import run
from tests.hardware.found import KINDS, LAYOUTS, Asked, need
from tests.hardware.plays import scenario, sound, unreached

pytestmark = [pytest.mark.real, pytest.mark.hardware, pytest.mark.timeout(600)]

GROWTH_BYTES = 32 << 20
"""Of all processes together, from the second quarter of the load to its last."""
TURNS = 8


def resident(pids: list[int]) -> int:
    """Bytes that these processes have in memory, together; what several share counts for each."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1]) << 10
    return total


def opened(pids: list[int]) -> int:
    """File descriptors and threads of these processes."""
    return sum(len(list(Path(f"/proc/{pid}/{what}").iterdir())) for pid in pids for what in ("fd", "task"))


def test_memory_stays_flat(
    transport: str, want: Asked, pool_of: Callable[[str], Pool], note: Callable[..., None], tmp_path: Path
) -> None:
    need(transport)
    layout, cpu = LAYOUTS[0], KINDS["cpu"]
    tokens = (8 if want.quick else 32) * layout.chunk_tokens + 7
    steps = f"\n  - store: {{at: a/{cpu}, prompt: p, tokens: {tokens}}}\n"
    for turn in range(TURNS):
        here, there = ("a", "b") if turn % 2 == 0 else ("b", "a")
        steps += f"  - move: {{from: {here}/{cpu}, to: {there}/{cpu}, prompt: p, as: m{turn}}}\n"
    steps += f"  - use: {{at: a/{cpu}, prompt: p, as: used}}\n"
    built = scenario(steps, {name: {cpu: tokens} for name in "ab"}, layout)
    pool = pool_of(transport)
    sizes: list[int] = []
    handles: list[int] = []
    moves = nbytes = 0
    began = time.monotonic()
    while time.monotonic() - began < want.load_s or len(sizes) < 8:
        log = tmp_path / "log"
        result = run(built, pool=pool, history=log)
        unreached(result)
        if not sizes:
            sound(result, log)
        assert result.clean, (result.violations, result.hung)
        ended = [one for one in result.operations if one.what == "move"]
        assert all(one.state == "done" and one.num_tokens == tokens for one in ended) and len(ended) == TURNS
        moves += len(ended)
        nbytes += int(result.metrics["bytes_copied"])
        pids = [host.pid for host in pool.all]
        sizes.append(resident(pids))
        handles.append(opened(pids))
    quarter = len(sizes) // 4
    early, late = statistics.median(sizes[quarter : 2 * quarter]), statistics.median(sizes[-quarter:])
    assert late - early < GROWTH_BYTES, f"{len(pids)} processes grew from {early:,.0f} to {late:,.0f} bytes"
    # The least of several looks: what was closed just now may still be there.
    assert min(handles[-quarter:]) <= min(handles[quarter : 2 * quarter]) + len(pids) - 1, handles
    seconds = time.monotonic() - began
    note(
        transport=transport, what="load", moves=moves, seconds=round(seconds, 1), MiB=nbytes >> 20,
        processes=len(pids), resident_MiB=round(late / 2**20, 1), growth_MiB=round((late - early) / 2**20, 2),
    )  # fmt: skip
