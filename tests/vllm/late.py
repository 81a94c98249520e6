"""A loop that sleeps for a millisecond again and again, and writes how late it woke (lateness.py)."""

from __future__ import annotations

import asyncio
import sys
import time
from array import array
from pathlib import Path

from kvreal.engines.vllm.worker import on_all_cores

SLEEP_S = 0.001


async def watch(path: Path) -> None:
    """Seconds, as doubles, added to the file every half second."""
    on_all_cores()
    late = array("d")
    written = time.monotonic()
    with open(path, "wb", buffering=0) as file:
        while True:
            due = time.monotonic() + SLEEP_S
            await asyncio.sleep(SLEEP_S)
            now = time.monotonic()
            late.append(now - due)
            if now - written > 0.5:
                file.write(late.tobytes())
                del late[:]
                written = time.monotonic()


def read(path: Path) -> list[float]:
    found = array("d")
    found.frombytes(path.read_bytes())
    return list(found)


if __name__ == "__main__":
    asyncio.run(watch(Path(sys.argv[1])))
