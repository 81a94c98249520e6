"""Small scenarios for the real world: kilobytes, and constants a tenth of the defaults."""

from __future__ import annotations

from typing import Any

from kvcore.scenario.build import Built, build
from kvcore.scenario.loader import loads

HEAD = """
name: {name}
order: racing
kv: {{bytes_per_token: 1 KiB, chunk: 16 tokens, direction: {direction}}}
constants: {{scale: 0.1, copy_max: {copy_max}}}
deadline: 20 s
instances:
  a: {{ranks: {ranks}, locations: {{LocalCPUBackend: 1 MiB, LocalDiskBackend: 1 MiB}}}}
  b: {{ranks: {ranks}, locations: {{LocalCPUBackend: 1 MiB}}}}
"""

MOVE = """
steps:
  - store: {at: a/LocalCPUBackend, prompt: p, tokens: 200}
  - move: {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p, as: m}
  - settle:
  - lookup: {prompt: p, as: found}
"""


def scenario(body: str = MOVE, faults: str = "", **head: Any) -> Built:
    """A scenario of two instances; ``faults``: YAML list items, or nothing."""
    top = HEAD.format(**{"name": "test", "direction": "read", "ranks": 1, "copy_max": "6 s", **head})
    text = top + body + (f"faults:\n{faults}\n" if faults else "")
    return build(loads(text, "test.yaml"))
