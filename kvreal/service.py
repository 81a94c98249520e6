"""A node that faces talk to: the real node's code in the asyncio loop of a process that also serves HTTP.

    service = Service(spec, Endpoints("127.0.0.1:8300"), journal=..., records=...)
    await service.start()
    answer = await service.ask(LookupRequest("", keys, lens))      # ``op`` is filled in
    asked = service.begin(MoveRequest(...)); await asked.first; await asked.end
    async for now, item, effects in service.watch(): ...
    value = await service.peek(lambda machine: machine.pending())
    await service.stop()

One thread runs it all: an input, its journal records and its sends are carried out before anything else is looked at,
so that a face can never be told what is not durable yet. What waits (copies, the engine) waits in threads of its own.
A journal that cannot be written ends the service (``service.failed``): going on would make its answers lies.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from pathlib import Path
from typing import (
    Any,
    AsyncIterator,
    Callable,
    Deque,
    Dict,
    Final,
    Iterator,
    List,
    Optional,
    Protocol,
    Sequence,
    Set,
    Tuple,
    TypeVar,
    cast,
)

import msgspec

from kvcore.protocol import machine as m
from kvcore.protocol.config import NodeSpec, WorkerSpec
from kvcore.protocol.messages import Answer, Wire
from kvcore.scenario.build import Built
from kvcore.scenario.history import VERSION, FileHistory, Header
from kvreal.control import Assign, Said
from kvreal.endpoints import FACE, Endpoints
from kvreal.node import Node, Parts

log = logging.getLogger("kvmove.service")

TERMINAL: Final = frozenset({"done", "failed", "refused", "ok"})
WATCH_QUEUE: Final = 10_000
"""Steps that a slow watcher may be behind before it loses some."""
BEHIND_S: Final = 0.01
"""How far those who only look on may be behind: what a step asks for goes out first."""
BEHIND_MOST: Final = 1_000

Step = Tuple[int, m.Input, List[m.Effect]]
Listener = Callable[[int, m.Input, List[m.Effect]], None]
T = TypeVar("T")


class ServiceStopped(Exception):
    """The service ended while it was being asked."""


class JournalLike(Protocol):
    def append(self, record: m.JournalRecord) -> None: ...

    def close(self) -> None: ...


class Asked:
    """A question on its way. ``first``: the first answer; ``end``: the one that ends the matter (often the same)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.first: asyncio.Future[Answer] = loop.create_future()
        self.end: asyncio.Future[Answer] = loop.create_future()

    def answered(self, answer: Answer) -> bool:
        """Take an answer in; True if it was the last one."""
        if not self.first.done():
            self.first.set_result(answer)
        if answer.state in TERMINAL and not self.end.done():
            self.end.set_result(answer)
        return answer.state in TERMINAL

    def broken(self) -> None:
        for future in (self.first, self.end):
            if not future.done():
                future.set_exception(ServiceStopped("the service has stopped"))
                future.exception()  # nobody need look at it


class Watcher:
    """A queue of steps. One that is full loses the newest, and says so by ``lost``."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Optional[Step]] = asyncio.Queue(WATCH_QUEUE)
        self.lost: int = 0

    def put(self, step: Optional[Step]) -> None:
        try:
            self.queue.put_nowait(step)
        except asyncio.QueueFull:
            self.lost += 1


class _Tap:
    """Stands where the node's history does: sees each step before its effects are carried out, and keeps the log."""

    on = True

    def __init__(self, service: Service, history: Optional[FileHistory]) -> None:
        self.service: Service = service
        self.history: Optional[FileHistory] = history

    def add(self, now: int, node: str, item: m.Input, effects: List[m.Effect]) -> None:
        if self.history is not None:
            self.history.add(now, node, item, effects)
        self.service._seen(now, item, effects)

    def flush(self) -> None:
        if self.history is not None:
            self.history.flush()

    def close(self) -> None:
        if self.history is not None:
            self.history.close()


class _Nothing:
    """A controller has no memory, no transfers and no engine."""

    open = 0
    filled_bytes = read_bytes = read_errors = 0

    def begin(self) -> None:
        pass

    def next_deadline(self) -> None:
        return None

    def expire(self, now: int) -> None:
        pass

    def take(self) -> Tuple[()]:
        return ()

    def pending(self) -> List[str]:
        return []


class WorkerParts(msgspec.Struct, frozen=True):
    """What a worker needs besides its sockets; laid out and begun by whoever makes it."""

    memory: Any
    transfer: Any
    engine: Any


