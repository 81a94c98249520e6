"""The loop under every process that stays: uvloop where it is installed, and few collections of garbage.

What a process has loaded and built when it begins to serve stays until it ends; looking through it again and again
costs milliseconds each time, and finds nothing.
"""

from __future__ import annotations

import asyncio
import gc
from typing import Final

THRESHOLDS: Final = (10_000, 20, 50)
"""Python's own are 700, 10, 10: a collection every few requests."""


def runner() -> asyncio.Runner:
    """With uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.Runner()
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def settle() -> None:
    """Call it once, when all is built: what is here now is not looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
