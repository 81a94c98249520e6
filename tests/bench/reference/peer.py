"""Where the reference is, and its processes: its own controller, and scripts of ours that its interpreter runs.

It is looked for by ``KVMOVE_REFERENCE_PYTHON``: the interpreter of an environment of its own, made by

    python3 -m venv DIR && DIR/bin/pip install torch==2.13.0 && DIR/bin/pip install lmcache==0.5.6
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import httpx

from tests.real.http.cluster import free_port

HERE = Path(__file__).parent
VARIABLE = "KVMOVE_REFERENCE_PYTHON"
VERSION = "0.5.6"


def found() -> Tuple[Optional[Path], str]:
    """(its interpreter, or none; why there is none)."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        return None, f"{VARIABLE} is not set (the interpreter of an environment with lmcache=={VERSION})"
    ask = "from importlib.metadata import version; print(version('lmcache'))"
    try:
        done = subprocess.run([name, "-c", ask], capture_output=True, text=True, timeout=60)
    except OSError as error:
        return None, f"{VARIABLE}={name}: {error.strerror}"
    if done.stdout.strip() != VERSION:
        return None, f"{name}: lmcache {done.stdout.strip() or 'is not installed'}, expected {VERSION}"
    return Path(name), ""


class Script:
    """One that answers each line with a line."""

    def __init__(self, argv: List[str], folder: Path, name: str) -> None:
        self.log: Path = folder / f"{name}.log"
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()
            )
        self.wait("ready")

    def wait(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.strip()
        raise AssertionError(f"ended before it said {word!r}: {self.log.read_text()[-2000:]}")

    def ask(self, line: str, word: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.wait(word)


def environment() -> Dict[str, str]:
    return {**os.environ, "LMCACHE_TRACK_USAGE": "false", "PYTHONHASHSEED": "0", "LMCACHE_LOG_LEVEL": "WARNING"}


class Reference:
    """Its controller as a process, with its defaults; engines and registries as asked for."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python: Path = python
        self.folder: Path = folder
        self.port, self.pull, self.reply = free_port(), free_port(), free_port()
        self.scripts: List[Script] = []
        argv = [
            str(python.with_name("lmcache_controller")), "--host", "127.0.0.1", "--port", str(self.port),
            "--monitor-ports", json.dumps({"pull": self.pull, "reply": self.reply}),
        ]  # fmt: skip
        with (folder / "reference.log").open("w") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, env=environment(), cwd=folder)
        self.http: httpx.Client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        until = time.monotonic() + 90
        while not self._up():
            assert time.monotonic() < until and self.process.poll() is None, (folder / "reference.log").read_text()
            time.sleep(0.1)

    def _up(self) -> bool:
        try:
            return self.http.post("/lookup", json={"tokens": []}).status_code == 200
        except httpx.TransportError:
            return False

    def script(self, name: str, file: str, *args: object) -> Script:
        argv = [str(self.python), str(HERE / file), *[str(arg) for arg in args]]
        self.scripts.append(Script(argv, self.folder, name))
        return self.scripts[-1]

    def engine(self, name: str) -> Script:
        ports = [free_port() for _ in range(3)]
        return self.script(name, "engine.py", name, self.pull, self.reply, *ports)

    def registry(self) -> Script:
        return self.script("registry", "registry.py", self.pull, self.reply)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def close(self) -> None:
        self.http.close()
        for process in [script.process for script in self.scripts] + [self.process]:
            process.kill()
            process.wait()
