"""What an engine is to a rank: whoever writes KV into slots of its memory, and reads it out again.

    class Mine:                                     # kvreal.engines.synthetic, .transformers
        def fill(self, memory, task, bytes_per_token): ...
        def read(self, memory, task, bytes_per_token): ...

    Local(file, rank, sink, said, keys, Mine())     # kvreal.rank; nothing given: the synthetic engine

A StoreRequest ends in ``fill``: the slots are this task's alone, and become visible under their keys once True is
returned. A UseRequest ends in ``read``: the slots hold what their keys stand for, and stay until it returns. Both are
called from one thread beside the loop, one task after the other. They know the chunks by their keys only: an engine
says beforehand, to itself, where the KV of a key lies or is to be laid, and asks its rank then. An engine in another
process is none of these: what stands in for the thread hands it the slots (kvreal.engines.vllm.desk).
"""

from __future__ import annotations

from typing import Protocol

from kvcore.protocol.machine import StartFill, StartRead
from kvreal.memory import Memory


class Engine(Protocol):
    def fill(self, memory: Memory, task: StartFill, bytes_per_token: int) -> bool:
        """Write chunk ``task.keys[i]``, ``task.lens[i]`` tokens of ``bytes_per_token``, to the beginning of slot
        ``task.slots[i]`` of ``task.location``. False, or any exception: nothing of the task becomes visible."""
        ...

    def read(self, memory: Memory, task: StartRead, bytes_per_token: int) -> bool:
        """Take the chunks out of their slots. False, or any exception: the use has failed (``wrong_bytes``)."""
        ...
