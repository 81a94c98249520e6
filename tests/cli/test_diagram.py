"""The transition table drawn in each form, from a small table whose pictures can be checked by eye."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from kvmove import diagram


class Row(NamedTuple):
    machine: str
    state: str
    input: str
    does: str
    next: str
    holes: tuple[str, ...] = ()


ROWS = (
    Row("lamp", "off", "press", "lights", "on", ("h01", "h02")),
    Row("lamp", "off", "wind", "", "off"),
    Row("lamp", "on", "press", "goes dark", "off"),
    Row("lamp", "on", "power cut: at night", "", "off"),
    Row("lamp", "on", "power cut: by day", "", "off"),
    Row("door", "shut", 'say "open"', "opens", "open"),
)


def test_text_has_every_arrow_and_every_row() -> None:
    drawn = diagram.draw(ROWS, "text")
    assert "  off --> on   on press" in drawn
    assert "  on  --> off  on press, power cut" in drawn
    assert "    press  lights -> on  [H01 H02]" in drawn
    assert "    wind   nothing" in drawn
    assert drawn.index("LAMP") < drawn.index("DOOR")


def test_dot_quotes_what_it_must() -> None:
    drawn = diagram.draw(ROWS[:5], "dot")
    assert drawn.startswith("digraph lamp {") and drawn.endswith("}")
    assert '  on -> off [label="press\\npower cut"];' in drawn
    assert '[label="say \\"open\\""]' in diagram.draw(ROWS[5:], "dot")


def test_mermaid_and_markdown() -> None:
    assert "stateDiagram-v2" in diagram.draw(ROWS, "mermaid")
    assert "  on --> off: press, power cut" in diagram.draw(ROWS, "mermaid")
    assert "| off | wind | nothing | off |  |" in diagram.draw(ROWS, "markdown")


@pytest.mark.parametrize("form", diagram.FORMATS)
def test_the_real_table_draws_in_each_form(form: str) -> None:
    tables = pytest.importorskip("kvcore.protocol.tables")
    drawn = diagram.draw(tables.ROWS, form)
    assert all(row.input.split("\n")[0][:10] in drawn for row in tables.ROWS if form in ("text", "markdown"))
