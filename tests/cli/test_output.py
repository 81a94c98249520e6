"""Numbers as people read them, and the one line that a wrong choice gets."""

from __future__ import annotations

import sys

import pytest

from kvmove.errors import UserError, line_for
from kvmove.output import choice, duration, percent, plural, size, transport_names


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (-1, "-"),
        (0, "0 ns"),
        (999, "999 ns"),
        (1_000, "1.00 us"),
        (12_340, "12.3 us"),
        (999_600, "1.00 ms"),
        (184_000_000, "184 ms"),
        (61_000_000_000, "61.0 s"),
        (3_600_000_000_000, "3600 s"),
    ],
)
def test_duration(ns: int, text: str) -> None:
    assert duration(ns) == text


def test_size_percent_plural() -> None:
    assert [size(512 << 20), size(1536), size(1023)] == ["512 MiB", "1.5 KiB", "1023 B"]
    assert [percent(None), percent(0.123), percent(-0.5), percent(42.0)] == ["-", "+12%", "-50%", "x43"]
    assert [plural(1, "move"), plural(2000, "move")] == ["1 move", "2,000 moves"]


def test_a_wrong_choice_names_the_nearest() -> None:
    assert choice("--on", "sim", ("sim", "real")) == "sim"
    with pytest.raises(UserError, match=r"^--on reel: expected one of sim, real; did you mean real\?$"):
        choice("--on", "reel", ("sim", "real"))


def test_known_errors_are_one_line_and_bugs_are_not_hidden() -> None:
    class ScenarioError(ValueError):
        pass

    assert line_for(ScenarioError("a.yaml:3:2: what")) == "a.yaml:3:2: what"
    assert line_for(FileNotFoundError(2, "No such file or directory", "x.yaml")) == "x.yaml: No such file or directory"
    assert line_for(OSError("port 4 in use")) == "port 4 in use"
    assert line_for(ValueError("a bug")) is None


def test_without_the_real_world_the_transports_have_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = pytest.importorskip("kvreal.transfer").NAMES
    monkeypatch.setitem(sys.modules, "kvreal.transfer", None)
    assert transport_names() == ours
