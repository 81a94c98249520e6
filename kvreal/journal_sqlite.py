"""A controller's journal as one SQLite file: what must survive is in it before whatever follows is carried out.

    journal, records = open_journal(path, "process", kept_ns, kept)

* ``process``: the kernel has each record before ``append`` returns. A SIGKILL loses nothing; a power cut may.
  ``power``: the disk has it (an fsync a record).
* One process at a time has it open; whoever comes second is refused.
* A file that is not ours, of another version, or damaged is refused in one line and stays as it is: each row has a
  checksum, SQLite's own structure is checked, and so is the write-ahead log, whose end SQLite would silently drop.
* What nobody needs any more goes, a few rows at a time: ended events by age and count, old incarnations, epochs that
  others have long superseded. SQLite uses their pages again, so the file stops growing.

It is an event log's Keeper as well: an ended event's details are written in one transaction with its Outcome.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
import zlib
from collections import deque
from pathlib import Path
from typing import Deque, Dict, Final, Iterator, List, Tuple

import msgspec

from kvcore.protocol.machine import Begin, EpochIssued, Incarnation, JournalRecord, Outcome
from kvreal.journal import JournalError
from kvreal.wal import damage

APPLICATION_ID: Final = 0x6B766D76
"""``kvmv`` in the file's header: ``file`` and SQLite's tools show it."""
VERSION: Final = 1
MAGIC: Final = b"SQLite format 3\0"
DURABILITIES: Final[Dict[str, str]] = {"process": "OFF", "power": "FULL"}
"""Durability -> SQLite's ``synchronous``."""
PRUNE_EVERY: Final = 256
"""Appends between two looks at what may go."""
PRUNE_EVENTS: Final = 1024
"""Events that go in one look at most, so that no append takes long."""
EPOCHS_A_RANK: Final = 4
EPOCHS_IN_ALL: Final = 20_000
"""The newest. A worker whose epoch is forgotten registers anew after a restart; nothing else happens."""
PENDING_MAX: Final = 1024
"""Details that wait for their event's Outcome."""

SCHEMA: Final = """
CREATE TABLE records (
    seq INTEGER PRIMARY KEY,
    wall_ns INTEGER NOT NULL,
    kind TEXT NOT NULL,
    number INTEGER NOT NULL,
    place TEXT NOT NULL,
    body BLOB NOT NULL,
    sum INTEGER NOT NULL
);
CREATE TABLE kept (number INTEGER PRIMARY KEY, body BLOB NOT NULL);
"""
INSERT: Final = "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)"

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(JournalRecord).decode


class Row(msgspec.Struct, frozen=True):
    """A record as it lies in the file."""

    seq: int
    wall_ns: int
    record: JournalRecord


def open_journal(
    path: Path, durability: str, kept_ns: int, kept: int
) -> Tuple[SqliteJournal, Tuple[JournalRecord, ...]]:
    """The journal and what it holds, oldest first; a new one if there is no file. ``kept_ns`` and ``kept``: for how
    long ended events stay, and how many of them. JournalError: one line about why it cannot be used."""
    if durability not in DURABILITIES:
        raise JournalError(f"durability {durability!r}, expected one of {', '.join(DURABILITIES)}")
    if not path.exists():
        _create(path)
    _recognise(path)
    rows = _read(path)
    journal = SqliteJournal(path, durability, kept_ns, kept)
    try:
        journal.adopt(rows)
        pruned = journal.prune(PRUNE_EVENTS * 1000)
        if pruned:
            rows = list(journal.rows())
    except sqlite3.Error as error:
        journal.close()
        raise JournalError(f"{path}: cannot use the journal: {error}") from error
    except JournalError:
        journal.close()
        raise
    return journal, tuple(row.record for row in rows)


