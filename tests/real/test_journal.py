"""The controller's journal: written before what follows, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcore.protocol.machine import Incarnation, Outcome
from kvreal.journal import Journal, JournalError, records


def test_what_was_written_is_read_again_in_order(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path)
    written = [Incarnation(1), Outcome(7, "done"), Incarnation(2)]
    for record in written:
        journal.append(record)
    assert list(records(path)) == written, "before close: a SIGKILL may come at any time"
    journal.close()
    again = Journal(path)
    again.append(Incarnation(3))
    assert list(records(path)) == [*written, Incarnation(3)]


def test_a_torn_last_record_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path).append(Incarnation(1))
    with path.open("ab") as file:
        file.write(b'{"type":"Incarnat')
    assert records(path) == (Incarnation(1),)


def test_a_bad_record_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path).append(Incarnation(1))
    with path.open("ab") as file:
        file.write(b"nonsense\n")
    Journal(path).append(Incarnation(2))
    with pytest.raises(JournalError, match=":2:"):
        records(path)


def test_no_journal_no_records(tmp_path: Path) -> None:
    assert records(tmp_path / "none") == ()


def test_a_full_disk_is_one_line() -> None:
    journal = Journal(Path("/dev/full"))
    with pytest.raises(JournalError, match="cannot write the journal: No space left"):
        journal.append(Incarnation(1))
