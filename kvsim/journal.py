"""A controller's journal: in memory, outliving the controller's crashes.

It would grow for ever; what no restart asks for is dropped now and then: all of an event that ended more than
``events_kept`` events ago, and epochs that a later one of the same process has replaced.
"""

from __future__ import annotations

from typing import Dict, List, Tuple, final

from kvcore.protocol.machine import Begin, Decide, EpochIssued, Incarnation, JournalRecord, Outcome, Promised


@final
class Journal:
    def __init__(self, events_kept: int) -> None:
        self.events_kept: int = events_kept
        self.records: List[JournalRecord] = []
        self.limit: int = 3 * events_kept + 10_000

    def append(self, record: JournalRecord) -> None:
        self.records.append(record)
        if len(self.records) > self.limit:
            self.records = compacted(self.records, self.events_kept)
            self.limit = max(self.limit, 2 * len(self.records))

    def all(self) -> Tuple[JournalRecord, ...]:
        """Oldest first, as Boot wants them."""
        return tuple(self.records)


def compacted(records: List[JournalRecord], events_kept: int) -> List[JournalRecord]:
    """The records that still mean something, in their order."""
    ended: Dict[int, None] = {}
    newest: Dict[Tuple[str, int], int] = {}
    for record in records:
        if isinstance(record, Outcome):
            ended[record.event] = None
        elif isinstance(record, EpochIssued):
            newest[(record.address, record.register.rank)] = record.epoch
    old = dict.fromkeys(list(ended)[: max(0, len(ended) - events_kept)])
    last = max([record.incarnation for record in records if isinstance(record, Incarnation)], default=0)
    kept: List[JournalRecord] = []
    for record in records:
        if isinstance(record, (Begin, Promised, Decide, Outcome)):
            if record.event not in old:
                kept.append(record)
        elif isinstance(record, EpochIssued):
            if newest[(record.address, record.register.rank)] == record.epoch:
                kept.append(record)
        elif record.incarnation == last:
            kept.append(record)
    return kept
