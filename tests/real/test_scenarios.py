"""Scenario files on real processes, compared with their simulation as ``kvmove run --on both`` compares them.

Those that take long (mostly because a node must be found dead) run in ``make scenarios-real``, all of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterator

import pytest

from kvmove.play import Player, prepare
from kvreal.pool import Pool
from tests.scenario_files import ROOT, files, idle_faults

pytestmark = pytest.mark.real

#: More than about 1.2 s of waiting each.
LONG = {
    "faults": (
        "copy-stuck",
        "copy-stuck-halfway-push",
        "crash-controller-begun",
        "crash-controller-decided",
        "crash-destination",
        "crash-rank",
        "crash-source",
        "crash-source-pushing",
        "delay-release",
        "drop-alive",
        "drop-end",
        "drop-expelled",
        "drop-peer-gone",
        "drop-probe",
        "drop-suspect",
        "full-for-a-while",
        "partition-both-ways",
        "partition-one-way",
        "partition-other-way",
        "partition-source",
        "pause-source",
    ),
    "field": (
        "f03-late-consumer",
        "f17-cleanup-by-timers-alone",
        "f19-pending-for-ever",
        "f21-sender-fails-often",
        "f25-idle-and-reaped",
    ),
    "prior-art": (
        "01-destination-restarts",
        "05-one-rank-is-dead",
        "06-controller-is-killed",
        "07-the-client-gave-up",
        "12-after-a-timeout",
        "13-source-crashes",
    ),
}
LONG_FILES = {f"scenarios/{folder}/{name}.yaml" for folder, names in LONG.items() for name in names}


def cases() -> list[object]:
    everything = bool(os.environ.get("KVMOVE_REAL_ALL"))
    unasked = pytest.mark.skipif(not everything, reason="a long one: make scenarios-real")
    return [
        pytest.param(path, marks=(pytest.mark.slow, unasked)) if path in LONG_FILES else path for path in files()
    ]


@pytest.fixture(scope="module")
def player(pool: Pool) -> Iterator[Player]:
    """On the processes that the other tests of the real world use, too."""
    player = Player(("sim", "real"), transport=pool.transport)
    assert player.fleet is not None
    player.fleet.pool.close()  # its own, which has started nobody yet
    player.fleet.pool = pool
    yield player


def test_the_long_ones_exist() -> None:
    assert set(files()) >= LONG_FILES


@pytest.mark.parametrize("path", cases())
def test_both_worlds_agree(path: str, player: Player, tmp_path: Path) -> None:
    played = player.play(prepare(str(ROOT / path)), tmp_path / "history")
    assert played.failures["sim"] == []
    if played.skipped:
        pytest.skip(played.skipped)
    real = played.results["real"]
    assert real.hung == []
    assert played.unexpected("real") == []
    assert played.failures["real"] == []
    assert played.replay is not None and played.replay.equal, played.replay
    assert played.comparison is not None and played.comparison.outcome.equal, played.comparison.outcome.differs
    assert played.good
    assert idle_faults(played.scenario.faults, real) == []
