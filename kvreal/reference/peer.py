"""Where the reference is, and its processes: its own controller, and scripts of ours that its interpreter runs.

It is looked for where ``make bench-peer`` puts it: in ``.venv-reference``, of this directory or of this source tree.
``KVMOVE_REFERENCE_PYTHON`` names another environment's interpreter.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Dict, Final, Optional, Sequence, Tuple, Type

from kvreal.ports import free_port

HERE: Final = Path(__file__).parent
VARIABLE: Final = "KVMOVE_REFERENCE_PYTHON"
ENVIRONMENT: Final = ".venv-reference"
VERSION: Final = "0.5.6"
START_S: Final = 120.0
SEEN_S: Final = 20.0
IDLE_S: Final = 2.0
"""A connection that has been idle so long is made anew; uvicorn closes it after five."""
CPU: Final = "LocalCPUBackend"
CHUNK_TOKENS: Final = 256
"""Its controller's, which looks prompts up by chunks of so many tokens whatever its engines have."""


class PeerError(Exception):
    """The reference cannot be used, or has failed at what it was asked; one line says how."""


def found() -> Tuple[Optional[Path], str]:
    """(its interpreter, or none; why there is none)."""
    told = os.environ.get(VARIABLE, "")
    made = [folder / ENVIRONMENT / "bin" / "python" for folder in (Path.cwd(), HERE.parents[1])]
    path = Path(told) if told else next((python for python in made if python.exists()), None)
    if path is None:
        return None, f"LMCache {VERSION} is not here: `make bench-peer` brings it (or {VARIABLE} names its interpreter)"
    said = f"{VARIABLE}={told}" if told else str(path)
    ask = "from importlib.metadata import version; print(version('lmcache'))"
    try:
        done = subprocess.run([path, "-c", ask], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{said}: {getattr(error, 'strerror', None) or 'does not answer'}"
    version = done.stdout.strip()
    if version != VERSION:
        return None, f"{said}: lmcache {version or 'is not installed'}, expected {VERSION}: `make bench-peer`"
    return path, ""


def environment() -> Dict[str, str]:
    return {**os.environ, "LMCACHE_TRACK_USAGE": "false", "PYTHONHASHSEED": "0", "LMCACHE_LOG_LEVEL": "WARNING"}


class Script:
    """One that answers each line with a line."""

    def __init__(self, argv: Sequence[str], folder: Path, name: str) -> None:
        self.log: Path = folder / f"{name}.log"
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()
            )

    def wait(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.strip()
        raise PeerError(f"a script of the reference ended before it said {word!r}: {_last_line(self.log)}")

    def ask(self, line: str, word: str) -> str:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it said last is told by wait
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        return self.wait(word)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def _last_line(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return lines[-1][:400] if lines else "it said nothing"


class Http:
    """A connection that stays, and little of a client's own work: what is measured is the other side's."""

    def __init__(self, port: int, timeout_s: float = 60.0) -> None:
        self.connection: http.client.HTTPConnection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        self.used_s: float = 0.0

    def ask(self, method: str, path: str, body: Optional[bytes] = None) -> Tuple[int, Dict[str, Any]]:
        """(status, JSON). OSError or HTTPException if it is not there."""
        if time.monotonic() - self.used_s > IDLE_S:
            self.connection.close()  # the other side may have, or will while we write
        self.connection.request(method, path, body, {"content-type": "application/json"} if body is not None else {})
        answer = self.connection.getresponse()
        data = answer.read()
        self.used_s = time.monotonic()
        try:
            found = json.loads(data)
        except ValueError:
            found = {}
        return answer.status, found if isinstance(found, dict) else {}

    def close(self) -> None:
        self.connection.close()


def move_body(src: str, dst: str, tokens: Sequence[int]) -> bytes:
    """The same request for us and for the reference."""
    return json.dumps({"old_position": [src, CPU], "new_position": [dst, CPU], "tokens": list(tokens)}).encode()


def holds(controller: Http, name: str, tokens: Sequence[int]) -> bool:
    """Whether a controller, ours or the reference's, says that ``name`` has all of them."""
    status, answer = controller.ask("POST", "/lookup", json.dumps({"tokens": list(tokens)}).encode())
    info = answer.get("layout_info", {}) if status == 200 else {}
    return bool(info.get(name, ["", 0])[1] == len(tokens))


class Reference:
    """Its controller as a process, with its defaults; engines as asked for. Ends with its with block."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python: Path = python
        self.folder: Path = folder
        self.port, self.pull, self.reply = free_port(), free_port(), free_port()
        self.scripts: Dict[str, Script] = {}
        self.lives: int = 0
        self.http: Http = Http(self.port)
        argv = [
            str(python.with_name("lmcache_controller")), "--host", "127.0.0.1", "--port", str(self.port),
            "--monitor-ports", json.dumps({"pull": self.pull, "reply": self.reply}),
        ]  # fmt: skip
        self.log: Path = folder / "reference.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, env=environment(), cwd=folder)
        try:
            until = time.monotonic() + START_S
            while not self._up():
                if time.monotonic() > until or self.process.poll() is not None:
                    raise PeerError(f"the reference's controller does not start: {_last_line(self.log)}")
                time.sleep(0.1)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Reference:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def _up(self) -> bool:
        try:
            return self.http.ask("POST", "/lookup", b'{"tokens": []}')[0] == 200
        except (OSError, http.client.HTTPException):
            self.http.close()
            return False

    def script(self, name: str, path: Path, *args: object) -> Script:
        """Ready once it has said so."""
        script = Script([str(self.python), str(path), *[str(arg) for arg in args]], self.folder, name)
        self.scripts[name] = script
        script.wait("ready")
        return script

    def engine(self, name: str, token_bytes: int = 128, pool_gb: float = 0.25) -> Script:
        ports = [free_port() for _ in range(3)]
        path = HERE / "engine.py"
        return self.script(name, path, name, self.pull, self.reply, *ports, token_bytes, CHUNK_TOKENS, pool_gb)

    def end_engines(self) -> None:
        for script in self.scripts.values():
            script.close()
        self.scripts = {}

    def seen(self, name: str, tokens: Sequence[int]) -> None:
        """Return once its controller knows. PeerError if it never does."""
        until = time.monotonic() + SEEN_S
        while not holds(self.http, name, tokens):
            if time.monotonic() > until:
                raise PeerError(f"the reference's controller does not see {len(tokens):,} tokens at {name}")
            time.sleep(0.01)

    def move(self, src: str, dst: str, tokens: Sequence[int]) -> float:
        """Seconds from the request until it answers: its source is then released. PeerError if it did not move."""
        self.seen(src, tokens)  # what it has moved it finds a little later only; that is not counted
        body = move_body(src, dst, tokens)
        begun = time.perf_counter()
        status, answer = self.http.ask("POST", "/move", body)
        taken = time.perf_counter() - begun
        if status != 200 or answer.get("num_tokens") != len(tokens):
            raise PeerError(f"the reference answered {status} {json.dumps(answer)[:200]} to a move of {len(tokens):,}"
                            " tokens")  # fmt: skip
        return taken

    def close(self) -> None:
        self.http.close()
        self.end_engines()
        self.process.kill()
        self.process.wait()