def _create(path: Path) -> None:
    """A new file appears whole or not at all. Whoever is quicker wins."""
    for suffix in ("-wal", "-journal"):
        if os.path.exists(f"{path}{suffix}"):
            raise JournalError(f"{path}: missing, but {path.name}{suffix} is there: put both back, or remove both")
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as base:
            base.executescript(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION}; {SCHEMA}")
        os.chmod(draft, 0o600)  # it names keys and addresses
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        _sync_folder(path)
    except (sqlite3.Error, OSError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise JournalError(f"{path}: cannot write the journal: {why}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(draft)


def _sync_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _recognise(path: Path) -> None:
    """Is it ours? Looks at the header only: SQLite would repair, and so change, what is not ours to touch."""
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except OSError as error:
        raise JournalError(f"{path}: cannot read the journal: {error.strerror}") from error
    if not head:
        raise JournalError(f"{path}: is empty, so it is no journal: remove it to begin a new one")
    if not head.startswith(MAGIC) or len(head) < 100:
        raise JournalError(f"{path}: is not a controller's journal (no SQLite file)")
    application = int.from_bytes(head[68:72], "big")
    version = int.from_bytes(head[60:64], "big")
    if application != APPLICATION_ID:
        raise JournalError(f"{path}: is not a controller's journal (an SQLite file of something else)")
    if version != VERSION:
        raise JournalError(f"{path}: is a journal of version {version}, this controller reads version {VERSION}")


def _read(path: Path) -> List[Row]:
    """All of it, checked, without writing to it: a damaged journal stays as it is, for whoever repairs it."""
    why = damage(Path(f"{path}-wal"))
    if why:
        raise JournalError(f"{path}: the journal is damaged: {why}")
    uri = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=0)) as base:
            found = list(_rows(base, path))
            verdict = base.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise JournalError(f"{path}: the journal is damaged: {' '.join(str(verdict).split())}")
            return found
    except sqlite3.Error as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: sqlite3.Error) -> JournalError:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return JournalError(f"{path}: another controller uses this journal")
    return JournalError(f"{path}: the journal is damaged: {error}")


def _rows(base: sqlite3.Connection, path: Path) -> Iterator[Row]:
    for seq, wall_ns, kind, number, place, body, total in base.execute("SELECT * FROM records ORDER BY seq"):
        where = f"{path}: the journal is damaged: record {seq}"
        if not isinstance(body, bytes) or total != _sum(seq, wall_ns, kind, number, place, body):
            raise JournalError(f"{where} has another checksum than its own")
        try:
            record = _decode(body)
        except msgspec.MsgspecError as error:
            raise JournalError(f"{where}: {error}") from error
        yield Row(seq, wall_ns, record)


def _sum(seq: int, wall_ns: int, kind: str, number: int, place: str, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(f"{seq} {wall_ns} {kind} {number} {place}".encode()))


def _number(record: JournalRecord) -> int:
    if isinstance(record, EpochIssued):
        return record.epoch
    return record.incarnation if isinstance(record, Incarnation) else record.event


