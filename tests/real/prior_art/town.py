"""For the tests of prior art: a controller process, workers in this one, and instances as processes that can be
stopped, killed and started again."""

from __future__ import annotations

import re
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List, Sequence

import httpx

from kvcore.protocol.config import MS
from tests.real.http.cluster import NAMESPACE, QUICK, Cluster, Controller, cluster, eventually
from tests.real.http.processes import Command, commands

CONSTANTS = ", ".join(
    f"{name[:-3]}: {getattr(QUICK, name) // MS} ms"
    for name in ("retry_ns", "lease_ns", "renew_ns", "retain_ns", "stop_retry_ns", "beat_ns", "dead_ns",
                 "release_give_up_ns", "copy_max_ns", "deadline_ns")
)  # fmt: skip
FILE = """\
chunk_size: {chunk}
enable_controller: true
lmcache_instance_id: {name}
controller_pull_url: localhost:{pull}
save_unfull_chunk: {unfull}
kvmove:
  model: {model}
  bytes_per_token: {size} B
  locations: {{LocalCPUBackend: {pool} B}}
  transport: tcp
  constants: {{{constants}}}
"""


class Instance:
    """``kvmove instance`` with the namespace of the workers in this process; one life after the other."""

    def __init__(self, folder: Path, start: Any, controller: Controller, name: str, unfull: bool = True) -> None:
        self.name: str = name
        self.folder: Path = folder
        self.start_command: Any = start
        self.controller: Controller = controller
        self.lives: int = 0
        slot = NAMESPACE.chunk_tokens * NAMESPACE.bytes_per_token
        text = FILE.format(
            chunk=NAMESPACE.chunk_tokens, name=name, pull=controller.pull, unfull=str(unfull).lower(),
            model=NAMESPACE.model, size=NAMESPACE.bytes_per_token, pool=64 * slot, constants=CONSTANTS,
        )  # fmt: skip
        (folder / f"{name}.yaml").write_text(text)
        self.command: Command = self._start()

    def _start(self) -> Command:
        self.lives += 1
        argv = ["instance", "--config", f"{self.name}.yaml", "--port", "0"]
        command: Command = self.start_command(f"{self.name}-{self.lives}", argv)
        return command

    def up(self) -> None:
        """It serves, and the controller knows it."""
        self.command.until_says("registered at")
        eventually(lambda: self.name in self.controller.instances(), 20, f"{self.name} is known")

    def again(self) -> None:
        """Another life, once this one has been killed."""
        self.command = self._start()
        self.up()

    def signal(self, number: int) -> None:
        self.command.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.command.until_ends()

    def complete(self, tokens: Sequence[int]) -> int:
        """How many of the prompt's tokens it had."""
        found = re.search(r"http://[^:]+:(\d+)", self.command.text())
        assert found is not None, self.command.text()
        url = f"http://localhost:{found[1]}/v1/completions"
        answer = httpx.post(url, json={"prompt": list(tokens), "max_tokens": 1}, timeout=30)
        assert answer.status_code == 200, answer.text
        cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached


class Town:
    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder
        self.stack: ExitStack = ExitStack()
        self.start: Any = self.stack.enter_context(commands(folder))
        self.cluster: Cluster = cluster(folder)
        self.stack.callback(self.cluster.close)
        self.controller: Controller = self.cluster.controller
        self.workers: Any = self.cluster.workers
        self.instances: Dict[str, Instance] = {}

    def instance(self, name: str, unfull: bool = True) -> Instance:
        self.instances[name] = Instance(self.folder, self.start, self.controller, name, unfull)
        return self.instances[name]

    def close(self) -> None:
        self.stack.close()

    def move(self, src: str, dst: str, tokens: Sequence[int], **more: Any) -> Dict[str, Any]:
        """A move that is answered 200 and ends done: its event."""
        answer = self.controller.move(src, dst, tokens, **more)
        assert answer.status_code == 200, answer.text
        event = self.controller.ended(answer.json()["event_id"])
        assert event["state"] == "done", event
        return event

    def fails(self, answer: httpx.Response, codes: Sequence[int], reasons: Sequence[str]) -> Dict[str, Any]:
        """A move that was answered so, or 200 and failed afterwards: its event, with the same reason."""
        body = answer.json()
        assert answer.status_code in (*codes, 200), answer.text
        event = self.controller.ended(body["event_id"])
        assert event["state"] == "failed" and event["reason"] in reasons, event
        if answer.status_code != 200:
            assert body["reason"] == event["reason"], (body, event)
        return event


def prompt(first: int, count: int = 200) -> List[int]:
    return list(range(first, first + count))


def within(seconds: float, since: float) -> bool:
    return time.monotonic() - since < seconds
