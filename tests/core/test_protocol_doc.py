"""docs/protocol.md says what the code says. ``--rewrite-golden`` writes its tables anew."""

from __future__ import annotations

import re
from pathlib import Path

from kvcore.protocol.config import Config, Rules
from kvcore.protocol.tables import ROWS, as_markdown

DOC = Path(__file__).parents[2] / "docs" / "protocol.md"
BEGIN = "<!-- tables: python -m kvcore.protocol.tables -->\n"
END = "<!-- end of tables -->"
UNITS = {"ms": 1_000_000, "s": 1_000_000_000}


def test_its_tables_are_the_rows(rewrite: bool) -> None:
    before, _, rest = DOC.read_text().partition(BEGIN)
    written, _, after = rest.partition(END)
    tables = "\n" + as_markdown(ROWS) + "\n\n"
    if rewrite:
        DOC.write_text(before + BEGIN + tables + END + after)
    assert written == tables or rewrite


def test_it_tells_of_every_hole() -> None:
    told = re.findall(r"^\| (H\w+) \|", DOC.read_text(), re.MULTILINE)
    assert told == [name.upper() for name in Rules.__struct_fields__]


def test_its_constants_are_the_defaults() -> None:
    told = re.findall(r"^\| (\w+_ns) \| (\d+) (ms|s) \|", DOC.read_text(), re.MULTILINE)
    config = Config()
    assert {name: int(number) * UNITS[unit] for name, number, unit in told} == {
        name: getattr(config, name) for name in config.__struct_fields__ if name.endswith("_ns")
    }
