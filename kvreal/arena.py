"""One pool of memory for all instances of a host: a move hands slots over by name and copies no byte.

    member = join("/dev/shm/kvmove-arena", "a1b2...", slot_bytes=8 << 20, nbytes=8 << 30)
    member.lay_out(256)                     # 256 slots of its own, none backed yet
    member.own([0, 1, 2])                   # about to be written: nobody else sees these bytes
    member.take(other, [0, 1], [7, 8])      # my slots 7, 8 now are what the other calls 0, 1

What a process calls slot 7 is an entry of its row, which names a physical slot; several entries may name one. Chunks
are never changed once they are written, so sharing one needs no more than that: whoever writes asks for slots of its
own first. A physical slot is free when no entry of a living process names it. Every process holds a lock on a file of
its own, which the kernel lets go when it dies, however it dies: its row is then dropped by whoever looks next. A
process that dies in the middle of a change leaves the mark that it set before; whoever finds it counts the rows anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import shutil
import threading
from pathlib import Path
from typing import Callable, Final, Iterator, List, Optional

import numpy as np
import numpy.typing as npt

from kvreal.slab import gib
from kvreal.spans import Ints, Slots, ints

MAGIC: Final = 0x6B766D6F76652D31
PAGE: Final = 4096
MEMBERS: Final = 64
ID_BYTES: Final = 32
POISON: Final = 0xDB
ARENAS: Final = "/dev/shm"

Bytes = npt.NDArray[np.uint8]
Row = npt.NDArray[np.int32]


class ArenaError(Exception):
    """The arena cannot be had, or has no room; the message says why."""


class Changed(ArenaError):
    """A member is in another life, or its slots lie elsewhere."""


class Arena:
    """A folder of small files and one large one, mapped by every member. All methods are safe between threads and
    processes."""

    def __init__(self, folder: Path, slot_bytes: int, nbytes: int) -> None:
        self.folder: Path = folder
        self.slot_bytes: int = slot_bytes
        self.slots: int = nbytes // slot_bytes
        self.thread: threading.Lock = threading.Lock()
        self.own: List[int] = []
        self.lock_fd: int = _lock_file(folder)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.lock_fd)

    # ---- the file
    def _map(self) -> None:
        path = self.folder / "pool"
        members = self._alive()
        tables = PAGE + MEMBERS * (ID_BYTES + 16) + self.slots * 4 + MEMBERS * self.slots * 4
        start = -(-tables // PAGE) * PAGE
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not members:
                self._make(fd, start + self.slots * self.slot_bytes)
            self.map: mmap.mmap = mmap.mmap(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        self.head: npt.NDArray[np.int64] = np.frombuffer(self.map, dtype=np.int64, count=PAGE // 8)
        shape = (MAGIC, self.slot_bytes, self.slots)
        if not members:
            self.head[:3] = shape
            self.head[4] = int.from_bytes(os.urandom(7), "little")  # no other arena's, also not of one before here
        elif tuple(int(word) for word in self.head[:3]) != shape:
            raise ArenaError(
                f"the arena at {self.folder} has {int(self.head[2])} slots of {int(self.head[1])} bytes, this process "
                f"asks for {self.slots} of {self.slot_bytes}"
            )
        at = PAGE
        self.ids: npt.NDArray[np.uint8] = np.frombuffer(self.map, np.uint8, MEMBERS * ID_BYTES, at).reshape(MEMBERS, -1)
        at += MEMBERS * ID_BYTES
        self.reserved: npt.NDArray[np.int64] = np.frombuffer(self.map, np.int64, MEMBERS, at)
        at += MEMBERS * 8
        #: what a member's row means, by a number of no meaning: it has another whenever that changes
        self.marks: npt.NDArray[np.int64] = np.frombuffer(self.map, np.int64, MEMBERS, at)
        at += MEMBERS * 8
        self.refs: Row = np.frombuffer(self.map, np.int32, self.slots, at)
        at += self.slots * 4
        self.rows: Row = np.frombuffer(self.map, np.int32, MEMBERS * self.slots, at).reshape(MEMBERS, self.slots)
        if not members:
            self.rows[:] = -1
        self.bytes: Bytes = np.frombuffer(self.map, np.uint8, self.slots * self.slot_bytes, start)

    def _make(self, fd: int, nbytes: int) -> None:
        """All of its pages are had now: a page that cannot be had later would kill whoever touches it."""
        os.ftruncate(fd, 0)
        free = os.fstatvfs(fd)
        if free.f_bavail * free.f_frsize < nbytes:
            raise ArenaError(
                f"an arena of {gib(nbytes)} does not fit into {self.folder.parent}: "
                f"{gib(free.f_bavail * free.f_frsize)} are free there"
            )
        os.posix_fallocate(fd, 0, nbytes)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self.thread:
            fcntl.flock(self.lock_fd, fcntl.LOCK_EX)
            while not self.own and not _same(self.lock_fd, self.folder / "lock"):  # the last member has left meanwhile
                os.close(self.lock_fd)
                self.lock_fd = _lock_file(self.folder)
                fcntl.flock(self.lock_fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self.lock_fd, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with self._locked(), self._marked():
            yield

    @contextlib.contextmanager
    def _marked(self, first: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Rows and counts change together; if they did not, they are made to agree first."""
        first()
        if self.head[3]:
            self._recount()
        self.head[3] = 1
        try:
            yield
        except BaseException:
            self._recount()
            raise
        finally:
            self.head[3] = 0

    # ---- members
    def _alive(self) -> List[int]:
        return [number for number in range(MEMBERS) if self._lives(number)]

    def _lives(self, number: int) -> bool:
        """Does that member's process? (It holds the lock of its file; ours do not count as others'.)"""
        if number in self.own:
            return True
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self.folder / f"member-{number}", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(fd)
        return False

    def _bury(self) -> None:
        """Drop the references of members that are dead."""
        alive = self._alive()
        for number in np.flatnonzero(self.ids.any(axis=1)):
            if int(number) not in alive:
                self._forget(int(number))

    def _forget(self, number: int) -> None:
        self._drop(self.rows[number])
        self.rows[number] = -1
        self.reserved[number] = 0
        self.marks[number] = 0
        self.ids[number] = 0
        (self.folder / f"member-{number}").unlink(missing_ok=True)

    def join(self, process: str) -> Member:
        """A row for this process, in the arena that is there or in a new one."""
        with self._locked():
            try:
                return self._enter(process)
            except BaseException:
                if not self._alive():
                    self._remove()
                raise

    def _enter(self, process: str) -> Member:
        with self._marked(self._map):
            self._bury()
            free = np.flatnonzero(~self.ids.any(axis=1))
            if not len(free):
                raise ArenaError(f"the arena at {self.folder} has {MEMBERS} members already")
            number = int(free[0])
            fd = os.open(self.folder / f"member-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            name = process.encode()[:ID_BYTES]
            self.ids[number, : len(name)] = np.frombuffer(name, np.uint8)
            self.own.append(number)
            return Member(self, number, fd)

    def leave(self, member: Member) -> None:
        with self._changing():
            self._forget(member.number)
            self.own.remove(member.number)
            os.close(member.fd)
            if not self._alive():
                self._remove()

    def _remove(self) -> None:
        """All of it. Whoever waits for the lock finds that its file has gone."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    # ---- references; the lock is held
    def _recount(self) -> None:
        used = self.rows[self.rows >= 0]
        self.refs[:] = np.bincount(used, minlength=self.slots)

    def _drop(self, row: Row) -> None:
        np.subtract.at(self.refs, row[row >= 0], 1)

    def _free(self, count: int) -> Row:
        found = np.flatnonzero(self.refs == 0)[:count]
        if len(found) < count:
            self._bury()
            found = np.flatnonzero(self.refs == 0)[:count]
        if len(found) < count:  # cannot be: no more slots are laid out than there are
            raise ArenaError(f"the arena at {self.folder} has {len(found)} free slots, {count} are needed")
        return found.astype(np.int32)


def join(folder: str, process: str, slot_bytes: int, nbytes: int) -> Member:
    """This process's part of the arena of that folder, which is made if it is not there or if all of its members are
    dead. ArenaError: it is of another shape, it is full, or there is no such memory."""
    if nbytes < slot_bytes:
        raise ArenaError(f"an arena of {nbytes} bytes has no room for a slot of {slot_bytes}")
    try:
        return Arena(Path(folder) / str(slot_bytes), slot_bytes, nbytes).join(process)
    except OSError as error:
        raise ArenaError(f"no arena at {folder}: {error.strerror or error}") from error


def _lock_file(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


class Member:
    """One process's row."""

    def __init__(self, arena: Arena, number: int, fd: int) -> None:
        self.arena: Arena = arena
        self.number: int = number
        self.fd: int = fd
        self.row: Row = arena.rows[number]
        self.size: int = 0

    def lay_out(self, slots: int) -> None:
        """So many slots, none of them backed. ArenaError: the arena's other members have the rest."""
        arena = self.arena
        with arena._changing():
            arena._bury()
            others = int(arena.reserved.sum() - arena.reserved[self.number])
            if others + slots > arena.slots:
                raise ArenaError(
                    f"the arena at {arena.folder} has {arena.slots} slots, {others} of them laid out by others: no "
                    f"room for {slots}"
                )
            arena._drop(self.row)
            self.row[:] = -1
            arena.marks[self.number] = 0
            arena.reserved[self.number] = self.size = slots

    def own(self, indices: Slots, keep: bool = False) -> None:
        """Make these slots ones that nobody else refers to. ``keep``: with what they hold; otherwise whoever asks is
        about to write all of them."""
        arena = self.arena
        wanted = np.asarray(indices, dtype=np.int64)
        with arena._changing():
            now = self.row[wanted]
            alone = now >= 0
            alone[alone] = arena.refs[now[alone]] == 1
            if alone.all():
                return
            changed = wanted[~alone]
            old = self.row[changed]
            fresh = arena._free(len(changed))
            if keep:
                for one, other in zip(old, fresh):
                    if one >= 0:
                        self._slot(int(other))[:] = self._slot(int(one))
            arena._drop(old)
            arena.refs[fresh] += 1
            self.row[changed] = fresh

    def renew(self) -> None:
        """This row's slots are others than before, or of another life of its process."""
        with self.arena._locked():
            self.arena.marks[self.number] = int.from_bytes(os.urandom(7), "little") + 1

    def mark(self, other: int) -> int:
        return int(self.arena.marks[other])

    def take(self, other: int, theirs: Slots, mine: Slots, mark: int = 0) -> None:
        """My slots ``mine`` become what the member ``other`` calls ``theirs``; Changed if it has another ``mark`` or
        is dead (0: whichever it has)."""
        self._share(other, theirs, self.number, mine, mark)

    def give(self, other: int, theirs: Slots, mine: Slots) -> None:
        """What the member ``other`` calls ``theirs`` becomes my ``mine``."""
        self._share(self.number, mine, other, theirs)

    def _share(self, source: int, given: Slots, target: int, taken: Slots, mark: int = 0) -> None:
        arena = self.arena
        to = np.asarray(taken, dtype=np.int64)
        with arena._changing():
            if mark and (self.mark(source) != mark or not arena._lives(source)):
                raise Changed(f"the arena at {arena.folder}: its member {source} is not what it was")
            physical = arena.rows[source][np.asarray(given, dtype=np.int64)]
            if (physical < 0).any():
                raise ArenaError(f"the arena at {arena.folder}: a slot that holds nothing cannot be handed over")
            row = arena.rows[target]
            old = row[to]
            np.add.at(arena.refs, physical, 1)
            arena._drop(old)
            row[to] = physical

    def of(self, other: int) -> Optional[Member]:
        """Another member's row, to write there on its behalf; None: it is dead."""
        with self.arena._locked():
            if other not in self.arena._alive():
                return None
        return Member(self.arena, other, -1)

    def drop(self, indices: Slots) -> None:
        """Let go of these slots; what nobody refers to any more is overwritten."""
        arena = self.arena
        gone = np.asarray(indices, dtype=np.int64)
        with arena._changing():
            old = self.row[gone]
            old = old[old >= 0]
            arena._drop(old)
            self.row[gone] = -1
            for physical in np.unique(old):
                if arena.refs[physical] == 0:
                    self._slot(int(physical))[:] = POISON

    def _slot(self, physical: int) -> Bytes:
        size = self.arena.slot_bytes
        return self.arena.bytes[physical * size : (physical + 1) * size]

    def offset(self, index: int) -> int:
        """Where that slot lies in the arena's bytes; one that is not backed is given a place."""
        if self.row[index] < 0:
            self.own([index])
        return int(self.row[index]) * self.arena.slot_bytes

    def offsets(self, indices: Slots) -> Ints:
        wanted = ints(indices)
        if (self.row[wanted] < 0).any():
            self.own(wanted[self.row[wanted] < 0])
        return self.row[wanted].astype(np.int64) * self.arena.slot_bytes

    def leave(self) -> None:
        self.arena.leave(self)

    @functools.cached_property
    def card(self) -> str:
        """The arena and this row in it, as peers are told: an inode and a device say whether it is the same."""
        stat = os.stat(self.arena.folder / "pool")
        return f"{stat.st_dev:x}-{stat.st_ino:x}-{int(self.arena.head[4]):x}/{self.number}"
