"""What happened: for every node each (now, input, effects), as JSON lines. One format for both worlds.

The first line is a ``Header``; it holds what was built, so that a log can be replayed through fresh machines. Then come
``Line``s in order of time. A node's life starts with its ``Boot``. A client's operations are the client's Notes.
"""

from __future__ import annotations

import heapq
import itertools
import struct
import warnings
from pathlib import Path
from typing import BinaryIO, Callable, Dict, Final, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import msgspec

from kvcore.protocol.machine import Boot, Effect, Input, Machine
from kvcore.scenario.build import AnySpec, Built, make_machine
from kvcore.scenario.located import in_words
from kvcore.scenario.units import dec_hook, enc_hook

VERSION: Final = 2
#: A stream is written when so many bytes are waiting.
_CHUNK_BYTES: Final = 1 << 18
#: Before each packed line: its bytes.
_SIZE: Final = struct.Struct("<I")

Encoder = Union[msgspec.json.Encoder, msgspec.msgpack.Encoder]


class HistoryError(Exception):
    """One line for people: which file, which line, what is wrong with it."""


class Header(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, tag="kvmove history"):
    """``world``: sim or real. ``node``: set in the file of one process; ``built`` may be left out there. ``packed``:
    its lines are no JSON but frames of msgpack, for a process whose moves are timed: they cost a third."""

    version: int
    world: str
    scenario: str
    seed: int = 0
    built: Optional[Built] = None
    node: str = ""
    packed: bool = False


