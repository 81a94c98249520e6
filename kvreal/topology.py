"""A scenario as running services: an instance file for each instance, and processes that end together."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Final, List, Sequence, Set, Tuple

import msgspec

from kvcore.protocol.config import Config, WorkerSpec
from kvcore.protocol.messages import Location, Namespace
from kvcore.scenario.build import Built
from kvreal.host import die_with_parent

END_S: Final = 8.0
"""A process that has not ended by then, when it is told to, is killed."""
REGISTERED: Final = ": registered "

READY: Final = "controller: http://"

Say = Callable[[str], None]


class TopologyError(Exception):
    """A process that did not come up, or ended; the message says which, and what it said last."""


def instance_files(built: Built, folder: Path, controller: str, reply: str, transport: str) -> List[Tuple[str, Path]]:
    """Write what ``kvmove instance`` reads, one file an instance; returns (name, file)."""
    found: List[Tuple[str, Path]] = []
    workers = [spec for spec in built.specs if isinstance(spec, WorkerSpec)]
    for name in built.instances:
        spec = next(worker for worker in workers if worker.name.rpartition("/")[0] == name)
        space = spec.namespace
        data: Dict[str, Any] = {
            "chunk_size": space.chunk_tokens,
            "enable_controller": True,
            "lmcache_instance_id": spec.instance,
            "controller_pull_url": controller,
            "controller_reply_url": reply,
            "kvmove": {
                "model": space.model,
                "weights": space.weights,
                "dtype": space.dtype,
                "layout": space.kv_layout,
                "bytes_per_token": f"{space.bytes_per_token * space.ranks} B",
                "ranks": space.ranks,
                "locations": {place.name: _room(place, space) for place in spec.locations},
                "transport": transport,
                "direction": spec.config.direction,
                "checksums": spec.config.checksums,
                "constants": constants(spec.config),
            },
        }
        if built.network.profile:
            data["kvmove"]["profile"] = str(Path(built.network.profile).resolve())
        path = folder / f"{name}.yaml"
        # JSON is YAML; indented so that a person can read it.
        path.write_bytes(msgspec.json.format(msgspec.json.encode(data), indent=2))
        found.append((name, path))
    return found


def _room(place: Location, own: Namespace) -> Any:
    """A location as an instance's file says it."""
    size = place.slot_size(own)
    room: Dict[str, Any] = {"size": f"{place.slots * size} B"}
    if place.slot_bytes:
        room["slot"] = f"{size} B"
    space = place.namespace
    if space is not None:
        room.update(model=space.model, weights=space.weights, dtype=space.dtype, layout=space.kv_layout)
        room.update(chunk_size=space.chunk_tokens, bytes_per_token=f"{space.bytes_per_token * space.ranks} B")
    return room["size"] if len(room) == 1 else room


#: what Config calls otherwise than a scenario's constants
_NAMES: Final = {"events_kept_ns": "events_kept_for"}


def constants(config: Config) -> Dict[str, Any]:
    """Those that differ from the usual, as scenarios write them."""
    usual = Config()
    found: Dict[str, Any] = {}
    for name in usual.__struct_fields__:
        value = getattr(config, name)
        if name.endswith("_ns") and value != getattr(usual, name):
            found[_NAMES.get(name, name[:-3])] = f"{value} ns"
    return found


class Process:
    """A ``kvmove`` command, and the lines that it says."""

    def __init__(self, name: str, argv: Sequence[str], say: Say) -> None:
        self.name: str = name
        self.argv: Tuple[str, ...] = tuple(argv)
        self.say: Say = say
        self.lines: asyncio.Queue[str] = asyncio.Queue()
        self.last: str = ""
        self.process: Any = None
        self.readers: List[asyncio.Task[None]] = []

    async def start(self) -> None:
        command = [sys.executable, "-m", "kvmove", *self.argv]
        self.process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**({"KVMOVE_LOG": "human"} if sys.stderr.isatty() else {}), **os.environ},
            start_new_session=True,  # Ctrl-C is this process's to pass on, in order
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
        self.readers = [
            asyncio.create_task(self._read(self.process.stdout, True)),
            asyncio.create_task(self._read(self.process.stderr, False)),
        ]

    async def _read(self, stream: asyncio.StreamReader, shown: bool) -> None:
        while line := await stream.readline():
            text = line.decode(errors="replace").rstrip()
            if not text:
                continue
            self.last = text
            await self.lines.put(text)
            # What is logged as JSON says itself whose it is.
            self.say(text if shown or text.startswith("{") else f"{self.name}: {text.removeprefix('kvmove: ')}")

    async def until(self, ready: Callable[[str], bool], timeout_s: float) -> None:
        """Until it says something that is ``ready``. TopologyError if it ends first, or takes too long."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            line = asyncio.ensure_future(self.lines.get())
            ended = asyncio.ensure_future(self.process.wait())
            await asyncio.wait({line, ended}, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)
            if line.done():
                ended.cancel()
                if ready(line.result()):
                    return
                continue
            line.cancel()
            if ended.done():
                await asyncio.gather(*self.readers)
                raise TopologyError(self.epitaph())
            ended.cancel()
            raise TopologyError(f"{self.name} was not ready within {timeout_s:.0f} s")

    def epitaph(self) -> str:
        last = self.last.removeprefix("kvmove: ")
        return f"{self.name} has ended with status {self.process.returncode}" + (f": {last}" if last else "")

    async def stop(self) -> None:
        if self.process is None:
            return
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), END_S)
            except TimeoutError:
                self.process.kill()
                await self.process.wait()
        await asyncio.gather(*self.readers)


class Topology:
    """The controller first, then all instances at once; stopped the other way round."""

    def __init__(self, controller: Process, instances: Sequence[Process]) -> None:
        self.controller: Process = controller
        self.instances: Tuple[Process, ...] = tuple(instances)

    async def start(self, timeout_s: float) -> None:
        """Until every instance is registered. TopologyError if one cannot be."""
        await self.controller.start()
        await self.controller.until(lambda line: line.startswith(READY), timeout_s)
        await asyncio.gather(*[one.start() for one in self.instances])
        waiting = [asyncio.create_task(one.until(_registered, timeout_s)) for one in self.instances]
        try:
            await asyncio.gather(*waiting)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def until_one_ends(self) -> str:
        """Which process has ended, and what it said last."""
        tasks = {asyncio.ensure_future(one.process.wait()): one for one in (self.controller, *self.instances)}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return tasks[next(iter(done))].epitaph()
        finally:
            pending: Set[asyncio.Future[Any]] = {task for task in tasks if not task.done()}
            for task in pending:
                task.cancel()

    async def stop(self) -> None:
        await asyncio.gather(*[one.stop() for one in self.instances])
        await self.controller.stop()


def _registered(line: str) -> bool:
    return REGISTERED in line
