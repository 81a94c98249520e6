"""Is an SQLite write-ahead log damaged before its end?

SQLite stops reading a log at the first frame whose checksum is wrong, and takes it for the end: right after a crash,
where the last transaction is torn, and silently wrong for a byte that went bad in the middle, behind which committed
transactions are lost. Frames of the same log carry its salts, so what follows a bad frame tells the two apart.
https://www.sqlite.org/fileformat2.html#the_write_ahead_log
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final, Tuple

HEADER: Final = 32
FRAME_HEADER: Final = 24
MAGIC: Final = (0x377F0682, 0x377F0683)
WORD: Final = 0xFFFFFFFF


def damage(path: Path) -> str:
    """What is wrong with the log at ``path``, in a few words; "" if nothing is, or there is none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    if len(data) < HEADER:
        return ""
    magic, version, size, _, salt1, salt2, sum1, sum2 = struct.unpack(">8I", data[:HEADER])
    big = magic == MAGIC[1]
    if magic not in MAGIC or _sums(data[:24], big, (0, 0)) != (sum1, sum2):
        return f"{path.name} has a bad header" if len(data) > HEADER else ""
    step = FRAME_HEADER + (65536 if size == 1 else size)
    sums = (sum1, sum2)
    bad = 0
    later = 0
    for number, start in enumerate(range(HEADER, len(data) - step + 1, step), 1):
        frame = data[start : start + step]
        page, commit, frame1, frame2, want1, want2 = struct.unpack(">6I", frame[:FRAME_HEADER])
        if (frame1, frame2) != (salt1, salt2):
            if not bad:
                return ""  # what is left of an earlier round
            continue
        if not bad:
            sums = _sums(frame[FRAME_HEADER:], big, _sums(frame[:8], big, sums))
            if sums != (want1, want2):
                bad = number
        if bad and number > bad and commit:
            later += 1
    # One commit behind a bad frame may be the torn last transaction itself, whose pages reached the disk out of order.
    return f"{path.name} has a bad frame, number {bad}, with {later} transactions behind it" if later > 1 else ""


def _sums(data: bytes, big: bool, sums: Tuple[int, int]) -> Tuple[int, int]:
    words = struct.unpack(f"{'>' if big else '<'}{len(data) // 4}I", data)
    first, second = sums
    for a, b in zip(words[::2], words[1::2]):
        first = (first + a + second) & WORD
        second = (second + b + first) & WORD
    return first, second
