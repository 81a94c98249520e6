"""A loop that sleeps for a millisecond again and again, and writes how late it woke (lateness.py).

While a file NAME.work is there it also does, each time, what a rank does for a lookup of 4,000 tokens.
"""

from __future__ import annotations

import asyncio
import sys
import time
from array import array
from pathlib import Path

from kvcore.protocol.chunks import chunk_keys
from kvcore.protocol.messages import Namespace
from kvreal.engines.vllm.worker import on_all_cores

SLEEP_S = 0.001
SPACE = Namespace()


async def watch(path: Path) -> None:
    """Seconds, as doubles, added to the file every half second."""
    on_all_cores()
    late = array("d")
    written = time.monotonic()
    work = path.with_suffix(".work")
    working = False
    tokens = tuple(range(4000))
    with open(path, "wb", buffering=0) as file:
        while True:
            due = time.monotonic() + SLEEP_S
            await asyncio.sleep(SLEEP_S)
            now = time.monotonic()
            late.append(now - due)
            if working:
                chunk_keys(SPACE, tokens)
            if now - written > 0.5:
                file.write(late.tobytes())
                del late[:]
                written = time.monotonic()
                working = work.exists()


def read(path: Path) -> list[float]:
    found = array("d")
    found.frombytes(path.read_bytes())
    return list(found)


if __name__ == "__main__":
    asyncio.run(watch(Path(sys.argv[1])))
