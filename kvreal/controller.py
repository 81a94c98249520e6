"""The process of a controller: its sockets, its journal, its machine, and HTTP in front."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Final, List, Optional, Sequence, Tuple

import msgspec
import uvicorn
import zmq

from kvcore.protocol.config import Config, ControllerSpec
from kvcore.protocol.machine import JournalRecord
from kvreal.endpoints import CLUSTER, EndpointError, Endpoints, is_loopback
from kvreal.http.app import MAX_BODY_BYTES, create_app
from kvreal.http.events import EventLog, Keeper
from kvreal.http.face import Face
from kvreal.http.face import Settings as FaceSettings
from kvreal.http.hot import protocol
from kvreal.http.server import Server, listen
from kvreal.http.watching import watching
from kvreal.loop import runner, settle
from kvreal.service import JournalLike, Service

log = logging.getLogger("kvmove.controller")

GOOD: Final = 0
FAILED: Final = 1


class Ports(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``--monitor-ports``. 0: any free one."""

    pull: int = 8300
    reply: int = 8400
    heartbeat: Optional[int] = None
    """The reference's third socket; ours beats over ``pull``."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    host: str = "localhost"
    port: int = 9000
    ports: Ports = Ports()
    monitor_host: str = "localhost"
    address: str = ""
    """What workers call this controller, where that is not the address it binds to."""
    cluster: str = CLUSTER
    config: Config = Config()
    max_body_bytes: int = MAX_BODY_BYTES
    face: FaceSettings = FaceSettings()
    history: Optional[Path] = None


class Journaled(msgspec.Struct, frozen=True, kw_only=True):
    """A journal that is open, and what it held."""

    journal: Any
    records: Tuple[JournalRecord, ...] = ()
    keeper: Any = None
    about: str = ""


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """What others provide: the journal, and what protects the sockets and the routes."""

    journal: Callable[[], Journaled]
    """Called once every port is ours: a controller that cannot start leaves no file behind."""
    curve: Any = None
    auth_dependency: Any = None
    routers: Tuple[Callable[[Face], Any], ...] = ()
    """Each makes a router, beside those of the page and the metrics."""


class ReplySocket:
    """The monitor's second socket: whoever asks it anything is told who this controller is."""

    def __init__(self, network: Endpoints, bind: str, about: Callable[[], Dict[str, Any]]) -> None:
        self.sock: Any = network.context.socket(zmq.ROUTER)
        self.sock.setsockopt(zmq.LINGER, 0)
        self.sock.setsockopt(zmq.MAXMSGSIZE, 1 << 16)
        if network.curve is not None:
            network.curve.listening(self.sock)
        network.door.watch(self.sock, network.curve is not None)
        try:
            self.sock.bind(f"tcp://{bind}")
        except zmq.ZMQError as error:
            raise EndpointError(f"cannot listen at {bind}: {error.strerror or error}") from error
        self.port: int = int(self.sock.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        network.others.append(self.sock)
        self.about: Callable[[], Dict[str, Any]] = about

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self.sock.fileno(), self.readable)
        loop.call_soon(self.readable)

    def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self.sock.fileno())
        self.sock.close(linger=0)

    def readable(self) -> None:
        answer = msgspec.msgpack.encode(self.about())
        for _ in range(64):
            try:
                frames = self.sock.recv_multipart(zmq.NOBLOCK)
                envelope = frames[: frames.index(b"") + 1] if b"" in frames else frames[:1]
                self.sock.send_multipart([*envelope, answer], zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError:
                continue  # whoever asked has gone
        asyncio.get_running_loop().call_soon(self.readable)


class ControllerProcess:
    """Everything is bound when this returns; nothing is answered before ``run``."""

    def __init__(self, settings: Settings, opened: Opened, http: socket.socket) -> None:
        self.settings: Settings = settings
        self.opened: Opened = opened
        self.http: socket.socket = http
        host = "127.0.0.1" if settings.monitor_host == "localhost" else settings.monitor_host
        pull = settings.ports.pull
        self.network: Endpoints = Endpoints(
            f"{host}:{pull}",
            address=settings.address,
            aliases=(f"127.0.0.1:{pull}", f"{host}:{pull}") if pull else (),
            cluster=settings.cluster,
            curve=opened.curve,
        )
        try:
            self.reply: ReplySocket = ReplySocket(self.network, f"{host}:{settings.ports.reply}", self.about)
            self.journaled: Journaled = opened.journal()
        except BaseException:
            self.network.close()
            raise
        journal: JournalLike = self.journaled.journal
        spec = ControllerSpec(self.network.address, settings.config)
        self.service: Service = Service(
            spec, self.network, journal=journal, records=self.journaled.records, history=settings.history
        )
        keeper: Optional[Keeper] = self.journaled.keeper
        self.log: EventLog = EventLog(self.service.machine, keeper)  # type: ignore[arg-type]
        self.face: Face = Face(self.service, self.log, settings.face)
        # Before the machine's first step, so that those who watch see all of them.
        self.routers: List[Any] = watching(self.face, opened.auth_dependency)
        self.routers += [make(self.face) for make in opened.routers]
        self.server: Optional[Server] = None
        self.status: int = GOOD

    def about(self) -> Dict[str, Any]:
        incarnation: int = self.face.machine.incarnation
        return {"service": "kvmove controller", "address": self.network.address, "incarnation": incarnation}

    async def run(self, say: Callable[[str], None]) -> int:
        """Serve until a signal or until the journal cannot be written. Returns the exit status."""
        begun = time.monotonic()
        loop = asyncio.get_running_loop()
        await self.service.start()
        self.reply.start()
        app = create_app(
            self.face,
            auth_dependency=self.opened.auth_dependency,
            routers=self.routers,
            max_body_bytes=self.settings.max_body_bytes,
        )
        http = protocol(app.quick) if app.quick is not None else "auto"
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=3, ws="none", http=http,
            proxy_headers=False, limit_concurrency=10_000, h11_max_incomplete_event_size=64 << 10, server_header=False,
        )  # fmt: skip
        self.server = Server(config)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.end)
        assert self.service.failed is not None
        self.service.failed.add_done_callback(lambda future: self.end(FAILED))
        settle()
        say(self.line(time.monotonic() - begun))
        try:
            if not self.service.failed.done():
                await self.server.serve(sockets=[self.http])
        finally:
            self.reply.stop()
            await self.service.stop()
        return self.status

    def end(self, status: int = GOOD) -> None:
        self.status = max(self.status, status)
        self.log.close_streams()
        if self.server is not None:
            self.server.should_exit = True

    def line(self, took_s: float) -> str:
        host, port = self.settings.host, self.http.getsockname()[1]
        incarnation = self.face.machine.incarnation
        events = len(self.log.records)
        return (
            f"controller: http://{host}:{port}, workers at {self.network.address} (reply {self.reply.port}), "
            f"journal {self.journaled.about}, incarnation {incarnation}, "
            f"{len(self.journaled.records)} records and {events} events replayed in {took_s * 1e3:.0f} ms"
        )


