"""Logs: words for people on a terminal, a JSON object a line in a pipe (or as ``KVMOVE_LOG`` says: json or human), from
``KVMOVE_LOG_LEVEL`` on (info; warning is silent about moves that go well).

Every line names the node that says it and, where there is one, its life (``epoch``: a controller's incarnation, a
worker's epoch) and the ``event`` that it is about. ``peer`` and ``peer_epoch``: the process that it is about.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Callable, Dict, Final, List, Optional, TextIO, Union

import msgspec

from kvcore.protocol import machine as m
from kvcore.protocol.messages import Committed, MoveRequest, PinRequest, Released, Retain, event_name

FIELDS: Final = ("event", "node", "epoch", "peer", "peer_epoch")
LIVES: Final = frozenset({"registered", "expelled", "believed", "dead"})
"""Notes whose number is an epoch, not an event."""
_SINCE: Final = re.compile(r"since (\d{1,19}) ns")
log = logging.getLogger("kvmove.events")


@lru_cache(4)
def _second(at: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))


class _Lines(logging.Formatter):
    """``always``: what each line of this process says of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.always: Dict[str, str] = {}

    def fields(self, record: logging.LogRecord) -> Dict[str, str]:
        found: Dict[str, str] = {}
        for name in FIELDS:
            value = getattr(record, name, None) or self.always.get(name)
            if value:
                found[name] = str(value)
        return found

    def format(self, record: logging.LogRecord) -> str:
        line: Dict[str, Any] = {
            "t": f"{_second(int(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "what": record.getMessage(),
            **self.fields(record),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class _Words(_Lines):
    def format(self, record: logging.LogRecord) -> str:
        about = " ".join(f"{name}={value}" for name, value in self.fields(record).items())
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = f"{when} {level}{record.getMessage()}{'  ' + about if about else ''}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure(level: int = logging.INFO, stream: Optional[TextIO] = None) -> None:
    """Log to ``stream`` (stderr) from now on, in place of wherever logs went before."""
    # What no line of ours shows: asking for it takes longer than writing the line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    stream = sys.stderr if stream is None else stream
    wanted = os.environ.get("KVMOVE_LOG", "")
    words = wanted == "human" if wanted in ("human", "json") else stream.isatty()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Words() if words else _Lines())
    named = logging.getLevelNamesMapping().get(os.environ.get("KVMOVE_LOG_LEVEL", "").upper(), level)
    logging.basicConfig(level=named, handlers=[handler], force=True)
    for noisy in ("uvicorn", "httpx", "httpcore", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def always(**fields: str) -> None:
    """What each later line of this process says of itself: node, epoch."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, _Lines):
            handler.formatter.always.update(fields)


class StepLog:
    """A service's listener: says what became of each event, and what the protocol remarked."""

    def __init__(self, node: str, who: Callable[[str], str] = lambda address: "") -> None:
        """``who``: the instance and rank at an address, if that is known."""
        self.node: str = node
        self.epoch: str = ""
        self.who: Callable[[str], str] = who
        #: address -> who is there, for when that is not known any more
        self.names: Dict[str, str] = {}
        always(node=node)

    def step(self, now: int, item: m.Input, effects: List[m.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, m.Journal):
                self._journaled(effect.record)
            elif isinstance(effect, m.Note):
                self._noted(effect)
            elif isinstance(effect, m.Send) and isinstance(effect.msg, (Committed, Released)):
                self._told(item, effect.msg)

    def _told(self, item: m.Input, message: Union[Committed, Released]) -> None:
        """A worker's part in a move is over."""
        if isinstance(message, Released):
            why = f" ({message.why})" if message.why else ""
            self._say(f"released: {message.deleted} chunks deleted, {message.kept} kept{why}", message.event)
        elif message.n and not (isinstance(item, m.Received) and isinstance(item.msg, Retain)):
            via = f" by {message.via}" if message.via else ""
            self._say(f"committed: {message.n} chunks{via}, {len(message.present)} were here before", message.event)

    def _lives(self, epoch: str) -> None:
        self.epoch = epoch
        always(epoch=epoch)

    def _noted(self, note: m.Note) -> None:
        if note.kind == "decided" or not log.isEnabledFor(logging.INFO):
            return  # the journal's record says more
        if note.kind == "registered":
            self._lives(event_name(note.event))
            self._say("registered")
        elif note.kind == "expelled":
            self._say("expelled: this epoch is over", level=logging.WARNING)
        elif note.kind in LIVES:
            here = note.kind == "believed"
            if here:
                self.names[note.detail] = self.who(note.detail) or note.detail
            who = self.names.get(note.detail, note.detail) if here else self.names.pop(note.detail, note.detail)
            text = f"{who} {'is here' if here else 'is not heard any more'}"
            level = logging.INFO if here else logging.WARNING
            self._say(text, peer=note.detail, peer_epoch=event_name(note.event), level=level)
        elif note.kind == "register_refused":
            self._say(f"refused to register: {in_words(note.detail)}", level=logging.WARNING)
        elif note.kind == "constants_differ":
            self._say(f"constants differ: {with_units(note.detail)}; say the same at both", level=logging.WARNING)
        elif note.kind in ("stale_epoch", "stale_incarnation", "unexpected"):
            level = logging.WARNING if note.kind == "unexpected" else logging.INFO
            self._say(f"{note.kind.replace('_', ' ')}: {note.detail}", note.event, level=level)
        else:
            self._say(f"{note.kind.replace('_', ' ')} {note.detail}".strip(), note.event)

    def _journaled(self, record: m.JournalRecord) -> None:
        if isinstance(record, m.Incarnation):
            self._lives(str(record.incarnation))
            self._say("started")
        elif not log.isEnabledFor(logging.INFO):
            return
        elif isinstance(record, m.Begin):
            self._say(f"begun: {_asked(record.request)}", record.event)
        elif isinstance(record, m.Decide):
            self._say(f"decided: {record.num_tokens} tokens", record.event)
        elif isinstance(record, m.Outcome):
            why = f" ({record.reason})" if record.reason else ""
            via = f" by {record.via}" if record.via else ""
            detail = f": {record.detail}" if record.detail else ""
            self._say(f"{record.state}{why}: {record.num_tokens} tokens{via}{detail}", record.event)

    def _say(self, text: str, event: int = 0, *, level: int = logging.INFO, **peer: str) -> None:
        about = {"node": self.node, "epoch": self.epoch, "event": event_name(event) if event else "", **peer}
        log.log(level, "%s", text, extra=about)


def with_dates(text: str) -> str:
    """Times in a message's words, ``since 1795529131000000000 ns``, as people read them."""

    def when(match: re.Match[str]) -> str:
        at = datetime.fromtimestamp(int(match.group(1)) / 1e9, UTC)
        return f"since {at:%Y-%m-%d %H:%M:%S} UTC"

    return _SINCE.sub(when, text)


def in_words(refusal: str) -> str:
    """A refused registration's detail: with dates, or with seconds where it is about constants."""
    return with_units(refusal) if ": constants," in refusal else with_dates(refusal)


def with_units(text: str) -> str:
    """Constants in a message's words, ``beat_ns=1000000`` or ``beat_ns is 1000000 here, 5 there``, in seconds."""
    plain = re.sub(r"\b(\w+)_ns\b", r"\1", text)
    return re.sub(r"(?<=[= ])(\d{4,19})\b(?!\.)", lambda match: f"{int(match.group(1)) / 1e9:g} s", plain)


def _asked(request: Any) -> str:
    if isinstance(request, MoveRequest):
        what = "copy" if request.copy else "move"
        much = f"{sum(request.lens)} tokens" if request.keys else "all"
        to = ", ".join("/".join(place) for place in (request.dst, *request.also))
        return f"{what} {much} from {'/'.join(request.src)} to {to}"
    if isinstance(request, PinRequest):
        return f"pin {sum(request.lens)} tokens at {'/'.join(request.position)}"
    return type(request).__name__
