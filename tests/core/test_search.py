"""The exhaustive search: clean with every rule on, and it finds what a rule guards against once that is off."""

from __future__ import annotations

from typing import Tuple

import msgspec
import pytest

from kvcore.scenario.search.cases import CASES
from kvcore.scenario.search.explore import Explorer
from kvcore.scenario.search.run import find_case, search, summary

STATES = 3000
"""A few seconds a world; ``make search`` goes on to where there is nothing more to see."""

#: rules switched off (a second one where it guards the same run), the world that must notice, the property that breaks
PLANTED = [
    (("h01",), "two-ranks-cancel", "Loss"),
    (("h02", "h34"), "crossing-both", "Loss"),
    (("h07",), "two-keys", "Truth"),
    (("h09",), "one-move-evict-store", "Byte"),
    (("h12",), "one-move", "Free"),
    (("h13",), "push-reuse", "Free"),
    (("h13",), "steps-push-reuse", "Free"),
    (("h14",), "push-reuse", "Free"),
    (("h15", "h34"), "crossing-lapse", "Loss"),
    (("h16",), "shared-prefix", "Shared"),
    (("h20",), "one-move-clear", "View"),
]


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_nothing_is_violated(name: str) -> None:
    found = search(name, STATES)
    print(summary(found))
    assert not found.violations, "\n".join([str(found.violations[0]), *found.trace])
    assert not found.missing, f"not met: {found.missing}; met: {found.reached}"


@pytest.mark.parametrize(("rules", "name", "violated"), PLANTED)
def test_a_planted_bug_is_found(rules: Tuple[str, ...], name: str, violated: str) -> None:
    found = search(name, 20_000, rules)
    assert violated in {violation.property for violation in found.violations}, summary(found)
    assert found.trace, "a violation comes with the steps that lead to it"


def test_an_event_that_is_not_met_fails() -> None:
    case = msgspec.structs.replace(find_case("twice"), reach=("no such event",))
    found = Explorer(case).run(200)
    assert found.missing == ("no such event",)
    assert not found.ok
