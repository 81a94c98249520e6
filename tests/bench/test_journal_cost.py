"""What a journal's record costs, by durability: a Begin of 16 chunks, its Decide, its Outcome with details.

Each move is three records (a fourth, Promised, where it has an idempotency key). ``power`` is as slow as the disk's
flush, so the figure says something of this disk only.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from kvcore.protocol.machine import Begin, Decide, Outcome
from kvcore.protocol.messages import MoveRequest
from kvreal.journal import Journal
from kvreal.journal_sqlite import open_journal

KEYS = tuple(bytes([n]) * 32 for n in range(16))
REQUEST = MoveRequest("op", ("a", "LocalCPUBackend"), ("b", "LocalCPUBackend"), KEYS, (256,) * 16)


@pytest.mark.parametrize("durability", ["process", "power", "lines"])
def test_three_records_of_a_move(benchmark: Any, tmp_path: Path, durability: str) -> None:
    """``lines``: the JSON lines that scenarios use, without a lock, a checksum, details or pruning."""
    path = tmp_path / "j.db"
    journal: Any = Journal(path) if durability == "lines" else open_journal(path, durability, 3600 * 10**9, 10_000)[0]
    numbers = itertools.count(1)

    def move() -> None:
        number = next(numbers)
        journal.append(Begin(number, REQUEST))
        journal.append(Decide(number, 16, 4096, (("a/0", (1, 2)),), (("b/0", (3, 4)),), True))
        if durability != "lines":
            journal.keep(number, b"x" * 400)
        journal.append(Outcome(number, "done", "", 4096, 16))

    benchmark.pedantic(move, rounds=50 if durability == "power" else 5000, warmup_rounds=5)
    each_us = benchmark.stats.stats.median * 1e6 / 3
    benchmark.extra_info["record_us"] = round(each_us, 1)
    print(f"\njournal, durability {durability}: {each_us:,.1f} us a record (median)")
    journal.close()


def test_replaying_ten_thousand_moves(benchmark: Any, tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    journal, _ = open_journal(path, "process", 3600 * 10**9, 10_000)
    for number in range(10_000):
        journal.append(Begin(number, REQUEST))
        journal.append(Outcome(number, "done", "", 4096, 16))
    journal.close()

    def opened() -> None:
        found, records = open_journal(path, "process", 3600 * 10**9, 10_000)
        assert len(records) == 20_000
        found.close()

    benchmark.pedantic(opened, rounds=3)
    print(f"\njournal: 10,000 moves opened, checked and read in {benchmark.stats.stats.median * 1e3:,.0f} ms")
