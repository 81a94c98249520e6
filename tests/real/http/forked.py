"""Lives of a controller, forked from a process that has imported all of it: a life begins in a tenth of a second.

Each line on standard input is a command, ``{"argv": [...], "out": FILE, "die_before": N, "flush": true}``; the answer
is the new life's process id. With ``die_before`` that life kills itself by SIGKILL right before the N-th effect of the
first move that it begins; with ``flush`` what it sent before has been sent. An empty line waits for a life's end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, Callable

import kvmove.cli
import kvreal.controller
from kvcore.protocol import machine as m
from kvreal.service import Service


class Dying(Service):
    die_before = 0
    flush = True

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.begun = 0
        self.met = 0
        #: a machine that is busy with other things sends some of it again, which moves no death elsewhere
        self.seen: set[tuple[str, str, str]] = set()
        for kind, carry in list(self.node.effects.items()):
            self.node.effects[kind] = self.counted(carry)

    def mine(self, effect: m.Effect) -> bool:
        """Of the first event that this life begins."""
        what = _what(effect)
        if not self.begun and isinstance(what, m.Begin):
            self.begun = what.event
        return bool(self.begun) and getattr(what, "event", 0) == self.begun

    def counted(self, carry: Callable[[Any], None]) -> Callable[[Any], None]:
        def counted(effect: m.Effect) -> None:
            what = _what(effect)
            once = (type(what).__name__, getattr(effect, "dst", ""), getattr(what, "state", ""))
            if self.mine(effect) and once not in self.seen:
                self.seen.add(once)
                self.met += 1
                if self.met == self.die_before:
                    print(f"dies before {type(_what(effect)).__name__}", flush=True)
                    if self.flush:
                        self.network.send_off()
                    os.kill(os.getpid(), signal.SIGKILL)
            carry(effect)

        return counted


def _what(effect: m.Effect) -> Any:
    return effect.msg if isinstance(effect, m.Send) else effect.record if isinstance(effect, m.Journal) else None


def life(command: dict[str, Any]) -> None:
    """In the child; does not return."""
    out = os.open(command["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, to in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(fd, to)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    Dying.die_before = command["die_before"]
    Dying.flush = command["flush"]
    kvreal.controller.Service = Dying  # type: ignore[misc]
    status = 1
    try:
        status = kvmove.cli.call(command["argv"])
    finally:
        os._exit(status)


def main() -> None:
    pid = 0
    for line in sys.stdin:
        if line.strip():
            pid = os.fork()
            if pid == 0:
                life(json.loads(line))
            print(pid, flush=True)
        else:
            print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
