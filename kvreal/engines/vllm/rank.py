"""One rank's process beside one vLLM worker: ``python -m kvreal.engines.vllm.rank``.

The worker starts it with one end of a socket pair as its standard input, and gets its slabs' descriptors over that. The
process ends with the worker (the kernel sees to it, also when the worker is killed), with vLLM's scheduler process, and
with vLLM's server process: an engine that lacks one of them serves nobody, and what it held must not be believed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import sys
from typing import Any, Final, List, Optional, Sequence, Set

import msgspec

from kvcore.protocol import machine as m
from kvcore.protocol.messages import Namespace
from kvcore.protocol.worker import REGISTER
from kvreal.engines.vllm.desk import Desk, Elsewhere
from kvreal.engines.vllm.link import (
    Drop,
    Failed,
    Filled,
    Frame,
    LinkError,
    Loaded,
    Look,
    Ready,
    Renew,
    Shared,
    Store,
    Unpacker,
    Watch,
    pack,
)
from kvreal.engines.vllm.worker import on_all_cores
from kvreal.host import die_with_parent
from kvreal.instance_file import InstanceFile, read
from kvreal.logs import configure
from kvreal.rank import Local, Registration, keys_of
from kvreal.transfer import proof

log = logging.getLogger("kvmove.engine")

GOOD: Final = 0
"""Its engine has gone: whoever is left of it need not start another."""
FAILED: Final = 1
AGAIN_S: Final = 5.0
"""How long after a refusal the controller is asked again: whoever has this rank's name may have gone by then."""


class Client(asyncio.Protocol):
    """A connection of one of vLLM's processes."""

    def __init__(self, rank: Rank) -> None:
        self.rank: Rank = rank
        self.scheduler: bool = False
        self.unpacker: Unpacker = Unpacker()
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        sock = transport.get_extra_info("socket")
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid():
            transport.close()

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self.unpacker.feed(data):
                self.rank.answer(frame, self)
        except Exception as error:  # the engine takes no answer for a miss
            log.warning("a connection ends: %s: %s", type(error).__name__, error)
            self.scheduler = False
            self.transport.close()

    def connection_lost(self, exc: Optional[Exception]) -> None:
        self.rank.gone(self)

    def say(self, frame: Frame) -> None:
        if not self.transport.is_closing():
            self.transport.write(pack(frame))


