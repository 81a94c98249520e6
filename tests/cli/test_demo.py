"""``kvmove demo``: what `make demo` shows to somebody who sees the project for the first time."""

from __future__ import annotations

import sys

import pytest

from kvmove.cli import call
from kvmove.demo import NEXT, SCENARIOS, scenarios_directory


@pytest.mark.real
def test_the_demo_tells_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["demo"]) == 0
    out, _ = capsys.readouterr()
    for name in SCENARIOS:
        assert f"scenarios/{name}" in out
    assert "carried by nixl" in out or "carried by tcp" in out
    assert "at once: 12 tokens, event 1-1" in out
    assert "512 MiB compared with what was stored" in out
    assert out.count("equal effects each time") == out.count("answers and final placement: equal") == len(SCENARIOS)
    assert all(phase in out for phase in ("control", "queue", "copy", "commit", "predicted", "measured", "error"))
    assert all(what in out for _, what in NEXT)
    assert "predicted by " in out and "kvmove calibrate" in out
    assert "\x1b" not in out


def test_without_the_real_world_the_demo_says_so_and_simulates(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)  # as if it were not there
    assert call(["demo"]) == 0
    out, _ = capsys.readouterr()
    assert "the real world cannot run here: pyzmq not installed (pip install 'kvmove[real]'); it is skipped" in out
    assert "at once: 12 tokens, event 1-1" in out
    assert call(["run", str(scenarios_directory() / SCENARIOS[0]), "--on", "real"]) == 2
    assert "pyzmq not installed" in capsys.readouterr()[1]
