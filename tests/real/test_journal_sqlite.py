"""The controller's journal in SQLite: durable before what follows, one user at a time, refused rather than repaired."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvcore.protocol.machine import Begin, Decide, EpochIssued, Incarnation, JournalRecord, Outcome
from kvcore.protocol.messages import Location, MoveRequest, Namespace, PinRequest, Register
from kvreal import journal_sqlite
from kvreal.journal import JournalError
from kvreal.journal_sqlite import EPOCHS_A_RANK, PRUNE_EVERY, SqliteJournal, open_journal

HOUR_NS = 3600 * 10**9
KEYS = tuple(bytes([n]) * 32 for n in range(4))
ROOT = Path(__file__).resolve().parents[2]


def opened(path: Path, durability: str = "process", kept_ns: int = HOUR_NS, kept: int = 1000) -> SqliteJournal:
    return open_journal(path, durability, kept_ns, kept)[0]


def records(path: Path, **settings: int) -> tuple[JournalRecord, ...]:
    journal, found = open_journal(path, "process", settings.get("kept_ns", HOUR_NS), settings.get("kept", 1000))
    journal.close()
    return found


def begin(event: int) -> Begin:
    return Begin(event, MoveRequest("op", ("a", "L1"), ("b", "L1"), KEYS, (256,) * 4, idem=f"key {event}"))


def decide(event: int) -> Decide:
    return Decide(event, 4, 1024, (("a/0", (1, 2)),), (("b/0", (3, 4)),), True)


def move(event: int) -> list[JournalRecord]:
    return [begin(event), decide(event), Outcome(event, "done", "", 1024, 4)]


def epoch(number: int, instance: str = "a", rank: int = 0) -> EpochIssued:
    register = Register(instance, rank, number, Namespace(), (Location("L1", 8),), "tcp|127.0.0.1|1|x")
    return EpochIssued("127.0.0.1:8500", number, register)


@pytest.mark.parametrize("durability", ["process", "power"])
def test_what_was_appended_is_there_again_in_order(tmp_path: Path, durability: str) -> None:
    path = tmp_path / "j.db"
    written = [
        Incarnation(1),
        epoch(1),
        *move(7),
        begin(8),
        Begin(9, PinRequest("p", ("a", "L1"), KEYS, (256,) * 4, 5)),
    ]
    journal, found = open_journal(path, durability, HOUR_NS, 1000)
    assert found == ()
    for record in written:
        journal.append(record)
    synchronous = journal.base.execute("PRAGMA synchronous").fetchone()[0]
    assert synchronous == {"process": 0, "power": 2}[durability]
    journal.close()
    assert records(path) == tuple(written)
    journal = opened(path)
    journal.append(Incarnation(2))
    journal.close()
    assert records(path) == (*written[1:], Incarnation(2)), "of the incarnations only the last matters"


@pytest.mark.parametrize("durability", ["process", "power"])
def test_what_was_appended_survives_a_sigkill(tmp_path: Path, durability: str) -> None:
    path = tmp_path / "j.db"
    code = (
        "import sys; from pathlib import Path; from kvreal.journal_sqlite import open_journal;"
        "from kvcore.protocol.machine import Outcome;"
        f"journal, _ = open_journal(Path(sys.argv[1]), {durability!r}, {HOUR_NS}, 10**6);\n"
        "for n in range(10**9):\n    journal.append(Outcome(n, 'done', 'x' * 50)); print(n, flush=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    while int(child.stdout.readline()) < 200:
        pass
    with pytest.raises(JournalError, match="another controller uses this journal"):
        opened(path)
    child.send_signal(signal.SIGKILL)
    said = [int(line) for line in child.stdout.read().splitlines() if line.strip()]
    child.wait()
    child.stdout.close()
    found = [record.event for record in records(path, kept=10**6) if isinstance(record, Outcome)]
    assert found[: said[-1] + 1 if said else 201] == list(range(said[-1] + 1 if said else 201))
    assert len(found) <= (said[-1] if said else 200) + 2, "at most one that it had no time to tell of"


def test_a_second_controller_is_refused_in_this_process_too(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    journal = opened(path)
    with pytest.raises(JournalError, match=r"j\.db: another controller uses this journal$"):
        opened(path)
    journal.append(Incarnation(1))
    journal.close()
    assert records(path) == (Incarnation(1),)


def other_sqlite(path: Path) -> None:
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE accounts (name TEXT)")
    base.close()


def other_version(path: Path) -> None:
    opened(path).close()
    base = sqlite3.connect(path)
    base.execute("PRAGMA user_version = 99")
    base.close()


def flipped(path: Path) -> None:
    journal = opened(path)
    for event in range(30):
        for record in move(event):
            journal.append(record)
    journal.close()
    data = bytearray(path.read_bytes())
    at = data.index(b'"key 17"')
    data[at + 1] ^= 0x20
    path.write_bytes(data)


def truncated(path: Path) -> None:
    flipped(path)
    path.write_bytes(path.read_bytes()[:-5000])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path.write_text("my diary\n" * 100), "is not a controller's journal (no SQLite file)"),
        (lambda path: path.write_bytes(b'{"type":"Incarnation","incarnation":1}\n'), "no SQLite file"),
        (lambda path: path.write_bytes(b""), "is empty, so it is no journal"),
        (other_sqlite, "an SQLite file of something else"),
        (other_version, "is a journal of version 99, this controller reads version 1"),
        (flipped, "the journal is damaged: record"),
        (truncated, "the journal is damaged:"),
        (lambda path: path.mkdir(), "cannot read the journal"),
    ],
)
def test_what_is_not_a_good_journal_of_ours_is_refused_and_left_alone(tmp_path: Path, make, words: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "j.db"
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(JournalError) as error:
        opened(path)
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert (path.read_bytes() if path.is_file() else b"") == before


def killed(path: Path, count: int) -> None:
    """A journal whose write-ahead log still holds ``count`` moves, as a SIGKILL leaves it."""
    base, wal = path, Path(f"{path}-wal")
    journal = opened(path)
    for event in range(count):
        for record in move(event):
            journal.append(record)
    kept = base.read_bytes(), wal.read_bytes()
    journal.close()
    base.write_bytes(kept[0])
    wal.write_bytes(kept[1])


def test_a_log_with_a_bad_byte_in_the_middle_is_damaged_and_one_with_a_torn_end_is_not(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    wal = Path(f"{path}-wal")
    killed(path, 20)
    whole = wal.read_bytes()
    for _ in range(20):
        data = bytearray(whole)
        data[random.Random(len(data)).randrange(2000, len(data) // 2)] ^= 1
        wal.write_bytes(data)
        with pytest.raises(JournalError, match="the journal is damaged: j.db-wal has a bad frame"):
            opened(path)
        assert wal.read_bytes() == bytes(data)
    wal.write_bytes(whole[:-100])
    found = records(path)
    assert 55 <= len(found) < 60, "only the last transaction is gone"


def test_a_log_without_its_journal_is_not_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    killed(path, 2)
    path.unlink()
    with pytest.raises(JournalError, match="missing, but j.db-wal is there"):
        opened(path)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    journal = opened(path)
    pages = journal.base.execute("PRAGMA page_count").fetchone()[0]
    journal.base.execute(f"PRAGMA max_page_count = {pages + 2}")
    done = 0
    with pytest.raises(JournalError, match="cannot write the journal: database or disk is full"):
        while True:
            journal.append(begin(done))
            done += 1
    journal.close()
    assert len(records(path)) == done > 0


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot write the journal"):
        opened(tmp_path / "none" / "j.db")
    with pytest.raises(JournalError, match="durability 'hope', expected one of process, power"):
        opened(tmp_path / "j.db", "hope")


# ---- what goes
def test_ended_events_go_by_count_and_those_that_go_on_stay(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    journal = opened(path, kept=10)
    journal.append(Incarnation(1))
    journal.append(begin(1_000_000))  # never ends
    journal.append(Begin(1_000_001, PinRequest("p", ("a", "L1"), KEYS, (256,) * 4, 5)))
    for event in range(400):
        journal.append(begin(event))
        journal.append(decide(event))
        journal.keep(event, b"details of %d" % event)
        journal.append(Outcome(event, "done"))
    size = len(list(journal.rows()))
    assert size <= 3 + 3 * (10 + PRUNE_EVERY), "also while it is open"
    journal.close()
    journal, found = open_journal(path, "process", HOUR_NS, 10)
    assert [record.event for record in found if isinstance(record, Outcome)] == list(range(390, 400))
    assert len(found) == 3 + 3 * 10
    assert {1_000_000, 1_000_001} <= {record.event for record in found if isinstance(record, Begin)}
    assert [number for number, _ in journal.kept()] == list(range(390, 400))
    journal.close()


def test_ended_events_go_by_age(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    journal = opened(path)
    for event in range(10):
        for record in move(event):
            journal.append(record)
    journal.append(begin(99))
    journal.close()
    assert len(records(path, kept_ns=HOUR_NS)) == 31
    assert records(path, kept_ns=1) == (begin(99),)


def test_details_are_there_with_their_outcome_only(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j.db")
    journal.append(begin(1))
    journal.keep(1, b"one")
    assert journal.kept() == [], (
        "a kill between the two leaves an event that goes on, not one that both goes on and ended"
    )
    journal.append(Outcome(1, "done"))
    assert journal.kept() == [(1, b"one")]
    journal.close()


def test_superseded_epochs_and_incarnations_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j.db"
    for life in range(1, 6):
        journal = opened(path)
        journal.append(Incarnation(life))
        for number in range(10):
            journal.append(epoch(life << 32 | number, "a"))
        journal.close()
    journal = opened(path)
    journal.append(epoch(5 << 32 | 77, "b"))
    journal.close()
    found = records(path)
    assert [record for record in found if isinstance(record, Incarnation)] == [Incarnation(5)]
    ours = [record.epoch for record in found if isinstance(record, EpochIssued) and record.register.instance == "a"]
    assert ours == [5 << 32 | number for number in range(10 - EPOCHS_A_RANK, 10)]
    monkeypatch.setattr(journal_sqlite, "EPOCHS_IN_ALL", 3)
    found = records(path)
    assert [record.register.instance for record in found if isinstance(record, EpochIssued)] == ["b"]


def test_the_file_does_not_grow_without_bound(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    journal = opened(path, kept=50)

    def many(first: int) -> int:
        for event in range(first, first + 1500):
            for record in move(event):
                journal.append(record)
        return os.path.getsize(path) + os.path.getsize(f"{path}-wal")

    many(0)
    before = many(10_000)
    assert many(20_000) <= before * 1.2
    journal.close()


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    opened(tmp_path / "j.db").close()
    assert (tmp_path / "j.db").stat().st_mode & 0o077 == 0


def test_it_knows_when_each_event_began(tmp_path: Path) -> None:
    before = time.time_ns()
    journal = opened(tmp_path / "j.db")
    for record in [*move(1), begin(2)]:
        journal.append(record)
    journal.close()
    again = opened(tmp_path / "j.db")
    began = again.began()
    again.close()
    assert list(began) == [1, 2]
    assert before <= began[1] <= began[2] <= time.time_ns()
