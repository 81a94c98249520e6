"""``kvmove`` commands as processes: what they say, conditions with deadlines, and an end for each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
READY_S = 60.0


def until(what: Callable[[], object], why: Callable[[], str], timeout_s: float = READY_S) -> None:
    """Return when ``what()`` is true; fail with ``why()`` if it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, why()
        time.sleep(0.02)


class Command:
    """A running command; both its outputs are in ``text()``."""

    def __init__(self, folder: Path, name: str, argv: list[str], env: dict[str, str] | None = None) -> None:
        self.log = folder / f"{name}.log"
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("KVMOVE_", "LMCACHE_", "UCX_"))}
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvmove", *argv], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                cwd=folder, env={**clean, "PYTHONPATH": str(ROOT), **(env or {})},
            )  # fmt: skip

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def until_says(self, words: str, timeout_s: float = READY_S) -> str:
        until(
            lambda: words in self.text() or self.process.poll() is not None,
            lambda: f"never said {words!r}: {self.text()}",
            timeout_s,
        )
        assert words in self.text(), f"ended with {self.process.returncode}: {self.text()}"
        return self.text()

    def until_ends(self, timeout_s: float = READY_S) -> int:
        return self.process.wait(timeout_s)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Told to end; its exit status. Killed if it does not."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"did not end when told to: {self.text()}") from None


@contextmanager
def commands(folder: Path) -> Iterator[Callable[..., Command]]:
    """Start commands; all are ended with this, newest first."""
    running: list[Command] = []

    def start(name: str, argv: list[str], env: dict[str, str] | None = None) -> Command:
        running.append(Command(folder, name, argv, env))
        return running[-1]

    try:
        yield start
    finally:
        for command in reversed(running):
            if command.process.poll() is None:
                command.process.kill()
                command.process.wait()
