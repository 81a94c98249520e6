"""Limits: what this machine does when nothing but the bytes is there. What a move is held against.

``Memcpy``, ``BareNixl`` and ``RawSocket`` each keep their processes from one measurement to the next, over memory whose
pages are there already. No protocol, no checks: the time from asking until the last byte has arrived. Run as a program
this file is one of those processes.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from types import TracebackType
from typing import Any, Callable, Dict, Final, List, Mapping, Optional, Sequence, Tuple, Type

import msgspec

from kvreal.facts import child_environment

PIECE: Final = 8 << 20
"""What one call of a socket is given."""
FAMILIES: Final = ("tcp", "unix")
STREAMS: Final = (1, 2)


class BareError(Exception):
    """A limit cannot be measured here; one line says why."""


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``nbytes`` in chunks of ``chunk_bytes``, the last one may be shorter. ``merged``: neighbours are one range."""

    nbytes: int
    chunk_bytes: int
    merged: bool = False

    def rows(self) -> List[Tuple[int, int]]:
        """(offset, bytes) of each range."""
        step = self.nbytes if self.merged else self.chunk_bytes
        return [(start, min(step, self.nbytes - start)) for start in range(0, self.nbytes, step)]


class Child:
    """A process of ours that answers each line with a line, both JSON."""

    def __init__(self, *argv: object, env: Optional[Mapping[str, str]] = None) -> None:
        command = [sys.executable, "-m", "kvreal.bare", *[str(arg) for arg in argv]]
        with tempfile.TemporaryFile("w+") as self.errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=os.dup(self.errors.fileno()),
                text=True, env=child_environment(env),
            )  # fmt: skip

    def hear(self) -> Any:
        """Its next answer. BareError if it has ended, or says that something cannot be done."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # a library may print what it likes
                answer = json.loads(line)
                if "error" in answer:
                    raise BareError(answer["error"])
                return answer
        raise BareError(f"a bare process ended, exit status {self.process.wait()}")

    def ask(self, what: Mapping[str, object]) -> Any:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class Limit:
    """Base: ``children`` end with it, however it is left. ``meters``: name -> seconds of one transfer of that shape."""

    def __init__(self) -> None:
        self.children: List[Child] = []
        self.meters: Dict[str, Callable[[Shape], float]] = {}
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Limit:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def child(self, *argv: object, env: Optional[Mapping[str, str]] = None) -> Child:
        self.children.append(Child(*argv, env=env))
        return self.children[-1]

    def meter(self, child: Child, merged: bool = False, **more: object) -> Callable[[Shape], float]:
        """BareError if a process has ended."""

        def seconds(shape: Shape) -> float:
            what = {"nbytes": shape.nbytes, "chunk_bytes": shape.chunk_bytes, "merged": merged, **more}
            return float(child.ask(what)["seconds"])

        return seconds

    def close(self) -> None:
        for child in self.children:
            child.close()


class Memcpy(Limit):
    """One thread, one process, between two buffers."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes: int = nbytes
        super().__init__()

    def start(self) -> None:
        child = self.child("memcpy", self.nbytes)
        child.hear()
        self.meters["memcpy"] = self.meter(child)


class BareNixl(Limit):
    """Two processes, one slab each, from initialize_xfer to the end, by read and by write. ``merged``: also with
    neighbouring descriptors made into one. ``env``: UCX's settings."""

    def __init__(self, nbytes: int, merged: bool, env: Optional[Mapping[str, str]] = None) -> None:
        self.nbytes: int = nbytes
        self.merged: bool = merged
        self.env: Mapping[str, str] = env or {}
        super().__init__()

    def start(self) -> None:
        target, mover = self.child("nixl", self.nbytes, env=self.env), self.child("nixl", self.nbytes, env=self.env)
        hello = target.hear()
        mover.hear()
        mover.ask({"meet": hello})
        for word in ("read", "write"):
            self.meters[f"bare nixl {word}"] = self.meter(mover, read=word == "read")
            if self.merged:
                self.meters[f"merged nixl {word}"] = self.meter(mover, True, read=word == "read")


