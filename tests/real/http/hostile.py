"""A controller with its HTTP, and workers, in this process: so that a test can look inside while it is attacked."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
import zmq

from kvcore.protocol.config import ControllerSpec
from kvcore.protocol.messages import Wire
from kvreal.controller import ReplySocket, listen
from kvreal.endpoints import Endpoints, Header
from kvreal.http.app import create_app
from kvreal.http.events import EventLog
from kvreal.http.face import Face
from kvreal.http.hot import protocol
from kvreal.journal_sqlite import open_journal
from kvreal.service import Service
from tests.real.http.cluster import QUICK, Workers, eventually


class Inside:
    """``recorded``: (from, to, raw parts) of every frame that any node here has sent."""

    def __init__(self, folder: Path, *instances: str, ranks: int = 1) -> None:
        self.folder = folder
        self.network = Endpoints("127.0.0.1:0")
        self.workers = Workers(self.network.address)
        self.recorded: list[tuple[str, str, list[bytes]]] = []
        self.before = 0
        self.workers.run(self._start())
        self.url = f"http://127.0.0.1:{self.http.getsockname()[1]}"
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        for name in instances:
            self.workers.add(name, ranks)
        for node in self.nodes():
            self._tap(node)
        eventually(lambda: set(instances) <= set(self.machine.registry.instances()), 20, "all are known")

    async def _start(self) -> None:
        journal, records = open_journal(self.folder / "inside.db", "process", QUICK.events_kept_ns, 1000)
        self.service = Service(
            ControllerSpec(self.network.address, QUICK), self.network, journal=journal, records=records
        )
        self.machine: Any = self.service.machine
        log = EventLog(self.machine, journal)
        self.face = Face(self.service, log)
        await self.service.start()
        self.reply = ReplySocket(self.network, "127.0.0.1:0", lambda: {"service": "kvmove controller"})
        self.reply.start()
        self.http: socket.socket = listen("127.0.0.1", 0)
        self.app = create_app(self.face)
        config = uvicorn.Config(self.app, log_config=None, lifespan="off", ws="none", http=protocol(self.app.quick))
        self.server = uvicorn.Server(config)
        self.server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self.serving = asyncio.ensure_future(self.server._serve(sockets=[self.http]))

    def close(self) -> None:
        self.context.destroy(linger=0)
        self.workers.run(self._stop())
        self.workers.close()

    async def _stop(self) -> None:
        self.server.should_exit = True
        await self.serving
        self.reply.stop()
        await self.service.stop()

    # ---- nodes
    def services(self) -> list[Service]:
        return [self.service, *[one for ranks in self.workers.ranks.values() for one in ranks]]

    def nodes(self) -> list[Endpoints]:
        return [service.network for service in self.services()]

    def _tap(self, node: Endpoints) -> None:
        send = node.send

        def tapped(dst: str, message: Wire) -> bool:
            if ":" in dst:
                header = msgspec.msgpack.encode(Header(node.cluster, node.address, dst))
                self.recorded.append((node.address, dst, [header, msgspec.msgpack.encode(message)]))
            return send(dst, message)

        node.send = tapped  # type: ignore[method-assign]

    def sender(self, address: str) -> zmq.Socket[bytes]:
        sock = self.context.socket(zmq.PUSH)
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(f"tcp://{address}")
        return sock

    # ---- looking
    def look(self, what: Any) -> Any:
        """``what()`` in the loop's thread: between two inputs."""

        async def inside() -> Any:
            return what()

        return self.workers.run(inside())

    def state(self) -> Any:
        """All that an attack must not change: views, pools, events, pins, epochs."""
        return self.look(self._state)

    def _state(self) -> Any:
        machine = self.machine
        views = {}
        for who, rank in machine.registry.ranks.items():
            held = {
                # not when each was last used: that only orders drains and evictions
                name: (view.inc, {key: entry.num_tokens for key, entry in view.entries.items()})
                for name, view in rank.views.items()
            }
            views[who] = (rank.address, rank.epoch, held)
        ended = {number: (outcome.state, outcome.reason) for number, outcome in machine.moves.ended.items()}
        pools = {}
        for service in self.services()[1:]:
            worker: Any = service.machine
            for name, pool in worker.pools.items():
                index = {key: (entry.slot, entry.num_tokens) for key, entry in pool.index.items()}
                pools[(worker.spec.name, name)] = (worker.epoch, index, sorted(pool.refs))
        return views, ended, sorted(machine.moves.events), sorted(machine.fanouts.pins), pools, machine.incarnation

    def quiet(self) -> None:
        eventually(lambda: not self.workers.pending() and not self.look(self.machine.pending), 20, "all is quiet")

    def count(self, node: Endpoints, *kinds: str) -> int:
        return sum(node.counters[f"frames_{kind}"] for kind in kinds or ("malformed", "foreign", "refused"))

    def until_counted(self, node: Endpoints, count: int) -> None:
        until = time.monotonic() + 20
        while self.count(node) < count:
            assert time.monotonic() < until, (node.counters, count)
            time.sleep(0.0005)
        assert self.count(node) == count, node.counters

    def running(self) -> bool:
        return all(service.running for service in self.services())
