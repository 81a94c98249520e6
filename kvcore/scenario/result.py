"""What a run gives back, in either world: operations, violations, placement, phases of each move."""

from __future__ import annotations

from typing import Tuple

import msgspec

from kvcore.protocol.messages import Found, SourceOutcome, event_name


class Operation(msgspec.Struct, gc=False, omit_defaults=True, forbid_unknown_fields=True):
    """One client operation. ``state``: open, an event's state, ok, refused, or info (no answer: it may have happened).

    ``promised``: the num_tokens of a move's first answer; ``num_tokens`` the last word. -1 ns: not yet.
    """

    op: str
    what: str
    state: str = "open"
    num_tokens: int = 0
    promised: int = 0
    event: int = 0
    reason: str = ""
    detail: str = ""
    n: int = 0
    source: Tuple[SourceOutcome, ...] = ()
    found: Tuple[Found, ...] = ()
    text: str = ""
    start_ns: int = -1
    end_ns: int = -1

    @property
    def event_id(self) -> str:
        """The event as people see it; empty for an operation without one."""
        return event_name(self.event) if self.event else ""

    @property
    def duration_ns(self) -> int:
        """From request to end; -1 if it has not ended."""
        return self.end_ns - self.start_ns if self.end_ns >= 0 else -1
