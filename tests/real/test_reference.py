"""Where the reference is looked for. What it does ``kvmove bench`` sees, once ``make bench-peer`` has brought it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from kvreal.reference import peer

pytestmark = pytest.mark.real


def environment(folder: Path, says: str) -> Path:
    """An environment's interpreter that answers ``says`` to whatever it is asked."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho {says}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is set, nothing lies about."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv(peer.VARIABLE, raising=False)
    monkeypatch.setattr(peer, "HERE", tmp_path / "tree" / "kvreal" / "reference")
    return tmp_path


def test_nowhere() -> None:
    says = "`make bench-peer` brings it (or KVMOVE_REFERENCE_PYTHON names its interpreter)"
    assert peer.found() == (None, f"LMCache 0.5.6 is not here: {says}")


@pytest.mark.parametrize("where", ["here", "tree"])
def test_where_make_puts_it(where: str, alone: Path) -> None:
    python = environment(alone / where / ".venv-reference", peer.VERSION)
    assert peer.found() == (python, "")


def test_another_that_is_named(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(alone / "here" / ".venv-reference", peer.VERSION)
    other = environment(alone / "other", peer.VERSION)
    monkeypatch.setenv(peer.VARIABLE, str(other))
    assert peer.found() == (other, "")
    monkeypatch.setenv(peer.VARIABLE, str(alone / "nothing"))
    assert peer.found() == (None, f"KVMOVE_REFERENCE_PYTHON={alone}/nothing: No such file or directory")


def test_another_version(alone: Path) -> None:
    python = environment(alone / "here" / ".venv-reference", "0.4.0")
    assert peer.found() == (None, f"{python}: lmcache 0.4.0, expected 0.5.6: `make bench-peer`")