class Rank:
    def __init__(self, file: InstanceFile, rank: int, address: str, sink: int, worker: socket.socket) -> None:
        self.file: InstanceFile = file
        self.address: str = address
        self.rank: int = rank
        self.worker: socket.socket = worker
        self.asking: bool = False
        self.local: Local = Local(file, rank, sink, self._said, keys_of(file), Elsewhere, shared=True)
        self.desk: Desk = Desk(self.local)
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.tasks: Set[asyncio.Task[None]] = set()

    def _said(self, registration: Registration) -> None:
        if registration.state == "registered":
            log.info("rank %d of %s is registered", self.rank, self.file.instance)
        elif registration.state == "refused":
            log.error("rank %d: %s. The engine serves on, and what it stores cannot be moved. Asked again every %.0f s",
                      self.rank, registration.text, AGAIN_S)  # fmt: skip
            if not self.asking:
                self.asking = True
                asyncio.get_running_loop().call_later(AGAIN_S, self._ask_again)
        elif registration.text:
            log.error("rank %d: %s", self.rank, registration.text)

    def _ask_again(self) -> None:
        """The protocol stops asking when it is refused: others would end then, an engine goes on."""
        self.asking = not self.over.done() and self.local.registration.state == "refused"
        if self.asking:
            service = self.local.service
            service.machine.timers.set(REGISTER, service.node.now())
            service.give(m.TimerFired(REGISTER))
            asyncio.get_running_loop().call_later(AGAIN_S, self._ask_again)

    def _ended(self, why: str) -> None:
        if not self.over.done():
            self.over.set_result(why)

    async def run(self) -> int:
        """Until the engine has gone, or the machine cannot go on."""
        loop = asyncio.get_running_loop()
        await self.local.start()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind("\0" + self.address)
        server = await loop.create_unix_server(lambda: Client(self), sock=sock)
        self._ready()
        self.worker.setblocking(False)
        loop.add_reader(self.worker.fileno(), self._worker_readable)
        failed = self.local.service.failed
        assert failed is not None
        failed.add_done_callback(lambda future: self._ended(f"the machine cannot go on: {future.result()}"))
        why = await self.over
        log.warning("rank %d of %s ends: %s", self.rank, self.file.instance, why)
        server.close()
        await self.local.stop()
        return FAILED if failed.done() else GOOD

    def _ready(self) -> None:
        memory = self.local.service.worker.memory
        slabs = memory.slabs()
        places: List[Shared] = []
        for name, (slab, start) in memory.homes.items():
            place = memory.places[name]
            places.append(Shared(name, slabs.index(slab), start, place.slots, place.slot_bytes))
        ready = Ready(tuple(places), self.local.service.worker.transfer.name)
        socket.send_fds(self.worker, [pack(ready)], [slab.fd for slab in slabs])

    def _worker_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                if self.worker.recv(4096):
                    return
            except ConnectionError:
                pass
            asyncio.get_running_loop().remove_reader(self.worker.fileno())
            self._ended("vLLM's worker has gone")

    # ---- questions
    def answer(self, frame: Any, client: Client) -> None:
        desk = self.desk
        if isinstance(frame, Watch):
            client.scheduler = True
            self.watch(frame.parent)
        elif isinstance(frame, Look):
            client.say(desk.look(frame, client))
        elif isinstance(frame, Loaded):
            client.say(desk.loaded(frame))
        elif isinstance(frame, Store):
            client.say(desk.store(frame, client))
        elif isinstance(frame, Renew):
            desk.renew(frame)
        elif isinstance(frame, Drop):
            desk.drop(frame)
        elif isinstance(frame, Filled):
            task = asyncio.create_task(self._filled(frame, client))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        else:
            raise LinkError(f"{type(frame).__name__} is not for a rank to hear")

    async def _filled(self, frame: Filled, client: Client) -> None:
        client.say(await self.desk.filled(frame))

    def gone(self, client: Client) -> None:
        """What it held is let go. One that this side has hung up on may come again."""
        self.desk.gone(client)
        if client.scheduler:
            self._ended("vLLM's scheduler has gone")

    def watch(self, parent: int) -> None:
        """End with process ``parent`` too: vLLM's scheduler outlives its server when that is killed."""
        if not parent:
            return
        try:
            fd = os.pidfd_open(parent)
        except ProcessLookupError:
            self._ended("vLLM's server has gone")
            return
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(fd)
            os.close(fd)
            self._ended("vLLM's server has gone")

        loop.add_reader(fd, gone)


async def _serve(args: argparse.Namespace, sink: int, worker: socket.socket) -> int:
    space = msgspec.json.decode(args.space, type=Namespace)
    return await Rank(read(args.config, space=space), args.rank, args.address, sink, worker).run()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="kvreal.engines.vllm.rank", description="one rank, started by a vLLM worker")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--space", required=True)
    args = parser.parse_args(list(argv))
    die_with_parent(args.parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the worker ends this process by hanging up
    worker = socket.socket(fileno=os.dup(0))
    on_all_cores()  # a process that the worker starts inherits its own
    _, sink = proof.redirect_stdout()
    configure()
    if args.rank:
        logging.getLogger("kvmove.profile").setLevel(logging.ERROR)  # rank 0 says it for all
    try:
        return asyncio.run(_serve(args, sink, worker))
    except Exception as error:
        with contextlib.suppress(OSError):
            worker.setblocking(True)
            worker.sendall(pack(Failed(f"rank {args.rank}: {' '.join(str(error).split())}")))
        return FAILED


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # daemon threads may sit in a transport's C code
