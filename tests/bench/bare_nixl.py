"""NIXL and nothing else: two processes, one slab each, a move's descriptors, no protocol. What a move is held against.

Run as a program it is one of the two; ``BarePair`` starts them.
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, List

ROOT = Path(__file__).resolve().parents[2]


class BarePair:
    """``seconds(read, rows)``: one transfer of ``rows`` [(offset, offset, bytes)], from initialize_xfer to its end."""

    def __init__(self, nbytes: int) -> None:
        self.target = self._start(nbytes)
        self.mover = self._start(nbytes)
        hello = self._read(self.target)
        self._read(self.mover)
        self._ask(self.mover, {"meet": hello})

    def _start(self, nbytes: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, __file__, str(nbytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def _read(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        while True:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("a bare NIXL process ended")
            if line.startswith("{"):
                return json.loads(line)

    def _ask(self, process: subprocess.Popen[str], what: Any) -> Any:
        assert process.stdin is not None
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()
        return self._read(process)

    def seconds(self, read: bool, rows: List[List[int]]) -> float:
        return float(self._ask(self.mover, {"move": rows, "read": read})["seconds"])

    def close(self) -> None:
        for process in (self.target, self.mover):
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def main(nbytes: int) -> None:
    import numpy as np

    from kvreal.memory import Slab
    from kvreal.transfer.nixl import load_nixl

    api = load_nixl()
    agent = api.nixl_agent(f"bare-{os.getpid()}", api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    slab = Slab("cpu", nbytes)
    slab.touch(0, slab.nbytes)
    agent.register_memory([(slab.address, slab.nbytes, 0, "")], "DRAM")
    metadata = base64.b64encode(agent.get_agent_metadata()).decode()
    print(json.dumps({"metadata": metadata, "address": slab.address}), flush=True)
    peer, base = "", 0

    def move(rows: List[List[int]], read: bool) -> float:
        table = np.array(rows, dtype=np.uint64)
        mine = np.column_stack([table[:, 0] + np.uint64(slab.address), table[:, 2], np.zeros(len(rows), np.uint64)])
        theirs = np.column_stack([table[:, 1] + np.uint64(base), table[:, 2], np.zeros(len(rows), np.uint64)])
        begun = time.perf_counter()
        here, there = agent.get_xfer_descs(mine, "DRAM"), agent.get_xfer_descs(theirs, "DRAM")
        handle = agent.initialize_xfer("READ" if read else "WRITE", here, there, peer)
        state = agent.transfer(handle)
        while state == "PROC":
            time.sleep(20e-6)
            state = agent.check_xfer_state(handle)
        taken = time.perf_counter() - begun
        agent.release_xfer_handle(handle)
        return taken

    while True:
        agent.get_new_notifs()
        if not select.select([sys.stdin], [], [], 0.001)[0]:
            continue
        line = sys.stdin.readline()
        if not line:
            return
        what = json.loads(line)
        if "meet" in what:
            peer = agent.add_remote_agent(base64.b64decode(what["meet"]["metadata"]))
            base = what["meet"]["address"]
            for read in (True, False):
                move([[0, 0, 4096]], read)
            print("{}", flush=True)
        else:
            print(json.dumps({"seconds": move(what["move"], what["read"])}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
