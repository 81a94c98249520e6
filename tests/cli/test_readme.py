"""What the README shows is there: its scenario plays as it says, its commands exist, its picture is the demo's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmove.cli import call
from kvmove.demo import PHASES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.+?)```", README, re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_scenario_plays_as_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "readme.yaml"
    path.write_text(block("yaml"))
    assert call(["run", str(path)]) == 0
    out, _ = capsys.readouterr()
    assert "failed (destination_restarted), 0 tokens" in out and "2 expectations met" in out


def test_each_numbered_line_is_explained() -> None:
    marks = re.findall(r"# (\d)$", block("yaml"), re.MULTILINE)
    assert marks == re.findall(r"^(\d)\. ", README, re.MULTILINE) == [str(n) for n in range(1, len(marks) + 1)]


def test_the_picture_is_the_demos() -> None:
    picture = block("text")
    for text in ("512 MiB, carried by", "compared with what was stored", "equal effects each time", *PHASES.values()):
        assert text in picture


def test_every_path_and_target_that_it_names_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:`|    )make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    named = set(re.findall(r"\]\(([^)]+)\)", README)) | set(re.findall(r"(?:scenarios|tests)/[a-z]+", README))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert missing == []


def test_every_command_that_it_names_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in sorted(
        set(re.findall(r"kvmove ((?:scenario )?(?:run|history|search|protocol|schema|check))", README))
    ):
        assert call([*command.split(), "--help"]) == 0, command
    capsys.readouterr()
