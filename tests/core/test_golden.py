"""Golden transcripts: whole plays, every input and every effect. A change of the protocol shows as a readable diff.

``pytest tests/core/test_golden.py --rewrite-golden`` writes them anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.transcript import Play

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.txt"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_play_goes_as_it_is_written(path: Path, rewrite: bool) -> None:
    written = path.read_text()
    about, _, rest = written.partition("\n")
    script = [line[2:] for line in rest.splitlines() if line.startswith("> ")]
    played = f"{about}\n\n" + Play().run(script)
    if rewrite:
        path.write_text(played)
    assert played == written or rewrite


def test_plays_are_there() -> None:
    assert len(GOLDEN) >= 20
