"""What one step's side of the connector counts: a flat dict that adds up, over steps, sides and workers."""

from __future__ import annotations

from typing import Dict, Final, List, Tuple

LABELS: Final[Dict[str, Tuple[str, ...]]] = {
    "loaded_tokens": ("source", "tier"),
    "stored_tokens": ("tier",),
    "loads": ("mode",),
    "load_seconds": ("mode",),
    "load_failures": ("reason",),
    "failed_load_tokens": ("reason",),
    "store_short": ("reason",),
    "stores": (),
    "store_seconds": (),
    "lookups": ("outcome",),
    "lookup_wait_seconds": (),
}

ABOUT: Final[Dict[str, str]] = {
    "loaded_tokens": "Prompt tokens whose KV was loaded, by how it came here (moved, stored) and tier.",
    "stored_tokens": "Prompt tokens whose KV was stored; those that were held already do not count.",
    "loads": "Loads that ended well; a sync one delays the step that it is in.",
    "load_seconds": "Time that loads took.",
    "load_failures": "Loads that failed; vLLM counts their tokens as hits all the same.",
    "failed_load_tokens": "Tokens of loads that failed.",
    "store_short": "Prompts that were not stored, or not whole.",
    "stores": "Stores that ended well.",
    "store_seconds": "Time that stores took, beside the engine's steps.",
    "lookups": "Prompts looked up, by outcome.",
    "lookup_wait_seconds": "Time that the scheduler waited for answers to lookups.",
}

Counts = Dict[str, float]


class Tally:
    """``add("loads", 1, "sync")``; ``take()`` returns what has come together since, as "name|label|..." -> number."""

    def __init__(self) -> None:
        self.counts: Counts = {}

    def add(self, name: str, value: float, *labels: str) -> None:
        assert len(labels) == len(LABELS[name]), name
        key = "|".join([name, *[label.replace("|", "/") for label in labels]])
        self.counts[key] = self.counts.get(key, 0) + value

    def take(self) -> Counts:
        found, self.counts = self.counts, {}
        return found


def parse(key: str) -> Tuple[str, List[str]]:
    """(name, label values)."""
    name, *labels = key.split("|")
    return name, labels