class RawSocket(Limit):
    """Two processes and streams between them, over TCP and Unix sockets. From a word to the sender until all has
    arrived; each of k streams carries a k-th of the bytes."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes: int = nbytes
        super().__init__()

    def start(self) -> None:
        receiver, sender = self.child("receive", self.nbytes), self.child("send", self.nbytes)
        sender.hear()
        sender.ask(receiver.hear())
        receiver.ask({"accept": True})
        for family in FAMILIES:
            for streams in STREAMS:
                name = f"raw {family} x{streams}"
                self.meters[name] = self.meter(receiver, family=family, streams=streams)


# ---- the processes --------------------------------------------------------------------------------------------------
def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def _lines() -> Any:
    for line in sys.stdin:
        yield json.loads(line)


def _shape(what: Mapping[str, Any]) -> Shape:
    return Shape(what["nbytes"], what["chunk_bytes"], what["merged"])


def _memcpy(nbytes: int) -> None:
    from kvreal.slab import Slab

    source, target = Slab("cpu", nbytes), Slab("cpu", nbytes)
    for slab in (source, target):
        slab.touch(0, slab.nbytes)
    source.bytes[:] = 1
    _say(ready=True)
    for what in _lines():
        rows = _shape(what).rows()
        begun = time.perf_counter()
        for start, size in rows:
            ctypes.memmove(target.address + start, source.address + start, size)
        _say(seconds=time.perf_counter() - begun)


def _nixl(nbytes: int) -> None:
    import numpy as np

    from kvreal.slab import Slab
    from kvreal.transfer.nixl import load_nixl

    api = load_nixl()
    agent = api.nixl_agent(f"bare-{os.getpid()}", api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    slab = Slab("cpu", nbytes)
    slab.touch(0, slab.nbytes)
    slab.bytes[:] = 1
    agent.register_memory([(slab.address, slab.nbytes, 0, "")], "DRAM")
    _say(metadata=base64.b64encode(agent.get_agent_metadata()).decode(), address=slab.address)
    peer, base = "", 0

    def move(rows: Sequence[Tuple[int, int]], read: bool) -> float:
        table = np.array(rows, dtype=np.uint64)
        zeros = np.zeros(len(rows), np.uint64)
        mine = np.column_stack([table[:, 0] + np.uint64(slab.address), table[:, 1], zeros])
        theirs = np.column_stack([table[:, 0] + np.uint64(base), table[:, 1], zeros])
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
        agent.get_new_notifs()  # emulated transfers need the target's progress
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
                move([(0, 4096)], read)
            _say(met=True)
        else:
            _say(seconds=move(_shape(what).rows(), what["read"]))


def _shares(nbytes: int, streams: int) -> List[Tuple[int, int]]:
    """(start, end) of each stream's part."""
    step = -(-nbytes // streams)
    return [(min(nbytes, i * step), min(nbytes, (i + 1) * step)) for i in range(streams)]


def _together(work: Any, parts: Sequence[Tuple[socket.socket, Tuple[int, int]]]) -> None:
    """``work`` for each part, all but the first in a thread of its own."""
    threads = [threading.Thread(target=work, args=part, daemon=True) for part in parts[1:]]
    for thread in threads:
        thread.start()
    work(*parts[0])
    for thread in threads:
        thread.join()


def _buffer(nbytes: int) -> memoryview:
    from kvreal.slab import Slab

    slab = Slab("cpu", nbytes)
    slab.touch(0, slab.nbytes)
    slab.bytes[:] = 1
    assert slab.map is not None
    return memoryview(slab.map)


def _receive(nbytes: int) -> None:
    memory = _buffer(nbytes)
    with tempfile.TemporaryDirectory(prefix="kvmove-") as folder:
        server = {"unix": socket.socket(socket.AF_UNIX), "tcp": socket.create_server(("127.0.0.1", 0))}
        server["unix"].bind(f"{folder}/bare")
        server["unix"].listen()
        _say(unix=f"{folder}/bare", tcp=server["tcp"].getsockname()[1])
        lines = _lines()
        next(lines)
        peers = {family: [server[family].accept()[0] for _ in range(max(STREAMS))] for family in FAMILIES}
        _say(accepted=True)

    def take(sock: socket.socket, part: Tuple[int, int]) -> None:
        at, end = part
        while at < end:
            at += sock.recv_into(memory[at : min(end, at + PIECE)]) or sys.exit("the sender has ended")

    for what in lines:
        parts = list(zip(peers[what["family"]], _shares(what["nbytes"], what["streams"])))
        begun = time.perf_counter()
        for sock, part in parts:
            sock.sendall(part[0].to_bytes(8, "little") + part[1].to_bytes(8, "little"))
        _together(take, parts)
        _say(seconds=time.perf_counter() - begun)


def _send(nbytes: int) -> None:
    memory = _buffer(nbytes)
    _say(ready=True)
    where = json.loads(sys.stdin.readline())
    socks = []
    for family in FAMILIES:
        for _ in range(max(STREAMS)):
            if family == "unix":
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(where["unix"])
            else:
                sock = socket.create_connection(("127.0.0.1", where["tcp"]))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            socks.append(sock)
    _say(connected=True)

    def give(sock: socket.socket, _: Tuple[int, int]) -> None:
        while True:
            word = sock.recv(16, socket.MSG_WAITALL)
            if len(word) < 16:
                return
            at, end = int.from_bytes(word[:8], "little"), int.from_bytes(word[8:], "little")
            while at < end:
                at += sock.send(memory[at : min(end, at + PIECE)])

    _together(give, [(sock, (0, 0)) for sock in socks])


ROLES: Final[Dict[str, Callable[[int], None]]] = {"memcpy": _memcpy, "nixl": _nixl, "receive": _receive, "send": _send}


def main(argv: Sequence[str]) -> None:
    role, nbytes = argv
    try:
        ROLES[role](int(nbytes))
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    except Exception as error:
        _say(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
