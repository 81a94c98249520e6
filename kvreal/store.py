"""A disk location's files: a slot each, which say of themselves which chunk they hold.

    store = Store("LocalDiskBackend", slots, slot_bytes, folder)      # folder: home(path), or None for none that stays
    store.write(slot, data, key)                                      # whole, or not at all
    store.read(slot, into, key)                                       # what was written under that key, or DiskError

A file begins with a page that holds the chunk's whole key, its size and its checksum (64-bit xxh3, seeded with the
key); the bytes follow it. It is written under another name and renamed, so that a file which has a slot's name is
whole, and looked through whenever it is read: bytes that are another chunk's, or not what was written, are never given
away.

A process keeps its files in a directory of its own that it holds locked. Nothing of an earlier life is believed (its
epoch is over), so ``home`` removes every directory beside it that nobody holds any more. Where no path is given, all
slots lie in one file that has no name: it vanishes with the process, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import struct
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Any, Final, List, Optional, Protocol, Sequence, Tuple

import numpy as np
import numpy.typing as npt
import xxhash

log = logging.getLogger("kvmove.disk")

Bytes = npt.NDArray[np.uint8]

PAGE: Final = 4096
MAGIC: Final = b"kvmove\x00\x01"
"""The last byte is the version of all that follows."""
KEY_BYTES: Final = 64
WRITE_BYTES: Final = 1 << 20
"""One call's. Where memory is short the kernel takes less than half the time for eight of them that it takes for
8 MiB at once."""
_HEAD: Final = struct.Struct(f"<8sQQH{KEY_BYTES}s")
_SUM: Final = struct.Struct("<Q")
LOCK: Final = "in-use"
WHOLE: Final = ".chunk"
HALF: Final = ".part"


class DiskError(Exception):
    """A chunk that cannot be written, or is not there as it was written; one line: which, where, why."""


class Home:
    """A process's own directory under ``path``."""

    def __init__(self, path: str) -> None:
        """Removes what ended processes have left under ``path``. DiskError if nothing can be written there."""
        self.folder: Path = Path(path) / f"kvmove-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        hidden = self.folder.with_name(f".{self.folder.name}")
        try:
            os.makedirs(path, exist_ok=True)
            _sweep(Path(path))
            hidden.mkdir(mode=0o700)
            self.lock: int = os.open(hidden / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hidden.rename(self.folder)
        except OSError as error:
            raise DiskError(f"cannot keep chunks under {path}: {error.strerror or error}") from error

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self.lock)


def _sweep(path: Path) -> None:
    """Remove the directories of processes that have ended; say so in one line."""
    whole = half = homes = 0
    for folder in sorted(path.glob("kvmove-*")):
        try:
            fd = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # not ours, or somebody removes it at this moment
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            files = [file.name for file in folder.rglob("*")]
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # its process lives
        finally:
            os.close(fd)
        homes += 1
        whole += sum(name.endswith(WHOLE) for name in files)
        half += sum(name.endswith(HALF) for name in files)
    if homes:
        log.info("%s: dropped what %d ended processes left: %d chunks and %d half-written", path, homes, whole, half)


class Carries(Protocol):
    """What brings a chunk's bytes into a file and back, in the thread that asks; OSError: it cannot."""

    def write(self, fd: int, data: Bytes, start: int) -> None:
        """All of ``data``, from byte ``start`` of the file on."""

    def read(self, fd: int, into: Bytes, start: int) -> bool:
        """All of ``into``. False: the file is shorter."""


class Calls:
    """The kernel's calls, which copy while other threads go on."""

    def write(self, fd: int, data: Bytes, start: int) -> None:
        _write(fd, data.data, start)

    def read(self, fd: int, into: Bytes, start: int) -> bool:
        return _read(fd, into, start)


