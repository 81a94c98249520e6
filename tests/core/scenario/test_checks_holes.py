"""Each rule's run with the checkers watching: clean with the rule, and without it what it guards breaks."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import pytest

from kvcore.scenario.check_world import Watch, attach
from tests.core import drive, test_holes_1, test_holes_2, test_holes_3

#: rule -> the first property that its run breaks
BREAKS: Dict[str, str] = {
    "h01": "Loss",
    "h02": "Loss",
    "h03": "Loss",
    "h04": "Loss",
    "h05": "Loss",
    "h06": "Loss",
    "h07": "Truth",
    "h08": "Truth",
    "h09": "Byte",
    "h10": "Byte",
    "h11": "Byte",
    "h12": "Free",
    "h13": "Byte",
    "h13c": "Byte",
    "h14": "Byte",
    "h15": "Loss",
    "h16": "Shared",
    "h18": "Known",
    "h19": "Truth",
    "h20": "Clear",
    "h21": "Loss",
    "h24": "Known",
    "h25": "Truth",
    "h27": "Byte",
    "h28": "Truth",
    "h33": "Retention",
    "h34": "Loss",
    "h35": "Loss",
    "h36": "Loss",
    "h37": "Loss",
    "h39": "Loss",
    "h40": "Loss",
}

#: what is seen once quiet only, or (h23, h26) is no violation of a property at all
QUIET = ("h22", "h23", "h26", "h29", "h30", "h31", "h32", "h38")

RUNS: Dict[str, Callable[[str], None]] = {
    name: run
    for module in (test_holes_1, test_holes_2, test_holes_3)
    for name, run in vars(module).items()
    if name.startswith("test_h")
}


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> List[Watch]:
    """The watches of all stories that are told in this test."""
    made: List[Watch] = []
    build = drive.Story.__init__

    def watched(self: drive.Story, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        made.append(attach(self))

    monkeypatch.setattr(drive.Story, "__init__", watched)
    return made


@pytest.mark.parametrize("name", sorted(RUNS))
def test_clean_with_the_rule(name: str, watches: List[Watch]) -> None:
    RUNS[name]("on")
    assert [watch.checker.violations for watch in watches] == [[]]


@pytest.mark.parametrize("name", sorted(RUNS))
def test_caught_without_it(name: str, watches: List[Watch]) -> None:
    rule = name.split("_")[1]
    RUNS[name]("off")
    (watch,) = watches
    found = [violation.property for violation in watch.checker.violations]
    if rule in QUIET:
        assert not found
    else:
        assert found and found[0] == BREAKS[rule], watch.checker.violations


def test_every_rule_is_judged() -> None:
    rules = {name.split("_")[1] for name in RUNS}
    assert rules == set(BREAKS) | set(QUIET)
