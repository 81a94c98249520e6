"""The process of an instance: rank 0, the other ranks' processes, and the HTTP face."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from typing import Any, Callable, Dict, Final, List, Optional, Union

import msgspec
import uvicorn

from kvreal.http.instance import make_app
from kvreal.http.server import Server, listen
from kvreal.http.serving import Serving
from kvreal.instance_file import InstanceFile
from kvreal.loop import runner, settle
from kvreal.rank import Child, Local, Registration, keys_of
from kvreal.tokenizer import make as make_tokenizer
from kvreal.transfer import proof

log = logging.getLogger("kvmove.instance")

GOOD: Final = 0
FAILED: Final = 1
REFUSED: Final = 2
PATIENCE_S: Final = 5.0
"""How long the controller may take before somebody is told that it has not been heard."""


class Settings(msgspec.Struct, frozen=True):
    host: str = "localhost"
    port: int = 8000
    api_key: str = ""
    version: str = ""


class Instance:
    def __init__(self, file: InstanceFile, settings: Settings, say: Callable[[str], None], sink: int) -> None:
        self.file: InstanceFile = file
        self.settings: Settings = settings
        self.say: Callable[[str], None] = say
        self.states: Dict[int, Registration] = {rank: Registration("waiting") for rank in range(file.ranks)}
        self.status: int = GOOD
        self.why: str = ""
        """Why this instance ends, or cannot serve."""
        self.server: Optional[Server] = None
        self.announced: bool = False
        self.ever: bool = False
        self.children: List[Child] = []
        for rank in range(1, file.ranks):
            argv = ["--config", file.path, "--model", file.namespace.model]
            self.children.append(Child(rank, argv, self._hearer(rank), self._gone))
        try:
            self.local: Local = Local(file, 0, sink, self._hearer(0), keys_of(file))
        except Exception:
            for child in self.children:
                child.sock.close()
                child.process.kill()
                child.process.wait()
            raise

    def _hearer(self, rank: int) -> Callable[[Registration], None]:
        return lambda registration: self._registered(rank, registration)

    def _registered(self, rank: int, registration: Registration) -> None:
        self.states[rank] = registration
        if registration.state == "failed":
            self._end(REFUSED if not self.ever else FAILED, registration.text)
        elif registration.state == "refused":
            if self.ever:
                log.error("%s", registration.text)
            else:
                self._end(REFUSED, registration.text)
        elif registration.text:
            log.warning("rank %d: %s", rank, registration.text)
        if all(state.state == "registered" for state in self.states.values()):
            controller = ":".join(str(part) for part in self.file.controller)
            self.say(f"{self.file.instance}: registered {'again ' if self.ever else ''}at {controller}")
            self.ever = True

    def _gone(self, why: str) -> None:
        """A rank's process is not there any more: KV without one of its shards is none."""
        self._end(FAILED, why)

    def _end(self, status: int, why: str) -> None:
        if not self.why:
            self.status, self.why = status, why
        if self.server is not None:
            self.server.should_exit = True

    def healthy(self) -> str:
        refused = [state.text for state in self.states.values() if state.state == "refused"]
        failed = self.local.service.failed
        if failed is not None and failed.done():
            return f"rank 0 cannot go on: {failed.result()}"
        return self.why or (refused[0] if refused else "")

    async def run(self, sock: socket.socket) -> int:
        """Until a signal, a refusal, or the end of a rank. Returns the exit status."""
        loop = asyncio.get_running_loop()
        serving = Serving(self.file, [self.local, *self.children], make_tokenizer(self.file.tokenizer))
        app = make_app(
            serving,
            healthy=self.healthy,
            warn=lambda text: log.error("%s", text),
            api_key=self.settings.api_key,
            version=self.settings.version,
            held=self.local.held,
            mismatches=lambda: self.local.service.worker.transfer.mismatches,
            refused=lambda: {name: store.wrong for name, store in self.local.memory.stores.items()},
        )
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=3, ws="none"
        )
        self.server = Server(config)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)
        try:
            for child in self.children:
                await child.start()
            await self.local.start()
            settle()
            if not self.why:
                self.say(self.line(sock.getsockname()[1]))
                loop.call_later(PATIENCE_S, self._still_waiting)
                await self.server.serve(sockets=[sock])
        finally:
            sock.close()
            await asyncio.gather(self.local.stop(), *[child.stop() for child in self.children])
        return self.status

    def _still_waiting(self) -> None:
        if not self.ever and not self.why:
            keys = "this node's keys do not fit" if self.file.keys else "it wants keys, and this node has none"
            log.warning(
                "no word yet from the controller at %s:%d: it is not there, or %s (its log says so); serving meanwhile",
                *self.file.controller, keys,
            )  # fmt: skip

    def _signalled(self) -> None:
        if self.server is not None:
            self.server.should_exit = True

    def line(self, port: int) -> str:
        file = self.file
        places = ", ".join(
            f"{place.name} {place.slots} chunks of {place.slot_size(file.namespace)} bytes"
            + (f" ({place.namespace.model})" if place.namespace is not None else "")
            for place in file.places
        )
        ranks = f"{file.ranks} ranks" if file.ranks > 1 else "1 rank"
        return (
            f"{file.instance}: http://{self.settings.host}:{port}, {ranks} at {self.local.address}"
            f"{' and following' if file.ranks > 1 else ''}, {places}, "
            f"over {self.local.service.worker.transfer.name}, controller {file.controller[0]}:{file.controller[1]}"
        )


def run(file: InstanceFile, settings: Settings) -> Union[int, str]:
    """Serve until told to stop. Returns the exit status, or the line that says why not (status 2)."""
    sock = listen(settings.host, settings.port)
    old, sink = proof.redirect_stdout()
    sys.stdout = os.fdopen(old, "w", buffering=1)

    def say(text: str) -> None:
        print(text, flush=True)

    instance: Optional[Instance] = None

    async def whole() -> int:
        nonlocal instance
        instance = Instance(file, settings, say, sink)
        return await instance.run(sock)

    try:
        with runner() as one:
            status: Any = one.run(whole())
    finally:
        sock.close()
    if instance is not None and instance.why:
        return instance.why if status == REFUSED else _failed(instance.why)
    return int(status)


def _failed(why: str) -> int:
    log.critical("%s", why)
    return FAILED
