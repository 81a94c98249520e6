"""The child process: ``python -m kvreal.host``. It is one node at a time, and may be many one after the other.

One loop waits for the control socket, the runner's pipe, finished copies and engine tasks, and the machine's next
deadline. The process ends when its runner does: it reads the end of its stdin, and the kernel kills it (also while it
is stopped) when the runner's thread that started it has gone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import select
import signal
import sys
import time
import traceback
from typing import Any, Dict, List, Optional, Tuple

import zmq

from kvcore.protocol.config import WorkerSpec
from kvcore.protocol.machine import Boot
from kvcore.protocol.messages import StoreRequest
from kvcore.scenario.build import Built, decode
from kvcore.scenario.client import ClientSpec
from kvcore.scenario.faults import Action
from kvcore.scenario.history import HistoryError
from kvcore.scenario.topology import kind_of
from kvreal import control as c
from kvreal.arena import ARENAS
from kvreal.engines.thread import EngineThread
from kvreal.journal import JournalError
from kvreal.keys import shared
from kvreal.loop import THRESHOLDS
from kvreal.memory import Memory
from kvreal.network import Network
from kvreal.node import Node, Parts
from kvreal.slab import SlabError
from kvreal.transfer import Transfer, TransferError, make, proof

PR_SET_PDEATHSIG = 1
CARRIED_TIMEOUT_S = 0.25


class Host:
    def __init__(self, transport: str, pipe: c.Pipe, sink: int, bind: str, secret: bytes) -> None:
        keys = shared(secret) if secret else None
        self.pipe: c.Pipe = pipe
        self.memory: Memory = Memory(arena="of the next run" if transport == "arena" else "")
        self.memory.lay_out([], 0)
        self.transfer: Transfer = make(transport, self.memory, (bind, 0))
        if keys is not None:
            self.transfer.windows.secret = keys.window_secret()
        self.transfer.ucx_prints_to(sink)
        self.engine: EngineThread = EngineThread(self.memory)
        self.network: Network = Network(bind, keys)
        self.node: Optional[Node] = None
        self.failed: bool = False
        self.going: bool = True
        self.backlog: List[c.Said] = []
        self.reports: int = 0
        self.carried: Dict[int, None] = {}
        self.poller: zmq.Poller = zmq.Poller()
        self.mail: List[Any] = self.network.sources()
        for source in (*self.mail, pipe.read_fd, self.transfer.fileno(), self.engine.wake):
            self.poller.register(source, zmq.POLLIN)

    # ---- the loop
    def run(self) -> None:
        self.pipe.say(c.Ready(os.getpid(), self.transfer.name))
        while self.going:
            self._watch_output()
            ready = dict(self.poller.poll(self._timeout_ms()))
            if self.pipe.outgoing:
                self.pipe.flush()
            if self.backlog or self.pipe.read_fd in ready:
                earlier, self.backlog = self.backlog, []
                for message in earlier + self.pipe.hear():  # obeying one may put more into the backlog
                    self._obey(message)
                if self.pipe.ended:
                    return
            self._guarded(self._work, ready)

    def _work(self, ready: Dict[Any, int]) -> None:
        node = self.node
        if node is None or self.failed or node.over:
            self.network.receive()  # whatever still comes is another run's, or comes after this one's end
            self.transfer.take()
            self.engine.take()
            return
        if not node.booted:
            return  # what has come already waits in its socket
        if self.transfer.wake in ready or self.engine.wake in ready:
            node.collect()
        if any(source in ready for source in self.mail):
            for src, message in self.network.receive(far=self.network.pull in ready):
                node.receive(src, message)
        node.run_due()

    def _timeout_ms(self) -> Optional[int]:
        if self.backlog:
            return 0
        node = self.node
        due = node.next_due() if node is not None and not self.failed and not node.over else None
        if due is None or node is None:
            return None
        return max(0, math.ceil((due - node.now()) / 1e6))

    def _watch_output(self) -> None:
        """Wait for room in the pipe only while something is queued for it."""
        if self.pipe.outgoing:
            self.poller.register(self.pipe.write_fd, zmq.POLLOUT)
        else:
            try:
                self.poller.unregister(self.pipe.write_fd)
            except KeyError:
                return

    def flush(self) -> None:
        """Write all that is queued, waiting for room: this process is about to stop or to end."""
        while self.pipe.outgoing:
            select.select([], [self.pipe.write_fd], [], 1.0)
            self.pipe.flush()

    def report(self, actions: Tuple[Action, ...], wait: bool, obey: bool) -> None:
        """Say Fired; wait until the runner has seen to it, but not for long: it may wait for us. ``obey``: the machine
        is between two inputs, and takes what it is given meanwhile."""
        self.reports += 1
        number = self.reports
        self.pipe.say(c.Fired(actions, number if wait else 0))
        until = time.monotonic() + CARRIED_TIMEOUT_S
        while wait and number not in self.carried and not self.pipe.ended and (left := until - time.monotonic()) > 0:
            self.flush()
            select.select([self.pipe.read_fd], [], [], left)
            for message in self.pipe.hear():
                if isinstance(message, c.Carried):
                    self.carried[message.wait] = None
                elif obey and isinstance(message, c.Give) and self.node is not None:
                    self.node.give(message.input)
                else:
                    self.backlog.append(message)

    # ---- the runner's orders
    def _obey(self, message: c.Said) -> None:
        if isinstance(message, c.Assign):
            self._guarded(self._assign, message)
        elif isinstance(message, c.Exit):
            self.going = False
        elif isinstance(message, c.Release):
            self._release()
        elif self.node is not None and not self.failed:
            self._guarded(self._command, self.node, message)

    def _command(self, node: Node, message: c.Said) -> None:
        if isinstance(message, c.Ask):
            counts = self.network
            self.pipe.say(c.State(message.n, tuple(node.pending()), dict(counts.sent), dict(counts.received)))
        elif isinstance(message, c.Give):
            item = message.input
            if isinstance(item, Boot) and isinstance(node.spec, WorkerSpec):
                item = Boot(item.nonce, item.incarnation, item.journal, self.transfer.endpoint())
            if isinstance(item, Boot):
                node.give(item)
                for early in node.early:
                    node.give(early)
                node.early.clear()
            elif node.booted:
                node.give(item)
            else:
                node.early.append(item)
        elif isinstance(message, c.Book):
            self.network.book(message.addresses)
            if isinstance(node.spec, WorkerSpec):
                for name, address in message.addresses.items():
                    if address.data and name != node.name:
                        self.transfer.introduce(name, address.data)
        elif isinstance(message, c.Begin):
            node.faults.begin(message.action)
        elif isinstance(message, c.Finish):
            node.faults.end(message.action)
        elif isinstance(message, c.Calm):
            node.calm()
        elif isinstance(message, c.Verify):
            node.over = True  # looking at all memory takes longer than others wait for a sign of life
            self.pipe.say(node.wipe() if message.wipe else node.check())

    def _assign(self, message: c.Assign) -> None:
        built = decode(message.built)
        self.failed = False
        self.network.begin(message.run, message.node, message.life)
        spec = next(spec for spec in built.specs if spec.name == message.node)
        data = ""
        if isinstance(spec, WorkerSpec):
            if self.memory.arena:
                self.memory.arena = f"{ARENAS}/kvmove-{message.run}"
                self.memory.arena_rooms = _in_memory(built)
            places = [(place.name, place.slots) for place in spec.locations]
            sizes = {place.name: place.slot_size(spec.namespace) for place in spec.locations}
            if self.memory.lay_out(places, 0, _stored_chunks(built), sizes):
                self.transfer.memory_changed()
            self.transfer.begin(message.run, message.node)
            data = self.transfer.endpoint()
        parts = Parts(self.memory, self.transfer, self.engine, self.network, self.pipe.say, self.report, self.flush)
        self.node = Node(message, built, parts)
        self.pipe.say(c.Bound(self.network.endpoint, data))

    def _release(self) -> None:
        node = self.node
        clean = not self.failed
        if node is not None:
            clean = clean and not self.transfer.pending() and not self.engine.open
            self._guarded(node.close)
        self.node = None
        self.network.begin("", "", 0)
        self.transfer.begin("", "")
        self.memory.leave_arena()
        self.pipe.say(c.Idle(clean and not self.failed))

    def _guarded(self, what: Any, *args: Any) -> None:
        """Whatever a node cannot survive is told to the runner, which ends the run; the process lives on."""
        try:
            what(*args)
        except (JournalError, HistoryError, SlabError) as error:
            self._fail(type(error).__name__, str(error))
        except Exception:
            self._fail("machine", traceback.format_exc())

    def _fail(self, kind: str, text: str) -> None:
        self.failed = True
        self.pipe.say(c.Failed(kind, text))

    def close(self) -> None:
        self.transfer.stop()
        self.network.close()


def _in_memory(built: Built) -> Dict[int, int]:
    """Bytes of a slot -> bytes of all such slots that nodes keep in CPU memory."""
    found: Dict[int, int] = {}
    for spec in [spec for spec in built.specs if isinstance(spec, WorkerSpec)]:
        for place in spec.locations:
            if kind_of(place.name) == "cpu":
                size = place.slot_size(spec.namespace)
                found[size] = found.get(size, 0) + place.slots * size
    return found


def _stored_chunks(built: Built) -> int:
    """How many chunks the scenario's steps store: no location holds more for long."""
    client = built.specs[-1]
    ops = client.ops if isinstance(client, ClientSpec) else ()
    return sum(len(r.keys) for op in ops for r in op.requests if isinstance(r, StoreRequest))


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when the thread that started it has gone; it may have gone already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def main(argv: List[str]) -> int:
    parser = argparse.ArgumentParser(prog="kvreal.host", description="one node's process, started by kvreal.run")
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--bind", default="127.0.0.1")
    parser.add_argument("--secret-fd", type=int, default=-1)
    args = parser.parse_args(argv)
    die_with_parent(args.parent)
    gc.freeze()  # what is here now stays: no collection need look at it again
    gc.set_threshold(*THRESHOLDS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the runner decides
    secret = b""
    if args.secret_fd >= 0:
        with os.fdopen(args.secret_fd, "rb") as file:
            secret = file.read()
    out, sink = proof.redirect_stdout()
    pipe = c.Pipe(0, out, c.ToHost)
    try:
        host = Host(args.transport, pipe, sink, args.bind, secret)
    except Exception as error:
        what = "" if isinstance(error, TransferError) else f"{type(error).__name__}: "  # that one is a line for people
        pipe.say(c.Failed("transport", f"{what}{error}"))
        return 1
    try:
        host.run()
    finally:
        host.close()
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    # Daemon threads may sit in a transport's C code; leaving by the interpreter's end would wait for them.
    os._exit(status)
