"""``kvmove controller``, except that it is killed by SIGKILL right after its KVMOVE_DIE_AT-th effect of a move.

Counted are the effects of steps that concern clients and their events: the answers to beats and registrations are not.
``KVMOVE_DIE_AFTER`` says which effect it was by writing it to that file first.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, Callable, Dict

from kvcore.protocol import machine as m
from kvcore.protocol.messages import Expelled, PeerGone, Probe, Registered, Resync
from kvmove.cli import main
from kvreal import service

OTHERS = (Registered, Resync, Probe, Expelled, PeerGone)
PRIVATE = (m.Incarnation, m.EpochIssued)


class Counting(service.Service):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.left = int(os.environ["KVMOVE_DIE_AT"])
        effects: Dict[Any, Callable[[Any], None]] = self.node.effects
        for kind in list(effects):
            effects[kind] = self.counted(effects[kind])

    def counted(self, carry: Callable[[Any], None]) -> Callable[[Any], None]:
        def counted(effect: Any) -> None:
            carry(effect)
            if isinstance(effect, m.Send) and isinstance(effect.msg, OTHERS):
                return
            if isinstance(effect, m.Note) or (isinstance(effect, m.Journal) and isinstance(effect.record, PRIVATE)):
                return
            self.left -= 1
            if self.left == 0:
                what = effect.msg if isinstance(effect, m.Send) else effect.record
                Path(os.environ["KVMOVE_DIE_AFTER"]).write_text(type(what).__name__)
                self.network.send_off()  # what was sent was sent
                os.kill(os.getpid(), signal.SIGKILL)

        return counted


if __name__ == "__main__":
    from kvreal import controller

    controller.Service = Counting  # type: ignore[misc]
    main()
