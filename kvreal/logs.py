"""Logs: for people on a terminal, JSON lines in a pipe. Every line can carry event, node and epoch."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Dict, Final, List, TextIO

import msgspec

from kvcore.protocol import machine as m
from kvcore.protocol.messages import event_name

FIELDS: Final = ("event", "node", "epoch")
log = logging.getLogger("kvmove.events")


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: Dict[str, Any] = {
            "t": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "what": record.getMessage(),
        }
        for name in FIELDS:
            value = getattr(record, name, None)
            if value:
                line[name] = value
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class _Words(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        about = " ".join(f"{name}={value}" for name in FIELDS if (value := getattr(record, name, None)))
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{when} {record.levelname.lower():7} {record.getMessage()}{'  ' + about if about else ''}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure(level: int = logging.INFO, stream: TextIO = sys.stderr) -> None:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Words() if stream.isatty() else _Lines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("uvicorn.access", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class StepLog:
    """A service's listener: says what became of each event, and what the protocol remarked."""

    def __init__(self, node: str) -> None:
        self.node: str = node
        self.epoch: str = ""

    def step(self, now: int, item: m.Input, effects: List[m.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, m.Journal):
                self._journaled(effect.record)
            elif isinstance(effect, m.Note) and effect.kind != "decided":
                if effect.kind == "registered":
                    self.epoch = event_name(effect.event)
                self._say(f"{effect.kind} {effect.detail}".strip(), effect.event)

    def _journaled(self, record: m.JournalRecord) -> None:
        if isinstance(record, m.Incarnation):
            self.epoch = str(record.incarnation)
        elif isinstance(record, m.Begin):
            self._say("begun", record.event)
        elif isinstance(record, m.Decide):
            self._say(f"decided: {record.num_tokens} tokens", record.event)
        elif isinstance(record, m.Outcome):
            why = f" ({record.reason})" if record.reason else ""
            via = f" by {record.via}" if record.via else ""
            self._say(f"{record.state}{why}: {record.num_tokens} tokens{via}", record.event)

    def _say(self, text: str, event: int) -> None:
        about = {"node": self.node, "epoch": self.epoch, "event": event_name(event) if event else ""}
        log.info(text, extra=about)
