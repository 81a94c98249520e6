"""One rank of an instance: its memory, its transport, its service; in this process or in one of its own.

``python -m kvreal.rank`` is a rank above 0: rank 0's process starts it with one end of a socket pair as its standard
input, and asks over it. Each end goes when the other does.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from typing import Any, Callable, Dict, Final, List, Optional, Sequence, Tuple, Union, cast

import msgspec

from kvcore.protocol import machine as m
from kvcore.protocol.messages import Answer, StoreRequest, UseRequest
from kvcore.protocol.worker import Worker
from kvreal.endpoints import CLUSTER, Endpoints, endpoint_of
from kvreal.engines.base import Engine
from kvreal.engines.thread import EngineThread
from kvreal.host import die_with_parent
from kvreal.http.serving import Held, RankGone
from kvreal.instance_file import InstanceFile, read
from kvreal.keys import Keys, load
from kvreal.logs import StepLog, configure, with_dates, with_units
from kvreal.loop import runner, settle
from kvreal.memory import Memory
from kvreal.service import Service, ServiceStopped, WorkerParts
from kvreal.transfer import Transfer, TransferError, make, proof
from kvreal.transfer.posix import named
from kvreal.ucx import respect

log = logging.getLogger("kvmove.instance")

FRAME_MAX: Final = 16 << 20


class Said(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What rank 0's process and the others say to each other."""


class Ask(Said, frozen=True):
    n: int
    request: Union[StoreRequest, UseRequest]


class Told(Said, frozen=True):
    """``answer`` None: the rank cannot answer any more."""

    n: int
    answer: Optional[Answer]


class Registration(Said, frozen=True):
    """``state``: waiting, registered, refused (by another that holds the name), or failed (the process will end)."""

    state: str
    text: str = ""


Frame = Union[Ask, Told, Registration]
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Frame).decode