class Line(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """At ``t`` ns ``node`` took ``input`` and asked for ``out``, in this order."""

    t: int
    node: str
    input: Input
    out: List[Effect]


class _Place(msgspec.Struct, frozen=True, gc=False):
    """What merging needs of a line."""

    t: int
    node: str


# ---- sinks: decided once a run ---------------------------------------------------------------------------------------
class NoHistory:
    """Keeps nothing. Base of the sinks; ``on`` False lets a driver skip the call."""

    def __init__(self, on: bool = False) -> None:
        self.on: bool = on

    def add(self, t: int, node: str, item: Input, out: List[Effect]) -> None:
        """One step of one node. ``out`` must not change afterwards."""

    def flush(self) -> None:
        """What was added so far outlives this process."""

    def close(self) -> None:
        """Nothing is added any more. May be called twice."""


class ListHistory(NoHistory):
    """Keeps the lines in memory: for small runs, tests and searches."""

    def __init__(self, header: Optional[Header] = None) -> None:
        super().__init__(True)
        self.header: Optional[Header] = header
        self.lines: List[Line] = []

    def add(self, t: int, node: str, item: Input, out: List[Effect]) -> None:
        self.lines.append(Line(t, node, item, out))


class FileHistory(NoHistory):
    """Streams to a file, some 256 KiB at a time; ``flush`` writes at once. HistoryError if the file cannot be written:
    the first time, and no more after that, so that closing on the way out says it once."""

    def __init__(self, path: Path, header: Header) -> None:
        super().__init__(True)
        self.path: Path = path
        json = msgspec.json.Encoder(enc_hook=enc_hook)
        self._packed: bool = header.packed
        self._encoder: Encoder = msgspec.msgpack.Encoder(enc_hook=enc_hook) if header.packed else json
        self._buffer: bytearray = bytearray()
        self._file: Optional[BinaryIO] = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise HistoryError(f"{path}: cannot write the history: {error.strerror}") from error
        self._buffer += json.encode(header) + b"\n"
        self.flush()

    def add(self, t: int, node: str, item: Input, out: List[Effect]) -> None:
        buffer = self._buffer
        start = len(buffer)
        if self._packed:
            buffer += _SIZE.pack(0)
            self._encoder.encode_into(Line(t, node, item, out), buffer, -1)
            _SIZE.pack_into(buffer, start, len(buffer) - start - _SIZE.size)
        else:
            self._encoder.encode_into(Line(t, node, item, out), buffer, -1)
            buffer += b"\n"
        if len(buffer) > _CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        file = self._file
        waiting = memoryview(self._buffer)
        self._buffer = bytearray()
        if file is None:
            return
        try:
            done = 0
            while done < len(waiting):
                done += file.write(waiting[done:]) or 0
        except OSError as error:
            self._file = None
            file.close()
            raise HistoryError(f"{self.path}: cannot write the history: {error.strerror}") from error

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None


# ---- reading ---------------------------------------------------------------------------------------------------------
def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def read(path: Path, warn: Callable[[str], None] = _warn) -> Tuple[Header, Iterator[Line]]:
    """The header, and the lines as they are read from the file. A last line that was cut off is dropped with a warning;
    anything else that is no history raises HistoryError, naming file and line."""
    header, raw = _read_raw(path, warn)
    return header, _lines(path, raw)


def _lines(path: Path, raw: Iterator[Tuple[int, bytes]]) -> Iterator[Line]:
    decoder = msgspec.json.Decoder(Line)
    for number, text in raw:
        yield _decoded(decoder, path, number, text)


def _decoded(decoder: msgspec.json.Decoder[Line], path: Path, number: int, text: bytes) -> Line:
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HistoryError(f"{path}:{number}: not a line of a history: {in_words(str(error))}") from error


def _read_raw(path: Path, warn: Callable[[str], None]) -> Tuple[Header, Iterator[Tuple[int, bytes]]]:
    """(header, (line number, line without its end) for the rest)."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise HistoryError(f"{path}: cannot read the history: {error.strerror}") from error
    try:
        first = file.readline()
        header = msgspec.json.decode(first, type=Header, dec_hook=dec_hook)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        file.close()
        what = "it is empty" if not first else in_words(str(error))
        raise HistoryError(f"{path}:1: not a kvmove history: {what}") from error
    except OSError as error:
        file.close()
        raise HistoryError(f"{path}: cannot read the history: {error.strerror}") from error
    if header.version != VERSION:
        file.close()
        raise HistoryError(f"{path}:1: history of version {header.version}, expected {VERSION}")
    return header, _unpacked(path, file, warn) if header.packed else _rest(path, file, warn)


def _rest(path: Path, file: BinaryIO, warn: Callable[[str], None]) -> Iterator[Tuple[int, bytes]]:
    with file:
        for number, text in enumerate(file, 2):
            if text.endswith(b"\n"):
                yield number, text[:-1]
                continue
            try:  # without its end it is whole only if it can be read
                msgspec.json.decode(text, type=Line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                warn(f"{path}:{number}: the last line was cut off and is dropped")
                return
            yield number, text


def _unpacked(path: Path, file: BinaryIO, warn: Callable[[str], None]) -> Iterator[Tuple[int, bytes]]:
    """Frames as the lines that they stand for."""
    decode, encode = msgspec.msgpack.Decoder(Line).decode, msgspec.json.Encoder(enc_hook=enc_hook).encode
    with file:
        for number in itertools.count(2):
            head = file.read(_SIZE.size)
            if not head:
                return
            size = _SIZE.unpack(head)[0] if len(head) == _SIZE.size else 1
            body = file.read(size)
            if len(body) < size:
                warn(f"{path}:{number}: the last line was cut off and is dropped")
                return
            try:
                yield number, encode(decode(body))
            except msgspec.DecodeError as error:
                raise HistoryError(f"{path}:{number}: not a line of a history: {error}") from error


def merge(paths: Sequence[Path], out: Path, header: Header, warn: Callable[[str], None] = _warn) -> None:
    """One history of several processes' files, in order of (t, node); lines of one file keep their order."""
    place = msgspec.json.Decoder(_Place)

    def placed(path: Path) -> Iterator[Tuple[int, str, bytes]]:
        _, raw = _read_raw(path, warn)
        for number, text in raw:
            try:
                at = place.decode(text)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise HistoryError(f"{path}:{number}: not a line of a history: {in_words(str(error))}") from error
            yield at.t, at.node, text

    streams = [placed(path) for path in paths]
    try:
        with open(out, "wb") as file:
            file.write(msgspec.json.encode(header, enc_hook=enc_hook) + b"\n")
            for _, _, text in heapq.merge(*streams, key=_when):
                file.write(text + b"\n")
    except OSError as error:
        raise HistoryError(f"{out}: cannot write the history: {error.strerror}") from error


def _when(item: Tuple[int, str, bytes]) -> Tuple[int, str]:
    return item[0], item[1]


# ---- replay: the same inputs through fresh machines ------------------------------------------------------------------
class Replayed(msgspec.Struct, frozen=True):
    """One line again: ``effects`` are the fresh machine's, ``equal`` says whether they are those of the line."""

    line: Line
    machine: Machine
    effects: List[Effect]
    equal: bool


def replay(header: Header, lines: Iterable[Line]) -> Iterator[Replayed]:
    """Feed every line to a fresh machine of its node; each Boot starts a new one. HistoryError if the header does not
    hold the node, or if a node's first line is not its Boot. A machine's exception passes through."""
    if header.built is None:
        raise HistoryError(f"the history of {header.scenario} does not say what was built, so it cannot be replayed")
    specs: Dict[str, AnySpec] = {spec.name: spec for spec in header.built.specs}
    machines: Dict[str, Machine] = {}
    for line in lines:
        if isinstance(line.input, Boot):
            spec = specs.get(line.node)
            if spec is None:
                raise HistoryError(f"node {line.node} is in the history of {header.scenario}, but not in its header")
            machines[line.node] = make_machine(spec)
        machine = machines.get(line.node)
        if machine is None:
            raise HistoryError(f"node {line.node} of {header.scenario}: its first input is not Boot but {line.input}")
        effects = machine.handle(line.t, line.input)
        yield Replayed(line, machine, effects, effects == line.out)


class ReplayReport(msgspec.Struct, frozen=True):
    """``first``: the first line whose effects differ, for people; empty if all are equal."""

    equal: bool
    nodes: int
    lines: int
    unequal: int
    first: str = ""


def check_replay(header: Header, lines: Iterable[Line]) -> ReplayReport:
    """Replay all of it and count."""
    nodes: Dict[str, int] = {}
    total = unequal = 0
    first = ""
    for step in replay(header, lines):
        total += 1
        nodes[step.line.node] = nodes.get(step.line.node, 0) + 1
        if not step.equal:
            unequal += 1
            first = first or _difference(step)
    return ReplayReport(unequal == 0, len(nodes), total, unequal, first)


def _difference(step: Replayed) -> str:
    line = step.line
    head = f"{line.node} at {line.t} ns on {type(line.input).__name__}"
    for index, (was, now) in enumerate(zip(line.out, step.effects)):
        if was != now:
            return f"{head}: effect {index} was {was}, replayed {now}"
    return f"{head}: {len(line.out)} effects were recorded, {len(step.effects)} replayed"