class Store:
    """One location. Any thread; a slot has one writer at a time, and no reader meanwhile."""

    def __init__(
        self, name: str, slots: int, slot_bytes: int, home: Optional[Home], by: Optional[Carries] = None
    ) -> None:
        """``by``: what carries the bytes of chunks; none: ``Calls``."""
        self.name: str = name
        self.by: Carries = by or Calls()
        self.slot_bytes: int = slot_bytes
        self.lock: threading.Lock = threading.Lock()
        self.wrong: int = 0
        """Reads that did not find what they should have."""
        self.folder: Optional[Path] = None
        self.file: Any = None
        try:
            if home is not None:
                self.folder = home.folder / "".join(c if c.isalnum() else "-" for c in name)
                self.folder.mkdir()
            else:
                self.file = tempfile.TemporaryFile(prefix="kvmove-")  # noqa: SIM115
        except OSError as error:
            where = home.folder if home is not None else tempfile.gettempdir()
            raise DiskError(f"{name}: cannot keep chunks under {where}: {error.strerror or error}") from error
        self.stride: int = PAGE + -(-slot_bytes // PAGE) * PAGE
        free = shutil.disk_usage(self.folder or tempfile.gettempdir()).free
        if free < slots * self.stride:
            log.warning("%s: %d bytes are free under %s, %d would be needed to fill it",
                        name, free, self.folder or tempfile.gettempdir(), slots * self.stride)  # fmt: skip

    def write(self, slot: int, data: Bytes, key: bytes, by: Optional[Carries] = None) -> None:
        """``by``: what carries these bytes, if not what carries the others. DiskError: what was there before is gone,
        and nothing is there instead."""
        head = _head(data, key)
        by = by or self.by
        fd = -1
        part: Optional[Path] = None
        try:
            if self.folder is not None:
                part = self._path(slot, HALF)
                fd, start = os.open(part, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_CLOEXEC, 0o600), 0
                _write(fd, head, start)
                by.write(fd, data, start + PAGE)
                part.rename(self._path(slot, WHOLE))
            else:
                start = slot * self.stride
                _write(self.file.fileno(), bytes(PAGE), start)
                by.write(self.file.fileno(), data, start + PAGE)
                _write(self.file.fileno(), head, start)
        except OSError as error:
            if part is not None:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.drop([slot])
            raise DiskError(f"{self.name}: slot {slot} cannot be written: {error.strerror or error}") from error
        finally:
            if fd >= 0:
                os.close(fd)

    def read(self, slot: int, into: Bytes, key: bytes = b"", by: Optional[Carries] = None) -> None:
        """The first ``len(into)`` bytes of a slot. ``key``: whose they must be; none: whoever's. DiskError: they are
        not there, or not what was written; ``into`` may hold anything then."""
        try:
            fd, start = self._open(slot)
        except OSError as error:
            raise self._wrong(slot, "holds nothing") from error
        try:
            head = os.pread(fd, PAGE, start)
            size, total, found = self._head(slot, head)
            if key and found != key:
                raise self._wrong(slot, f"holds chunk {found.hex()[:16]}, not {key.hex()[:16]}")
            if size < len(into):
                raise self._wrong(slot, f"holds {size} bytes, not {len(into)}")
            whole = into if size == len(into) else np.empty(size, dtype=np.uint8)
            if not (by or self.by).read(fd, whole, start + PAGE) or _sum(whole, found) != total:
                raise self._wrong(slot, "is not what was written: its checksum differs")
            if whole is not into:
                into[:] = whole[: len(into)]
        except OSError as error:
            raise self._wrong(slot, f"cannot be read: {error.strerror or error}") from error
        finally:
            if self.folder is not None:
                os.close(fd)

    def _head(self, slot: int, page: bytes) -> Tuple[int, int, bytes]:
        """(bytes, checksum, key)"""
        if len(page) < _HEAD.size + _SUM.size or not any(page[: _HEAD.size]):
            raise self._wrong(slot, "holds nothing")
        magic, size, total, length, key = _HEAD.unpack_from(page)
        (check,) = _SUM.unpack_from(page, _HEAD.size)
        if magic != MAGIC or check != xxhash.xxh3_64_intdigest(page[: _HEAD.size]) or size > self.slot_bytes:
            raise self._wrong(slot, "does not begin as a chunk does")
        return size, total, key[:length]

    def _wrong(self, slot: int, why: str) -> DiskError:
        with self.lock:
            self.wrong += 1
        where = f" ({self._path(slot, WHOLE)})" if self.folder is not None else ""
        return DiskError(f"{self.name}: slot {slot} {why}{where}")

    def drop(self, slots: Sequence[int]) -> None:
        """Nothing is in these slots any more."""
        for slot in slots:
            if self.folder is not None:
                self._path(slot, WHOLE).unlink(missing_ok=True)
            elif os.fstat(self.file.fileno()).st_size > slot * self.stride:
                os.pwrite(self.file.fileno(), bytes(PAGE), slot * self.stride)

    def close(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self.file.close()

    def _path(self, slot: int, ending: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{slot:08d}{ending}"

    def _open(self, slot: int) -> Tuple[int, int]:
        """(file, where the slot begins in it)"""
        if self.folder is None:
            return self.file.fileno(), slot * self.stride
        return os.open(self._path(slot, WHOLE), os.O_RDONLY | os.O_CLOEXEC), 0


def _head(data: Bytes, key: bytes) -> bytes:
    if len(key) > KEY_BYTES:
        raise DiskError(f"a key of {len(key)} bytes, expected at most {KEY_BYTES}")
    head = _HEAD.pack(MAGIC, len(data), _sum(data, key), len(key), key)
    return (head + _SUM.pack(xxhash.xxh3_64_intdigest(head))).ljust(PAGE, b"\0")


def _sum(data: Bytes, key: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data.data, int.from_bytes(key[:8], "little"))


def _write(fd: int, data: Any, start: int) -> None:
    left: memoryview = memoryview(data)
    while left:
        done = os.pwrite(fd, left[:WRITE_BYTES], start)
        left, start = left[done:], start + done


def _read(fd: int, into: Bytes, start: int) -> bool:
    """False: the file is shorter."""
    left: memoryview = into.data
    while left:
        done = os.preadv(fd, [left], start)
        if not done:
            return False
        left, start = left[done:], start + done
    return True


def files_in(folder: Path) -> List[Path]:
    """Whole and half-written chunks under a folder."""
    return sorted(file for file in folder.rglob("*") if file.suffix in (WHOLE, HALF))