def run(settings: Settings, open_: Callable[[], Opened]) -> int:
    """Serve until told to stop. EndpointError: why not, in one line. ``open_`` is called once HTTP's port is ours."""
    if not is_loopback(settings.host) or not is_loopback(settings.monitor_host):
        log.debug("listening beyond this machine")
    http = listen(settings.host, settings.port)
    try:
        opened = open_()
        process: List[ControllerProcess] = []

        async def whole() -> int:
            process.append(ControllerProcess(settings, opened, http))
            return await process[0].run(lambda text: print(text, flush=True))

        with runner() as one:
            status: int = one.run(whole())
        return status
    finally:
        http.close()
        sys.stdout.flush()


def checked_hosts(settings: Settings, authenticated: bool, encrypted: bool) -> Sequence[str]:
    """Why these settings are not safe: others could reach an interface that anybody may use."""
    wrong: List[str] = []
    if not is_loopback(settings.host) and not authenticated:
        wrong.append(f"--host {settings.host}: others could reach it; give --tokens FILE, or listen at localhost")
    if not is_loopback(settings.monitor_host) and not encrypted:
        wrong.append(
            f"--monitor-host {settings.monitor_host}: others could reach it; give --keys DIR (see `kvmove keys`), "
            "or listen at localhost"
        )
    if settings.monitor_host in ("0.0.0.0", "::", "*") and not settings.address:
        wrong.append(f"--monitor-host {settings.monitor_host}: give --address HOST:PORT too, as workers know it")
    return wrong
