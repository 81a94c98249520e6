"""A controller and vLLM engines as processes of this one, and what is asked of them.

    with Stage(Path("out/vllm/run"), model) as stage:
        stage.controller()
        one, two = stage.engines("one", "two")
        one.complete([1, 2, 3], max_tokens=12)
        stage.move("one", "two", [1, 2, 3])
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Final, List, NamedTuple, Optional, Sequence, Tuple

import httpx

from kvreal.ports import free_ports

CPU: Final = "LocalCPUBackend"
MODULE: Final = "kvreal.engines.vllm.connector"
READY_S: Final = 240.0
PR_SET_PDEATHSIG: Final = 1

QUIET: Final = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_CI_ENV": "1", "VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "0",
}  # fmt: skip
"""Nothing outside this machine is asked, and little is said."""


class StageError(Exception):
    """A process that did not come up; the message ends with what it said last."""


class Process:
    """A process whose output goes to a file, and that ends with this one."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environ: Dict[str, str]) -> None:
        self.name: str = name
        self.log: Path = log
        with open(log, "wb") as out:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, **environ},
                start_new_session=True, preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )  # fmt: skip

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def ready(self, url: str, within_s: float = READY_S) -> None:
        """Wait until ``url`` answers 200. StageError."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url, timeout=2.0).status_code == 200:
                    return
            time.sleep(0.1)
        lines = self.text().splitlines()[-25:]
        self.stop()
        raise StageError(f"{self.name} has not come up:\n" + "\n".join(lines))

    def tree(self) -> Dict[str, List[int]]:
        """{a process's title or command: pids} of it and all below it."""
        return tree(self.process.pid)

    def pids(self, title: str) -> List[int]:
        """Of the processes below it that are called so."""
        return [pid for name, pids in self.tree().items() if title in name for pid in pids]

    def stop(self, patience_s: float = 15.0) -> None:
        """SIGTERM, then SIGKILL to whatever of its session is left."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.wait()


def tree(pid: int) -> Dict[str, List[int]]:
    found: Dict[str, List[int]] = {}
    queue = [pid]
    while queue:
        one = queue.pop()
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{one}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            found.setdefault(title, []).append(one)
            for task in Path(f"/proc/{one}/task").iterdir():
                queue += [int(child) for child in (task / "children").read_text().split()]
    return found


class Completion(NamedTuple):
    tokens: List[int]
    cached: int
    """Prompt tokens that vLLM did not compute."""
    first_s: float
    """From the request to the first token."""
    total_s: float


class Engine(Process):
    """``vllm serve`` with our connector."""

    def __init__(self, name: str, url: str, command: Sequence[str], log: Path, environ: Dict[str, str]) -> None:
        super().__init__(name, command, log, environ)
        self.url: str = url
        self.client: httpx.Client = httpx.Client(base_url=url, timeout=300.0)

    def complete(self, tokens: Sequence[int], max_tokens: int = 12, salt: str = "", **more: Any) -> Completion:
        """Greedy. httpx.HTTPStatusError for an answer that is none."""
        body: Dict[str, Any] = {
            "model": "m", "prompt": list(tokens), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}, **more,
        }  # fmt: skip
        if salt:
            body["cache_salt"] = salt
        began = time.monotonic()
        first = 0.0
        out: List[int] = []
        cached = 0
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise httpx.HTTPStatusError(str(event["error"]), request=response.request, response=response)
                for choice in event.get("choices", ()):
                    if choice.get("token_ids"):
                        first = first or time.monotonic() - began
                        out += choice["token_ids"]
                details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
                cached = details.get("cached_tokens") or cached
        return Completion(out, cached, first, time.monotonic() - began)

    def tokenize(self, text: str) -> List[int]:
        answer = self.client.post("/tokenize", json={"model": "m", "prompt": text})
        answer.raise_for_status()
        found: List[int] = answer.json()["tokens"]
        return found

    def metrics(self) -> Dict[str, float]:
        """{name{labels without model_name and engine}: value}."""
        return parse_metrics(self.client.get("/metrics").text)

    def forget(self) -> None:
        """Empty vLLM's own prefix cache, and nothing else."""
        self.client.post("/reset_prefix_cache").raise_for_status()


def parse_metrics(text: str) -> Dict[str, float]:
    found: Dict[str, float] = {}
    for line in text.splitlines():
        match = re.match(r"^([a-zA-Z_:]+)(?:\{(.*)\})? (\S+)$", line)
        if match:
            labels = re.sub(r'(?:model_name|engine)="[^"]*",?', "", match.group(2) or "").strip(",")
            found[match.group(1) + (f"{{{labels}}}" if labels else "")] = float(match.group(3))
    return found


class Stage:
    """Everything that it starts ends with it."""

    def __init__(self, folder: Path, model: Path, *, gib: float = 0.25, transport: str = "auto") -> None:
        """``gib``: of KV that each instance's rank keeps in CPU memory."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder: Path = folder
        self.model: Path = model
        self.gib: float = gib
        self.transport: str = transport
        self.processes: Dict[str, Process] = {}
        self.http: int = 0
        self.pull: int = 0
        self.reply: int = 0
        self.api: httpx.Client = httpx.Client(timeout=60.0)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        for process in reversed(list(self.processes.values())):
            process.stop()
        self.processes = {}

    # ---- processes
    def controller(self) -> Process:
        """Start it; again after it ended: at the same ports, with the same journal."""
        if not self.http:
            self.http, self.pull, self.reply = free_ports(3)
        command = [
            sys.executable, "-m", "kvmove", "controller", "--host", "localhost", "--port", str(self.http),
            "--monitor-ports", json.dumps({"pull": self.pull, "reply": self.reply}),
            "--journal", str(self.folder / "journal.db"),
        ]  # fmt: skip
        process = Process("controller", command, self.folder / "controller.log", {"KVMOVE_LOG": "human"})
        self.processes["controller"] = process
        self.api = httpx.Client(base_url=f"http://localhost:{self.http}", timeout=120.0)
        process.ready(f"http://localhost:{self.http}/readyz", 60.0)
        return process

    def file(self, name: str, ranks: int = 1, **keys: Any) -> Path:
        """An instance's file, as the reference writes it (JSON is YAML)."""
        data: Dict[str, Any] = {
            "chunk_size": 256, "local_cpu": True, "max_local_cpu_size": self.gib, "enable_controller": True,
            "lmcache_instance_id": name, "controller_pull_url": f"localhost:{self.pull}",
            "controller_reply_url": f"localhost:{self.reply}", "lmcache_worker_ports": free_ports(ranks),
            "enable_p2p": True, "p2p_host": "localhost", "p2p_init_ports": free_ports(ranks),
            "kvmove": {"transport": self.transport}, **keys,
        }  # fmt: skip
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(data, indent=2))
        return path

    def engine(
        self, name: str, *, core: str = "0", dtype: str = "bfloat16", kv_bytes: int = 256 << 20, ranks: int = 1,
        policy: str = "recompute", connector: Tuple[str, str] = ("KVMoveConnector", MODULE),
        extra: Optional[Dict[str, Any]] = None, config: Optional[Path] = None, args: Sequence[str] = (),
        environ: Optional[Dict[str, str]] = None, max_len: int = 8192,
    ) -> Engine:  # fmt: skip
        """Start one; ``ready`` waits for it. ``core``: which cores its workers compute on, as vLLM writes them."""
        (port,) = free_ports(1)
        transfer = {
            "kv_connector": connector[0], "kv_connector_module_path": connector[1], "kv_role": "kv_both",
            "kv_load_failure_policy": policy, "kv_connector_extra_config": extra or {},
        }  # fmt: skip
        command = [
            str(Path(sys.executable).parent / "vllm"), "serve", str(self.model), "--served-model-name", "m",
            "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager",
            "--max-model-len", str(max_len), "--kv-cache-memory-bytes", str(kv_bytes), "--enable-prompt-tokens-details",
            "--disable-uvicorn-access-log", "--kv-transfer-config", json.dumps(transfer), *args,
        ]  # fmt: skip
        if ranks > 1:
            command += ["--tensor-parallel-size", str(ranks)]
        more = {
            **QUIET, "VLLM_CPU_OMP_THREADS_BIND": core, "KVMOVE_LOG": "human", "VLLM_SERVER_DEV_MODE": "1",
            "KVMOVE_CONFIG_FILE": str(config or self.file(name, ranks)), **(environ or {}),
        }  # fmt: skip
        engine = Engine(name, f"http://127.0.0.1:{port}", command, self.folder / f"{name}.log", more)
        self.processes[name] = engine
        return engine

    def engines(self, *names: str, **options: Any) -> List[Engine]:
        """Start them side by side, each on a core of its own, and wait until all serve and are registered."""
        cores = os.cpu_count() or 1
        made = [self.engine(name, core=str(i % cores), **options) for i, name in enumerate(names)]
        for engine in made:
            engine.ready(f"{engine.url}/health")
        for name in names:
            self.registered(name)
        return made

    # ---- questions to the controller
    def registered(self, name: str, within_s: float = 20.0) -> None:
        self.until(lambda: self.instance(name) is not None, f"{name} is registered", within_s)

    def instance(self, name: str) -> Optional[Dict[str, Any]]:
        found = self.api.get("/instances").json()["instances"]
        return next((one for one in found if one["instance_id"] == name), None)

    def until(self, condition: Any, what: str, within_s: float = 20.0) -> None:
        end = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > end:
                raise StageError(f"after {within_s} s still not: {what}")
            time.sleep(0.02)

    def held(self, tokens: Sequence[int], salt: str = "") -> Dict[str, int]:
        """{instance: tokens of the prompt that it holds at LocalCPUBackend}."""
        answer = self.api.post("/lookup", json={"tokens": list(tokens), "cache_salt": salt})
        answer.raise_for_status()
        return {name: places.get(CPU, 0) for name, places in answer.json()["locations"].items()}

    def stored(self, name: str, tokens: Sequence[int], salt: str = "") -> None:
        """Wait until the instance holds all of the prompt."""
        self.until(lambda: self.held(tokens, salt).get(name, 0) == len(tokens), f"{name} holds {len(tokens)} tokens")

    def move(self, src: str, dst: str, tokens: Sequence[int], **more: Any) -> Dict[str, Any]:
        """Move and wait for the end. Returns the answer and, under "end", the event as it ended."""
        body = {"old_position": [src, CPU], "new_position": [dst, CPU], "tokens": list(tokens), **more}
        answer = self.api.post("/move", json=body)
        answer.raise_for_status()
        found: Dict[str, Any] = answer.json()
        found["end"] = self.api.get(f"/events/{found['event_id']}/wait", params={"timeout": 60}).json()
        return found
