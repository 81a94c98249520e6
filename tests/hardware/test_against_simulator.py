"""What happens on this machine is what the simulator says: equal answers, equal placement, equal effects when each
node's log is replayed, no property violated in either world. Times stand beside one another, and nothing is asserted
of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmove.play import Player, prepare
from tests.hardware.found import WAYS, Asked, need, way

pytestmark = [pytest.mark.real, pytest.mark.hardware, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "smoke/move.yaml",
    "smoke/prompt-4k.yaml",
    "smoke/tensor-parallel.yaml",
    "smoke/shared-prefix.yaml",
    "smoke/copy-and-lookup.yaml",
    "smoke/restart.yaml",
    "faults/copy-fails.yaml",
    "faults/copy-fails-push.yaml",
    "faults/copy-corrupt.yaml",
    "faults/copy-stuck.yaml",
    "faults/crash-destination.yaml",
    "faults/crash-source-pushing.yaml",
    "faults/drop-committed.yaml",
    "faults/pause-destination.yaml",
    "faults/full-destination.yaml",
)


def wanted(name: str, params: dict[str, Any], want: Asked) -> bool:
    """Not twice over one transport. Quick: a few files."""
    return params["transport"] not in WAYS and (not want.quick or params["file"] in FILES[:2])


@pytest.fixture(scope="module")
def player_of() -> Iterator[Callable[[str], Player]]:
    found: dict[str, Player] = {}

    def get(transport: str) -> Player:
        if transport not in found:
            while found:
                found.popitem()[1].__exit__(None, None, None)
            found[transport] = Player(("sim", "real"), transport=way(transport)[0])
        return found[transport]

    yield get
    for player in found.values():
        player.__exit__(None, None, None)


@pytest.mark.parametrize("file", FILES)
def test_both_worlds(
    file: str, transport: str, player_of: Callable[[str], Player], note: Callable[..., None],
    tmp_path: Path,
) -> None:  # fmt: skip
    need(transport)
    played = player_of(transport).play(prepare(str(ROOT / "scenarios" / file)), tmp_path / "log")
    if played.skipped:
        pytest.skip(played.skipped)
    assert played.comparison is not None and played.replay is not None
    assert played.replay.equal, played.replay.differs
    assert played.comparison.outcome.equal, played.comparison.outcome.differs
    for world, result in played.results.items():
        assert not played.unexpected(world) and not result.hung, (world, result.violations, result.hung)
        assert not played.failures[world], (world, played.failures[world])
    times = {
        one.op: {"predicted_ms": round(one.predicted_ns / 1e6, 3), "measured_ms": round(one.measured_ns / 1e6, 3)}
        for one in played.comparison.time
    }
    note(transport=transport, what="both worlds", file=file, times=times)
