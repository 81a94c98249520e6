"""A report's two forms: one HTML file that needs nothing else, and the same in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kvmove.errors import UserError
from kvmove.reports.words import Section, Table

HERE: Final = Path(__file__).parent
HTML: Final = "index.html"
MARKDOWN: Final = "README.md"
LONG: Final = 40
"""A cell of so many letters may be broken anywhere."""


def write(folder: Path, title: str, about: str, sections: Sequence[Section]) -> list[Path]:
    """Both files. UserError if they cannot be written."""
    found = {HTML: html(title, about, sections), MARKDOWN: markdown(title, about, sections)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in found.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot write the report: {error.strerror}") from None
    return [folder / name for name in found]


def html(title: str, about: str, sections: Sequence[Section]) -> str:
    css = (HERE / "page.css").read_text(encoding="utf-8")
    text: str = _environment(True).get_template("page.html.jinja").render(
        title=title, about=about, sections=sections, css=css, kind=_kind, tabbed=_tabbed
    )  # fmt: skip
    return text


def markdown(title: str, about: str, sections: Sequence[Section]) -> str:
    text: str = _environment(False).get_template("page.md.jinja").render(
        title=title, about=about, sections=sections, piped=_piped
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _environment(escape: bool) -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=escape, undefined=jinja2.StrictUndefined, trim_blocks=False,
        keep_trailing_newline=True,
    )  # fmt: skip


def _kind(table: Table, column: int, cell: str) -> str:
    """What a cell's look says; its words say it too."""
    if cell.startswith("✓"):
        return "met"
    if cell.startswith("✗"):
        return "missed"
    if column in table.right:
        return "num"
    return "long" if len(cell) > LONG else ""


def _tabbed(table: Table) -> str:
    return "\n".join("\t".join(row) for row in (table.head, *table.rows))


def _piped(table: Table) -> str:
    rule = ["--:" if column in table.right else "---" for column in range(len(table.head))]
    rows = [table.head, tuple(rule), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