class Service:
    def __init__(
        self,
        spec: NodeSpec,
        network: Endpoints,
        *,
        journal: Optional[JournalLike] = None,
        records: Sequence[m.JournalRecord] = (),
        worker: Optional[WorkerParts] = None,
        history: Optional[Path] = None,
    ) -> None:
        """``records``: what the journal held when it was opened, oldest first. ``spec.name`` is ``network.address``."""
        self.spec: NodeSpec = spec
        self.network: Endpoints = network
        self.records: Tuple[m.JournalRecord, ...] = tuple(records)
        nothing: Any = _Nothing()
        self.worker: WorkerParts = worker or WorkerParts(nothing, nothing, nothing)
        built = Built(spec.name, "racing", 0, spec.config, (spec,), 0)
        parts = Parts(
            self.worker.memory, self.worker.transfer, self.worker.engine, cast(Any, network), self._said,
            lambda actions, wait, obey: None, lambda: None,
        )  # fmt: skip
        #: the machine's clock counts from 1970, and never jumps: what it stamps means something to others as well
        self.base_ns: int = time.monotonic_ns() - time.time_ns()
        self.node: Node = Node(Assign("service", spec.name, 1, b"", self.base_ns, faults=False), built, parts)
        self._copies: Callable[[Any], None] = self.node.effects[m.StartCopy]
        self.node.effects[m.StartCopy] = self._start_copy
        self.node.journal = cast(Any, journal)
        log_file = FileHistory(history, Header(VERSION, "real", spec.name, 0, None, spec.name)) if history else None
        self.node.history = cast(Any, _Tap(self, log_file))
        self.machine: m.Machine = self.node.machine
        self.failed: Optional[asyncio.Future[BaseException]] = None
        #: called with each step before its effects are carried out; must be quick
        self.listeners: List[Listener] = []
        #: called with each step soon after its effects: for those who only tell others of it
        self.onlookers: List[Listener] = []
        self._behind: List[Step] = []
        self._behind_alarm: Optional[asyncio.TimerHandle] = None
        self.watchers: Set[Watcher] = set()
        self.asked: Dict[str, Asked] = {}
        self.count: int = 0
        self.running: bool = False
        self._stopped: bool = False
        self._giving: bool = False
        self._told: bool = False
        self._waiting: Deque[m.Input] = deque()
        self._alarm: Optional[asyncio.TimerHandle] = None
        self._alarm_ns: int = -1
        self._loop: asyncio.AbstractEventLoop = cast(Any, None)
        network.local = self._to_face

    # ---- life
    async def start(self) -> None:
        """Boot the machine (a controller replays its journal in here) and begin to listen."""
        self._loop = asyncio.get_running_loop()
        self.failed = self._loop.create_future()
        self.running = True
        if isinstance(self.spec, WorkerSpec):
            self.give(m.Boot(nonce=uuid.uuid4().int >> 66, endpoint=self.worker.transfer.endpoint()))
            self._loop.add_reader(self.worker.transfer.fileno(), self._collect)
            self._loop.add_reader(self.worker.engine.wake, self._collect)
        else:
            self.give(m.Boot(journal=self.records))
        self._fds: List[int] = [self.network.pull.fileno()]
        self._loop.add_reader(self._fds[0], self._readable)
        if self.network.near is not None:
            self._fds.append(self.network.near.fileno())
            self._loop.add_reader(self._fds[1], self._near_readable)
        self._loop.call_soon(self._readable)

    async def stop(self) -> None:
        """Close all, also after a failure; whoever still waits for an answer is told ServiceStopped."""
        if self._stopped:
            return
        self._stopped = True
        self.running = False
        for fd in self._fds:
            self._loop.remove_reader(fd)
        if isinstance(self.spec, WorkerSpec):
            self._loop.remove_reader(self.worker.transfer.fileno())
            self._loop.remove_reader(self.worker.engine.wake)
            self.worker.transfer.stop()
        if self._alarm is not None:
            self._alarm.cancel()
        self.catch_up()
        for asked in self.asked.values():
            asked.broken()
        self.asked = {}
        for watcher in self.watchers:
            watcher.put(None)
        self.node.close()
        self.network.close()

    # ---- inputs
    def give(self, item: m.Input) -> None:
        """One input to the machine. From within an effect it waits for that effect's input to be finished."""
        self._give(item)
        self._arm()

    def _give(self, item: m.Input) -> None:
        self._waiting.append(item)
        if self._giving:
            return
        self._giving = True
        self.network.cork()
        try:
            while self._waiting:
                self.node.give(self._waiting.popleft())
        except Exception as error:  # a journal that cannot be written, a machine that breaks its contract
            self._fail(error)
        finally:
            self._giving = False
            if self._told:  # somebody waits for an answer: it goes first, and who was told of it after
                self._told = False
                self._loop.call_soon(self.network.uncork)
            else:
                self.network.uncork()

    def _start_copy(self, effect: m.StartCopy) -> None:
        """A copy takes a core at once: what was to be said before it goes out first."""
        self.network.uncork()
        self._copies(effect)
        self.network.cork()

    def _fail(self, error: BaseException) -> None:
        self.catch_up()
        log.critical("the service cannot go on: %s: %s", type(error).__name__, error)
        self._waiting.clear()
        self.running = False
        for asked in self.asked.values():
            asked.broken()
        self.asked = {}
        if self.failed is not None and not self.failed.done():
            self.failed.set_result(error)

    def _near_readable(self) -> None:
        self._hear(self.network.nearby())

    def _readable(self) -> None:
        """The socket's descriptor tells of changes only: read until there is nothing more, a batch at a time."""
        self._hear(self.network.arriving())
        if self.running and self.network.more:
            self._loop.call_soon(self._readable)

    def _hear(self, messages: Iterator[Tuple[str, Wire]]) -> None:
        if not self.running:
            return
        for src, message in messages:
            self._give(m.Received(src, message))
            if not self.running:
                return
        self._arm()

    def _collect(self) -> None:
        if self.running:
            self.network.cork()
            try:
                self.node.collect()
            except Exception as error:
                self._fail(error)
            self.network.uncork()
            self._arm()

    def _arm(self) -> None:
        """One alarm: for whatever is due first."""
        due = self.node.next_due() if self.running else None
        if due is None:
            if self._alarm is not None:
                self._alarm.cancel()
                self._alarm, self._alarm_ns = None, -1
            return
        if due == self._alarm_ns:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_ns = due
        self._alarm = self._loop.call_later(max(0.0, (due - self.node.now()) / 1e9), self._due)

    def _due(self) -> None:
        self._alarm, self._alarm_ns = None, -1
        if not self.running:
            return
        self.network.cork()
        try:
            self.node.run_due()
        except Exception as error:
            self._fail(error)
        self.network.uncork()
        # What arrived in a stretch without a wakeup is seen here at the latest.
        self._readable()
        self._arm()

    # ---- faces
    def begin(self, request: Any) -> Asked:
        """Give the machine a face's request. Its ``op`` may be anything: an answer finds its way by address."""
        if not self.running:
            raise ServiceStopped("the service has stopped")
        self.count += 1
        face = f"{FACE}{self.count}"
        asked = self.asked[face] = Asked(self._loop)
        self.give(m.Received(face, cast(Wire, msgspec.structs.replace(request, op=request.op or face))))
        return asked

    async def ask(self, request: Any, timeout_s: Optional[float] = None) -> Answer:
        """The first answer, and no other. TimeoutError after ``timeout_s``: the request goes on, nobody is told."""
        first = self.begin(request).first
        face = f"{FACE}{self.count}"
        try:
            return first.result() if first.done() else await asyncio.wait_for(asyncio.shield(first), timeout_s)
        finally:
            self.asked.pop(face, None)

    def _to_face(self, dst: str, message: Wire) -> None:
        asked = self.asked.get(dst)
        self._told = self._told or asked is not None
        if asked is not None and isinstance(message, Answer) and asked.answered(message):
            del self.asked[dst]

    async def peek(self, what: Callable[[Any], T]) -> T:
        """``what(machine)``, between two inputs. It must not change anything."""
        if not self.running:
            raise ServiceStopped("the service has stopped")
        return what(self.machine)

    async def watch(self) -> AsyncIterator[Step]:
        """Every step from now on, until the service stops."""
        watcher = Watcher()
        self.watchers.add(watcher)
        try:
            while (step := await watcher.queue.get()) is not None:
                yield step
        finally:
            self.watchers.discard(watcher)

    def _seen(self, now: int, item: m.Input, effects: List[m.Effect]) -> None:
        for listener in self.listeners:
            try:
                listener(now, item, effects)
            except Exception:  # whoever looks on must not stop what it looks at
                log.exception("a listener failed at %s", type(item).__name__)
        if self.onlookers:
            self._behind.append((now, item, effects))
            if self._behind_alarm is None:
                self._behind_alarm = self._loop.call_later(BEHIND_S, self.catch_up)
            elif len(self._behind) >= BEHIND_MOST:
                self.catch_up()
        for watcher in self.watchers:
            watcher.put((now, item, effects))

    def catch_up(self) -> None:
        """Tell those who look on what has happened by now."""
        if self._behind_alarm is not None:
            self._behind_alarm.cancel()
            self._behind_alarm = None
        behind, self._behind = self._behind, []
        for now, item, effects in behind:
            for onlooker in self.onlookers:
                try:
                    onlooker(now, item, effects)
                except Exception:
                    log.exception("an onlooker failed at %s", type(item).__name__)

    def _said(self, said: Said) -> None:
        """Notes that a runner would wait for; faces see them by ``watch``."""