class SqliteJournal:
    """Use ``open_journal``. Not for several threads at once."""

    def __init__(self, path: Path, durability: str, kept_ns: int, kept: int) -> None:
        """Takes the file's lock. JournalError if another process has it."""
        self.path: Path = path
        self.durability: str = durability
        self.kept_ns: int = kept_ns
        self.most: int = kept
        self.seq: int = 0
        self.since_prune: int = 0
        #: ended events in the order of their ends: (wall_ns, event, seq of its first record, seq of its last)
        self.ended: Deque[Tuple[int, int, int, int]] = deque()
        #: event that goes on -> seq of its first record
        self.begun: Dict[int, int] = {}
        #: seq of every Incarnation, oldest first
        self.incarnations: Deque[int] = deque()
        #: place -> (seq) of its epochs, oldest first; and of all of them
        self.epochs: Dict[str, Deque[int]] = {}
        self.superseded: List[int] = []
        self.pending: Dict[int, bytes] = {}
        self.base: sqlite3.Connection = sqlite3.connect(
            path, isolation_level=None, timeout=0, check_same_thread=False, cached_statements=32
        )
        try:
            # Exclusive before the first access: no shared-memory file, and the lock is kept until the process ends.
            self.base.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.base.execute("PRAGMA journal_mode = WAL")
            self.base.execute(f"PRAGMA synchronous = {DURABILITIES[durability]}")
            self.base.execute("BEGIN IMMEDIATE")
            self.base.execute("COMMIT")
        except sqlite3.Error as error:
            self.base.close()
            raise _refused(path, error) from error

    def adopt(self, rows: List[Row]) -> None:
        """Know what is there already. JournalError if it is not what was read before the lock was taken."""
        (last,) = self.base.execute("SELECT coalesce(max(seq), 0) FROM records").fetchone()
        if last != (rows[-1].seq if rows else 0):
            raise JournalError(f"{self.path}: another controller has just used this journal")
        self.base.execute("DROP INDEX IF EXISTS by_number")  # of earlier versions
        self.seq = last
        for row in rows:
            self._note(row.seq, row.wall_ns, row.record)

    def _note(self, seq: int, wall_ns: int, record: JournalRecord) -> None:
        """What pruning will have to know."""
        if isinstance(record, Outcome):
            self.ended.append((wall_ns, record.event, self.begun.pop(record.event, seq), seq))
        elif isinstance(record, Begin):
            self.begun.setdefault(record.event, seq)  # a lease may be begun again
        elif isinstance(record, Incarnation):
            self.incarnations.append(seq)
        elif isinstance(record, EpochIssued):
            place = _place(record)
            ours = self.epochs.pop(place, None) or deque()
            self.epochs[place] = ours  # the place that was heard of last is the last to be forgotten
            ours.append(seq)
            if len(ours) > EPOCHS_A_RANK:
                self.superseded.append(ours.popleft())

    # ---- what a controller does
    def append(self, record: JournalRecord) -> None:
        """Durable when this returns. JournalError if it could not be written."""
        body = _encode(record)
        seq = self.seq + 1
        wall_ns = time.time_ns()
        kind = type(record).__name__
        number = _number(record)
        place = _place(record) if isinstance(record, EpochIssued) else ""
        row = (seq, wall_ns, kind, number, place, body, _sum(seq, wall_ns, kind, number, place, body))
        details = self.pending.pop(number, None) if isinstance(record, Outcome) else None
        try:
            if details is None:
                self.base.execute(INSERT, row)
            else:
                with self._transaction():
                    self.base.execute(INSERT, row)
                    self.base.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (number, details))
        except sqlite3.Error as error:
            raise JournalError(f"{self.path}: cannot write the journal: {error}") from error
        self.seq = seq
        self._note(seq, wall_ns, record)
        self.since_prune += 1
        if self.since_prune >= PRUNE_EVERY:
            try:
                self.prune(PRUNE_EVENTS)
            except sqlite3.Error as error:
                raise JournalError(f"{self.path}: cannot write the journal: {error}") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self.base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.base.execute("ROLLBACK")
            raise
        self.base.execute("COMMIT")

    def close(self) -> None:
        self.base.close()

    # ---- what an event log keeps beside it
    def keep(self, event: int, record: bytes) -> None:
        """Details of an event that ends now: in the file with its Outcome, which is the next to be appended."""
        while len(self.pending) >= PENDING_MAX:
            del self.pending[next(iter(self.pending))]
        self.pending[event] = record

    def kept(self) -> List[Tuple[int, bytes]]:
        """(event, its details), in the order of their ends."""
        query = (
            "SELECT kept.number, kept.body FROM kept JOIN records ON records.number = kept.number"
            " WHERE records.kind = 'Outcome' ORDER BY records.seq"
        )
        return [(int(number), bytes(body)) for number, body in self.base.execute(query)]

    def began(self) -> Dict[int, int]:
        """Event -> when it began, ns since 1970. A lease that was begun again keeps its first time."""
        query = "SELECT number, min(wall_ns) FROM records WHERE kind = 'Begin' GROUP BY number"
        return {int(number): int(wall_ns) for number, wall_ns in self.base.execute(query)}

    def rows(self) -> Iterator[Row]:
        return _rows(self.base, self.path)

    # ---- pruning
    def prune(self, events: int) -> int:
        """Drop what nobody needs any more, at most so many ended events. Returns how many rows went."""
        self.since_prune = 0
        over = self._over(events)
        rows = self.superseded
        self.superseded = []
        while len(self.incarnations) > 1:
            rows.append(self.incarnations.popleft())
        count = (
            sum(len(ours) for ours in self.epochs.values()) if len(self.epochs) * EPOCHS_A_RANK > EPOCHS_IN_ALL else 0
        )
        while count > EPOCHS_IN_ALL:
            ours = self.epochs.pop(next(iter(self.epochs)))
            rows.extend(ours)
            count -= len(ours)
        if not over and not rows:
            return 0
        before = self.base.total_changes
        with self._transaction():
            # Between an event's first record and its last: an index would cost each append more than all of this.
            kinds = "('Begin', 'Promised', 'Decide', 'Outcome')"
            among = "DELETE FROM records WHERE seq BETWEEN ? AND ? AND number = ?"
            self.base.executemany(f"{among} AND kind IN {kinds}", [(first, last, event) for event, first, last in over])
            self.base.executemany("DELETE FROM kept WHERE number = ?", [(event,) for event, _, _ in over])
            self.base.executemany("DELETE FROM records WHERE seq = ?", [(seq,) for seq in rows])
        return self.base.total_changes - before

    def _over(self, most: int) -> List[Tuple[int, int, int]]:
        """Ended events beyond the count, or older than the age: (event, seq of its first record, of its last)."""
        oldest_ns = time.time_ns() - self.kept_ns
        found: List[Tuple[int, int, int]] = []
        while self.ended and len(found) < most and (len(self.ended) > self.most or self.ended[0][0] < oldest_ns):
            found.append(self.ended.popleft()[1:])
        return found


def _place(record: EpochIssued) -> str:
    return f"{record.register.instance}/{record.register.rank}"
