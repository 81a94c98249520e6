"""A controller's journal: JSON lines, appended and handed to the kernel before anything that follows is carried out.

It outlives the process, not the machine: there is no fsync (a SIGKILL loses nothing, a power cut may). A torn last
record is dropped when the journal is read.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final, List, Tuple

import msgspec

from kvcore.protocol.machine import JournalRecord

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(JournalRecord).decode


class JournalError(Exception):
    """The journal cannot be written or read; the message names the file and why. A controller then stops."""


class Journal:
    def __init__(self, path: Path) -> None:
        self.path: Path = path
        try:
            self.fd: int = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise JournalError(f"{path}: cannot write the journal: {error.strerror}") from error

    def append(self, record: JournalRecord) -> None:
        """JournalError if it could not be written whole."""
        data = _encode(record) + b"\n"
        try:
            done = os.write(self.fd, data)
        except OSError as error:
            raise JournalError(f"{self.path}: cannot write the journal: {error.strerror}") from error
        if done != len(data):
            raise JournalError(f"{self.path}: cannot write the journal: only {done} of {len(data)} bytes went in")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def records(path: Path) -> Tuple[JournalRecord, ...]:
    """What a journal holds, oldest first; nothing if there is none. JournalError for a bad record before the last."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise JournalError(f"{path}: cannot read the journal: {error.strerror}") from error
    torn = lines.pop()  # empty when the last record is whole
    found: List[JournalRecord] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_decode(line))
        except msgspec.MsgspecError as error:
            raise JournalError(f"{path}:{number}: not a journal record: {error}") from error
    if torn:
        with contextlib.suppress(msgspec.MsgspecError):  # if it is not whole it was never acted upon
            found.append(_decode(torn))
    return tuple(found)
