"""For tests: a real controller process, and real workers in this one, with sockets and memory of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Coroutine, Dict, List, Optional, Sequence, Tuple, TypeVar

import httpx

from kvcore.protocol.chunks import chunk_keys
from kvcore.protocol.config import MS, Config, WorkerSpec
from kvcore.protocol.messages import Answer, Location, Namespace, StoreRequest, UseRequest
from kvreal.endpoints import Endpoints
from kvreal.engines.thread import EngineThread
from kvreal.memory import Memory
from kvreal.ports import free_port
from kvreal.service import Service, WorkerParts
from kvreal.transfer import make

ROOT = Path(__file__).resolve().parents[3]
CPU = "LocalCPUBackend"
QUICK = Config(
    retry_ns=60 * MS, lease_ns=900 * MS, renew_ns=300 * MS, retain_ns=2700 * MS, stop_retry_ns=100 * MS,
    beat_ns=100 * MS, dead_ns=700 * MS, release_give_up_ns=1100 * MS, copy_max_ns=5000 * MS, deadline_ns=10_000 * MS,
)  # fmt: skip
NAMESPACE = Namespace(bytes_per_token=512, chunk_tokens=64)
T = TypeVar("T")


def eventually(check: Callable[[], T], timeout_s: float = 20.0, what: str = "") -> T:
    """The first true value of ``check``."""
    until = time.monotonic() + timeout_s
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > until:
            raise AssertionError(f"not within {timeout_s} s: {what or check}; at last {value!r}")
        time.sleep(0.01)


class Controller:
    """One life after the other of a controller, at the same ports and with the same journal."""

    def __init__(self, folder: Path, *args: str, program: Sequence[str] = ("-m", "kvmove", "controller")) -> None:
        self.folder: Path = folder
        self.args: Tuple[str, ...] = args
        self.program: Tuple[str, ...] = tuple(program)
        self.port: int = free_port()
        self.pull: int = free_port()
        self.reply: int = free_port()
        self.journal: Path = folder / "controller.db"
        self.process: Optional[subprocess.Popen[str]] = None
        self.http: httpx.Client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def start(self, *more: str, env: Optional[Dict[str, str]] = None) -> str:
        """Returns its first line."""
        sets = [f"--set={name[:-3]}={getattr(QUICK, name) // MS} ms" for name in QUICK.__struct_fields__ if _ours(name)]
        ports = json.dumps({"pull": self.pull, "reply": self.reply})
        argv = [
            sys.executable, *self.program, "--port", str(self.port), "--monitor-ports", ports,
            "--journal", str(self.journal), *sets, *self.args, *more,
        ]  # fmt: skip
        with (self.folder / "controller.err").open("a") as errors:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **(env or {})}
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("controller: "), f"{line!r} {(self.folder / 'controller.err').read_text()}"
        eventually(self._ready, 20, "the controller is ready")
        return line

    def _ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(15)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def close(self) -> None:
        self.http.close()
        if self.process is not None and self.process.poll() is None:
            self.kill()

    # ---- asking
    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def move(self, src: str, dst: str, tokens: Sequence[int], **more: Any) -> httpx.Response:
        return self.post("/move", old_position=[src, CPU], new_position=[dst, CPU], tokens=list(tokens), **more)

    def event(self, name: str) -> Dict[str, Any]:
        answer = self.http.get(f"/events/{name}")
        assert answer.status_code == 200, answer.text
        found: Dict[str, Any] = answer.json()
        return found

    def ended(self, name: str) -> Dict[str, Any]:
        """The event, once it has ended."""
        answer = self.http.get(f"/events/{name}/wait", params={"timeout": 20})
        assert answer.status_code == 200, answer.text
        found: Dict[str, Any] = answer.json()
        assert found["state"] in ("done", "failed"), found
        return found

    def held(self, tokens: Sequence[int]) -> Dict[str, int]:
        """instance -> tokens of this prompt, as /lookup says."""
        answer = self.post("/lookup", tokens=list(tokens))
        assert answer.status_code == 200, answer.text
        return {name: place[1] for name, place in answer.json()["layout_info"].items()}

    def instances(self) -> List[str]:
        return [one["instance_id"] for one in self.http.get("/instances").json()["instances"] if one["whole"]]


def _ours(name: str) -> bool:
    return name.endswith("_ns") and name != "events_kept_ns" and name != "hold_ns"


class Workers:
    """Workers in a loop of their own; each is a whole one, with real sockets and real bytes."""

    def __init__(self, controller: str) -> None:
        self.controller: str = controller
        self.loop: asyncio.AbstractEventLoop = asyncio.new_event_loop()
        self.thread: threading.Thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.ranks: Dict[str, List[Service]] = {}

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(30)

    def add(
        self,
        instance: str,
        ranks: int = 1,
        namespace: Namespace = NAMESPACE,
        slots: int = 64,
        places: Sequence[str] = (CPU,),
    ) -> None:
        space = Namespace(
            namespace.model, namespace.weights, namespace.dtype, namespace.kv_layout, namespace.chunk_tokens, ranks,
            namespace.bytes_per_token,
        )  # fmt: skip
        self.ranks[instance] = [self.run(self._start(instance, rank, space, slots, places)) for rank in range(ranks)]

    async def _start(self, instance: str, rank: int, space: Namespace, slots: int, places: Sequence[str]) -> Service:
        network = Endpoints("127.0.0.1:0")
        memory = Memory()
        memory.lay_out([(name, slots) for name in places], space.chunk_tokens * space.bytes_per_token, slots)
        transfer = make("tcp", memory)
        transfer.begin("kvmove", network.address)
        locations = tuple(Location(name, slots) for name in places)
        spec = WorkerSpec(network.address, instance, rank, self.controller, space, locations, QUICK)
        service = Service(spec, network, worker=WorkerParts(memory, transfer, EngineThread(memory)))
        await service.start()
        return service

    def remove(self, instance: str) -> None:
        for service in self.ranks.pop(instance):
            self.run(service.stop())

    def close(self) -> None:
        for instance in list(self.ranks):
            self.remove(instance)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    def store(self, instance: str, tokens: Sequence[int], location: str = CPU) -> int:
        """How many tokens every rank has stored."""
        return min(answer.num_tokens for answer in self._all(instance, StoreRequest, tokens, location))

    def use(self, instance: str, tokens: Sequence[int], location: str = CPU) -> int:
        """How many tokens every rank holds, each byte of which has been compared."""
        answers = self._all(instance, UseRequest, tokens, location)
        assert all(answer.reason != "wrong_bytes" for answer in answers), answers
        return min(answer.num_tokens for answer in answers)

    def _all(self, instance: str, kind: Any, tokens: Sequence[int], location: str) -> List[Answer]:
        found = []
        for service in self.ranks[instance]:
            namespace = service.spec.namespace  # type: ignore[union-attr]
            keys, lens = chunk_keys(namespace, tokens)
            found.append(self.run(service.ask(kind("", location, keys, lens), 20)))
        return found

    def pending(self) -> List[str]:
        """Why some worker is not quiet."""

        async def look() -> List[str]:
            return [line for services in self.ranks.values() for one in services for line in one.node.pending()]

        return self.run(look())


class Cluster:
    def __init__(self, controller: Controller, workers: Workers) -> None:
        self.controller: Controller = controller
        self.workers: Workers = workers

    def close(self) -> None:
        self.workers.close()
        self.controller.close()

    def known(self, *instances: str) -> None:
        eventually(lambda: set(instances) <= set(self.controller.instances()), 20, f"{instances} are known")

    def stored(self, instance: str, tokens: Sequence[int]) -> None:
        """Store, and wait until the controller knows."""
        assert self.workers.store(instance, tokens) == len(tokens)
        eventually(lambda: self.controller.held(tokens).get(instance) == len(tokens), 20, "the controller knows")


def cluster(folder: Path, *args: str, program: Sequence[str] = ("-m", "kvmove", "controller")) -> Cluster:
    """A controller that runs, and no workers yet."""
    controller = Controller(folder, *args, program=program)
    controller.start()
    return Cluster(controller, Workers(f"127.0.0.1:{controller.pull}"))
