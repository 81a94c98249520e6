"""The exhaustive search: clean with every rule on, and it finds what a rule guards against once that is off."""

from __future__ import annotations

import msgspec
import pytest

from kvcore.scenario.search.cases import CASES
from kvcore.scenario.search.explore import Explorer
from kvcore.scenario.search.run import find_case, search, summary

STATES = 4000
"""A few seconds a world; ``make search`` goes on to where there is nothing more to see."""

#: a rule switched off, the world whose search must notice, and the property that it breaks
PLANTED = [
    ("h02", "crossing-both", "Loss"),
    ("h03", "crossing", "Loss"),
    ("h09", "one-move-evict-store", "Byte"),
    ("h12", "push-reuse", "Byte"),
    ("h18", "one-move-crash-destination", "Loss"),
    ("h16", "shared-prefix", "Shared"),
]


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_nothing_is_violated(name: str) -> None:
    found = search(name, STATES)
    print(summary(found))
    assert not found.violations, "\n".join([str(found.violations[0]), *found.trace])
    assert not found.missing, f"not met: {found.missing}; met: {found.reached}"


@pytest.mark.parametrize(("rule", "name", "violated"), PLANTED)
def test_a_planted_bug_is_found(rule: str, name: str, violated: str) -> None:
    found = search(name, 20_000, (rule,))
    assert violated in {violation.property for violation in found.violations}, summary(found)
    assert found.trace, "a violation comes with the steps that lead to it"


def test_an_event_that_is_not_met_fails() -> None:
    case = msgspec.structs.replace(find_case("twice"), reach=("no such event",))
    found = Explorer(case).run(200)
    assert found.missing == ("no such event",)
    assert not found.ok
