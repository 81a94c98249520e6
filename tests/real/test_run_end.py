"""A run's history ends where the run does: looking at all memory afterwards takes longer than others wait for a sign of
life, and who is expelled meanwhile would seem to have left something open."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvreal.arena import ArenaError, join
from kvreal.pool import Pool
from kvreal.session import Session
from tests.real.scenarios import scenario

pytestmark = pytest.mark.real


def test_nothing_happens_after_it(pool: Pool, tmp_path: Path) -> None:
    built = scenario()
    session = Session(built, pool, tmp_path, built.deadline_ns)
    try:
        session.start()
        session.play()
        session.verify(wipe=True)
        files = [path for _, path in session.histories]
        before = [path.stat().st_size for path in files]
        session.idle(5 * built.config.beat_ns / 1e9)  # beats fall due, and are not the run's any more
        assert len(files) == 4 and [path.stat().st_size for path in files] == before
        session.release()
        assert all(seat.idle for seat in session.seats.values()), "the processes serve the next run"
    finally:
        session.abandon()


def test_an_arena_that_cannot_be_had_leaves_no_folder(tmp_path: Path) -> None:
    """But one that others are in stays theirs."""
    folder = tmp_path / "arena"
    with pytest.raises(ArenaError, match="does not fit"):
        join(str(folder), "one", 4096, 1 << 60)
    assert not folder.exists()
    member = join(str(folder), "two", 4096, 8 * 4096)
    with pytest.raises(ArenaError, match="this process asks for 4"):
        join(str(folder), "three", 4096, 4 * 4096)
    member.lay_out(8)
    assert member.offset(7) >= 0
    member.leave()
    assert not folder.exists()
