"""Every row of the reference's faults has a test against real processes that is named after it."""

from __future__ import annotations

import re

from tests.scenario_files import ROOT, files

ROWS = range(1, 28)


def test_every_row_has_a_named_test() -> None:
    named: set[int] = set()
    for path in sorted((ROOT / "tests" / "real").rglob("test_*.py")):
        for name in re.findall(r"def test_prior_art_(\w+)", path.read_text()):
            numbers = re.match(r"\d\d(_and_\d\d)*", name)
            named.update(int(number) for number in re.findall(r"\d\d", numbers[0] if numbers else ""))
    assert sorted(set(ROWS) - named) == []


def test_most_rows_are_scenarios_too() -> None:
    """The rest (15, 17, 18, 20, 22) are not of the protocol but of what is around it."""
    said = " ".join((ROOT / path).read_text() for path in files("prior-art"))
    lists = re.findall(r"Prior art ([\d, and]+)", said)
    rows = {int(number) for found in lists for number in re.findall(r"\d+", found)}
    assert rows >= set(ROWS) - {15, 17, 18, 20, 22}, sorted(set(ROWS) - rows)
