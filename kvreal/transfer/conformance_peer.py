"""Processes with a memory and a transport and nothing else, told what to do in JSON lines: to test transports on.

Run as a program it is such a process; imported it is what starts them.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Final, List, Optional

LOCATION: Final = "LocalCPUBackend"
TOKEN: Final = "a run"


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


class Peer:
    """A child process; every method asks it something and waits for its answer."""

    def __init__(self, address: str, transport: str, env: Optional[Dict[str, str]] = None) -> None:
        self.address: str = address
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-m", __name__, transport],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, **(env or {})},
            text=True,
        )

    def ask(self, do: str, timeout_s: float = 30.0, **args: Any) -> Any:
        self.tell(do, **args)
        return self.answer(timeout_s)

    def tell(self, do: str, **args: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **args}) + "\n")
        self.process.stdin.flush()

    def answer(self, timeout_s: float = 30.0) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        if not ready:
            raise TimeoutError(f"{self.address} gave no answer in {timeout_s} s")
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"{self.address} has gone, exit status {self.process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def begin(self, slots: int, slot_bytes: int, epoch: int, location: str = LOCATION) -> str:
        """Lay out memory, begin a run; returns the endpoint."""
        endpoint = self.ask(
            "begin", location=location, slots=slots, slot_bytes=slot_bytes, address=self.address, epoch=epoch
        )
        assert isinstance(endpoint, str)
        return endpoint

    def ended(self, timeout_s: float = 30.0) -> List[Dict[str, Any]]:
        """Wait for something to end; what has."""
        found = self.ask("take", timeout_s=timeout_s + 5, wait_s=timeout_s)
        assert isinstance(found, list)
        return found

    def freeze(self, timeout_s: float = 5.0) -> None:
        """Stop it, and wait until all of its threads stand still; SIGCONT wakes them."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        until = time.monotonic() + timeout_s
        while not all((one / "stat").read_text().rpartition(")")[2].split()[0] == "T" for one in tasks.iterdir()):
            if time.monotonic() > until:
                raise TimeoutError(f"{self.address} does not stop")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def main(transport: str) -> None:
    from kvreal.transfer import proof

    out, sink = proof.redirect_stdout()
    from kvcore.protocol.machine import StartCopy
    from kvreal.engines import synthetic
    from kvreal.memory import Memory
    from kvreal.store import DiskError
    from kvreal.transfer import make
    from kvreal.transfer.job import Copy, Fate, Progress

    arena = os.environ.get("KVMOVE_ARENA", "")
    memory = Memory(arena=arena)
    mover = make(transport, memory)
    mover.ucx_prints_to(sink)

    def take(wait_s: float) -> Any:
        found: List[Any] = []
        until = time.monotonic() + wait_s
        while not found and time.monotonic() < until:
            select.select([mover.fileno()], [], [], max(0.0, until - time.monotonic()))
            mover.expire(time.monotonic_ns())
            found = [item for item in mover.take() if not isinstance(item, Progress)]
        return [
            {"what": type(item).__name__, **{f: getattr(item, f) for f in item.__struct_fields__}} for item in found
        ]

    def differs(a: Dict[str, Any], slot: int, name: bytes) -> int:
        """-1, or the first byte that differs: of a disk's slot that holds nothing, the first of all."""
        try:
            held = memory.get(a["location"], slot, a["tokens"] * a["bpt"])
        except DiskError:
            return 0
        return synthetic.check(held, name, a["tokens"], a["bpt"])

    def obey(do: str, a: Dict[str, Any]) -> Any:
        if do == "begin":
            if arena:  # both sides of a pair are laid out alike
                memory.arena = f"{arena}/{a['slots']}"
                memory.arena_bytes = 2 * a["slots"] * a["slot_bytes"]
            if memory.lay_out([(a["location"], a["slots"])], a["slot_bytes"]):
                mover.memory_changed()
            mover.begin(TOKEN, a["address"])
            mover.set_epoch(a["epoch"])
            return mover.endpoint()
        if do == "epoch":
            return mover.set_epoch(a["epoch"])
        if do == "fill":
            for slot, name in zip(a["slots"], a["keys"]):
                view = synthetic.blank(a["tokens"] * a["bpt"])
                synthetic.fill(view, key(name), a["tokens"], a["bpt"])
                memory.soil(a["location"], [slot])
                memory.put(a["location"], slot, view)
            return None
        if do == "check":
            return [differs(a, slot, key(name)) for slot, name in zip(a["slots"], a["keys"])]
        if do == "wipe":
            return memory.wipe()
        if do == "copy":
            effect = StartCopy(
                tuple(a["rid"]), a["read"], a["peer"], a["peer_epoch"], a["peer_location"],
                tuple(a["peer_slots"]), a["location"], tuple(a["slots"]), tuple(a["lens"]),
            )  # fmt: skip
            fate = Fate(**a.get("fate", {}))
            return mover.start(
                Copy(effect, a["endpoint"], a["epoch"], a["bpt"], a.get("copy_max_ns", 60_000_000_000), fate)
            )
        if do == "abort":
            return mover.abort(tuple(a["rid"]))
        if do == "close":
            return mover.close_window(a["peer"], a["epoch"])
        if do == "greet":
            return mover.introduce(a["peer"], a["endpoint"])
        if do == "take":
            return take(a["wait_s"])
        if do == "pending":
            return mover.pending()
        if do == "tcp_bytes":
            return proof.tcp_bytes()
        if do == "quit":
            mover.stop()
            if "nixl" in mover.carriers:  # UCX prints what it used when its agent goes
                del mover.carriers["nixl"].agent  # type: ignore[attr-defined]
            return os.pread(sink, 1 << 20, 0).decode()
        raise ValueError(do)

    for line in sys.stdin:
        a = json.loads(line)
        do = a.pop("do")
        try:
            answer = obey(do, a)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(out, (json.dumps(answer) + "\n").encode())
        if do == "quit":
            return


if __name__ == "__main__":
    main(sys.argv[1])
