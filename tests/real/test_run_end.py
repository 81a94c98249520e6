"""A run's history ends where the run does: looking at all memory afterwards takes longer than others wait for a sign of
life, and who is expelled meanwhile would seem to have left something open."""

from __future__ import annotations

from pathlib import Path

import pytest

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