class Local:
    """A rank in this process."""

    def __init__(
        self,
        file: InstanceFile,
        rank: int,
        sink: int,
        said: Callable[[Registration], None],
        keys: Optional[Keys] = None,
        engine: Union[Engine, Callable[[Memory], Any], None] = None,
        shared: bool = False,
    ) -> None:
        """Binds its sockets and makes its memory. EndpointError, SlabError or TransferError, one line each.
        ``engine``: None for the synthetic one; or what makes something that stands in for EngineThread.
        ``shared``: the engine's own process maps the memory too."""
        self.file: InstanceFile = file
        self.rank: int = rank
        self.said: Callable[[Registration], None] = said
        self.registration: Registration = Registration("waiting")
        port = file.worker_ports[rank] if file.worker_ports else 0
        network = Endpoints(f"{file.host}:{port}", curve=keys)
        self.address: str = network.address
        memory = self.memory = Memory(shared, file.arena, file.arena_bytes)
        memory.disk_path = file.disk_path
        memory.disk_by = None if shared else named(file.disk_io)  # a disk that is mapped too is no file to write into
        if shared:
            tempfile.tempdir = file.disk_path or tempfile.tempdir
        sizes = {place.name: place.slot_size(file.namespace) for place in file.places}
        memory.lay_out(file.locations, 0, other_bytes=sizes)
        data = (endpoint_of(f"{file.host}:0").rpartition(":")[0], file.data_ports[rank] if file.data_ports else 0)
        transfer = transport(file.transport, memory, sink, data, file.profile)
        if keys is not None:
            transfer.windows.secret = keys.window_secret()
        transfer.begin(CLUSTER, self.address)
        controller = endpoint_of(f"{file.controller[0]}:{file.controller[1]}")
        profile = transfer.profile
        names = tuple(transfer.carriers) if file.transport == "auto" else (file.transport,)
        measured = profile.measured(names) if profile is not None else None
        spec = file.spec(rank, self.address, controller, measured)
        thread = engine(memory) if callable(engine) else EngineThread(memory, engine)
        parts = WorkerParts(memory, transfer, thread)
        self.service: Service = Service(spec, network, worker=parts)
        self.service.listeners.append(self._step)
        self.service.onlookers.append(StepLog(f"{file.instance}/{rank}").step)

    def _step(self, now: int, item: m.Input, effects: List[m.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, m.Note) and effect.kind in ("registered", "register_refused", "expelled"):
                self._noted(effect)

    def _noted(self, note: m.Note) -> None:
        if note.kind == "registered":
            self._now(Registration("registered"))
        elif note.kind == "expelled":
            self._now(Registration("waiting", "the controller had lost sight of this rank; registering anew"))
        else:
            why, _, rest = note.detail.partition(": ")
            text = refusal(self.file.instance, why, rest)
            self._now(Registration("waiting" if why == "mismatch" else "refused", text))

    def _now(self, registration: Registration) -> None:
        if registration != self.registration:
            self.registration = registration
            self.said(registration)

    async def start(self) -> None:
        await self.service.start()

    def held(self) -> List[Held]:
        """How full each location is."""
        worker = cast(Worker, self.service.machine)
        return [Held(name, len(pool.index), pool.slots) for name, pool in worker.pools.items()]

    async def ask(self, request: Any) -> Answer:
        try:
            return await self.service.ask(request)
        except ServiceStopped:
            raise RankGone(f"rank {self.rank} has stopped") from None

    async def stop(self) -> None:
        await self.service.stop()
        self.memory.close()


def refusal(instance: str, why: str, rest: str) -> str:
    """One line of a refused registration, with the times in it as people read them."""
    have, _, got = rest.removeprefix("have ").partition(", got ")
    if why == "duplicate_id":
        return f"the instance {instance} is there already, at {with_dates(have)}; this one ({got}) is refused"
    if why == "mismatch":
        return f"the controller has another rank of {instance} with {have}, this one has {got}; asking again"
    if why == "constants":
        return f"the controller refuses {instance}: its {with_units(have)}, and this one's {with_units(got)}"
    return f"the controller refuses {instance}: {why}: it has {have}, this is {got}"


def transport(name: str, memory: Memory, sink: int, at: Tuple[str, int], profile: str = "") -> Transfer:
    """The named one; with ``auto`` those that really start, chosen from by ``profile``. TransferError if there is none.
    """
    warning = respect(os.environ) if name != "tcp" else ""
    if warning:
        log.warning("%s", warning)
    try:
        made = make(name, memory, at, profile)
    except TransferError:  # it says what is lacking
        raise
    except Exception as error:
        raise TransferError(f"transport {name} cannot be had here: {error}") from error
    for lacking, why in made.lacking.items():
        log.warning("%s does not start here (%s); used are: %s", lacking, why, ", ".join(made.carriers))
    made.ucx_prints_to(sink)
    return made


# ---- ranks in processes of their own
class Channel:
    """Frames over one end of a socket pair, in an asyncio loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader: asyncio.StreamReader = reader
        self.writer: asyncio.StreamWriter = writer

    @staticmethod
    async def over(sock: socket.socket) -> Channel:
        return Channel(*await asyncio.open_connection(sock=sock))

    def say(self, frame: Frame) -> None:
        body = _encode(frame)
        if not self.writer.is_closing():
            self.writer.write(struct.pack("<I", len(body)) + body)

    async def hear(self) -> Optional[Frame]:
        """None: the other end has gone."""
        try:
            (size,) = struct.unpack("<I", await self.reader.readexactly(4))
            if size > FRAME_MAX:
                return None
            frame: Frame = _decode(await self.reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError, msgspec.MsgspecError):
            return None
        return frame


class Child:
    """A rank in another process. ``gone`` is called, once, when that process ends unasked."""

    def __init__(
        self,
        rank: int,
        argv: Sequence[str],
        said: Callable[[Registration], None],
        gone: Callable[[str], None],
    ) -> None:
        self.rank: int = rank
        self.said: Callable[[Registration], None] = said
        self.gone: Callable[[str], None] = gone
        self.sock: socket.socket
        self.sock, theirs = socket.socketpair()
        command = [sys.executable, "-m", "kvreal.rank", "--rank", str(rank), "--parent", str(os.getpid()), *argv]
        with theirs:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(command, stdin=theirs.fileno())
        self.channel: Optional[Channel] = None
        self.waiting: Dict[int, asyncio.Future[Answer]] = {}
        self.count: int = 0
        self.listening: Optional[asyncio.Task[None]] = None
        self.stopping: bool = False

    async def start(self) -> None:
        self.channel = await Channel.over(self.sock)
        self.listening = asyncio.create_task(self._listen(self.channel))

    async def _listen(self, channel: Channel) -> None:
        while (frame := await channel.hear()) is not None:
            if isinstance(frame, Registration):
                self.said(frame)
            elif isinstance(frame, Told) and (future := self.waiting.pop(frame.n, None)) and not future.done():
                if frame.answer is None:
                    future.set_exception(RankGone(f"rank {self.rank} has stopped"))
                else:
                    future.set_result(frame.answer)
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(RankGone(f"rank {self.rank} has ended"))
        if not self.stopping:
            status = await asyncio.to_thread(self.process.wait)
            self.gone(f"rank {self.rank} has ended with status {status}")

    async def ask(self, request: Any) -> Answer:
        if self.channel is None or self.listening is None or self.listening.done():
            raise RankGone(f"rank {self.rank} is not there")
        self.count += 1
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.waiting[self.count] = future
        self.channel.say(Ask(self.count, request))
        return await future

    async def stop(self) -> None:
        """Ends within seconds, by force if it must be."""
        self.stopping = True
        if self.channel is not None:
            self.channel.writer.close()
        else:
            self.sock.close()
        try:
            await asyncio.to_thread(self.process.wait, 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)


async def _serve(file: InstanceFile, rank: int, sink: int, sock: socket.socket) -> None:
    channel = await Channel.over(sock)
    local = Local(file, rank, sink, channel.say, keys_of(file))
    await local.start()
    settle()
    open_tasks: set[asyncio.Task[None]] = set()

    async def answer(ask: Ask) -> None:
        try:
            channel.say(Told(ask.n, await local.ask(ask.request)))
        except RankGone:
            channel.say(Told(ask.n, None))

    while isinstance(frame := await channel.hear(), Ask):
        task = asyncio.create_task(answer(frame))
        open_tasks.add(task)
        task.add_done_callback(open_tasks.discard)
    await local.stop()


def keys_of(file: InstanceFile) -> Optional[Keys]:
    """What encrypts this instance's messages, if its file names keys."""
    if not file.keys:
        return None
    return load(file.keys)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="kvreal.rank", description="one rank of an instance, started by rank 0")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--model", default="")
    args = parser.parse_args(list(argv))
    die_with_parent(args.parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 ends this process by hanging up
    sock = socket.socket(fileno=os.dup(0))
    _, sink = proof.redirect_stdout()
    configure()
    logging.getLogger("kvmove.profile").setLevel(logging.ERROR)  # rank 0 says it for all
    try:
        with runner() as one:
            one.run(_serve(read(args.config, args.model), args.rank, sink, sock))
    except Exception as error:
        body = _encode(Registration("failed", f"rank {args.rank}: {' '.join(str(error).split())}"))
        sock.setblocking(True)
        sock.sendall(struct.pack("<I", len(body)) + body)
        return 1
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # daemon threads may sit in a transport's C code
