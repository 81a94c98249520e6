"""The client: a machine that plays a scenario's steps by asking controller and engines, and remembers what it was told.

It keeps the contract of ``kvcore.protocol.machine``: pure, one ``handle``, deadlines pulled. What it adds:

* At Boot it emits ``Note("settle", detail="boot")`` and starts its first step when the driver, seeing that all is
  quiet (workers registered), answers ``Command("settled")``. It then emits ``Note("start")``: the workload's time zero.
* A ``settle`` step does the same; the driver answers ``Command("settled")`` when all other nodes are quiet, no message
  is in flight, and this client's ``pending()`` is empty.
* Each step emits ``Note("invoke", event, op)`` and later one of ``ok``, ``fail`` or ``info`` (timed out: it may have
  happened). After the last one has ended: ``Note("finished")``, once.
* ``Command("cancel", (op,))`` asks to cancel that step's event. ``Command("die", (for_ns,))``: the client loses all it
  knew (open steps become info), is deaf, and goes on with its next step after ``for_ns``; "-1": never, it is finished.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Final, List, Optional, Tuple, Union

import msgspec

from kvcore.protocol.config import Config
from kvcore.protocol.machine import Boot, Command, Input, Machine, Note, ProtocolError, Received, Send, TimerFired
from kvcore.protocol.messages import (
    Answer,
    CancelRequest,
    ClearRequest,
    LookupRequest,
    MoveRequest,
    PinRequest,
    StatusRequest,
    StoreRequest,
    UnpinRequest,
    UseRequest,
)
from kvcore.scenario.result import Operation

Request = Union[
    MoveRequest,
    LookupRequest,
    PinRequest,
    UnpinRequest,
    ClearRequest,
    CancelRequest,
    StatusRequest,
    StoreRequest,
    UseRequest,
]

#: States that a first answer of a move or a clear may say; the operation goes on.
INTERIM: Final[Tuple[str, ...]] = ("pinning", "reserving", "copying", "clearing", "releasing")
#: Operations whose first answer may be an interim one; of every other kind any answer is the last.
TWICE_ANSWERED: Final[Tuple[str, ...]] = ("move", "clear")
GOOD: Final[Tuple[str, ...]] = ("ok", "done")


class Op(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, forbid_unknown_fields=True):
    """A compiled step: whom to send which ready messages. ``requests`` are played one after another, each to all of
    ``to``; its num_tokens is the minimum over ``to``, summed over requests."""

    name: str
    kind: str
    """store, move, lookup, use, pin, unpin, clear, cancel, status, settle, sleep, wait or fill."""
    text: str = ""
    """What it does, for people: ``p: a/LocalCPUBackend -> b/LocalCPUBackend``."""
    requests: Tuple[Request, ...] = ()
    to: Tuple[str, ...] = ()
    after_ns: int = 0
    """Wait this long, once the previous step has let go, before issuing it."""
    background: bool = False
    """The next step does not wait for its end."""
    timeout_ns: int = 0
    """0: the client's default."""
    refers: Tuple[str, ...] = ()
    """cancel, status, unpin: the step whose event it names. wait: the steps it waits for (none: all before it)."""
    sleep_ns: int = 0
    window: int = 0
    """Issue it only while fewer steps than this are open (0: any number)."""


class ClientSpec(msgspec.Struct, frozen=True, tag="client", omit_defaults=True, forbid_unknown_fields=True):
    name: str
    config: Config = Config()
    ops: Tuple[Op, ...] = ()


class Open:
    """An operation that has been issued and has not ended."""

    def __init__(self, index: int, op: Op, operation: Operation) -> None:
        self.index: int = index
        self.op: Op = op
        self.operation: Operation = operation
        self.part: int = 0  # which of op.requests is being played
        self.cancel: bool = False  # somebody wants it cancelled as soon as its event is known
        self.answered: Dict[str, Answer] = {}  # by the address of who answered this part


class Client(Machine):
    """Plays ``spec.ops`` in order. ``operations`` lists what was issued so far, in order of issue."""

    def __init__(self, spec: ClientSpec) -> None:
        super().__init__()
        self.spec: ClientSpec = spec
        self.ops: Tuple[Op, ...] = spec.ops
        self.default_timeout_ns: int = spec.config.deadline_ns + 2 * spec.config.lease_ns
        self.operations: List[Operation] = []
        self.by_name: Dict[str, Operation] = {}
        self.open: Dict[str, Open] = {}
        self.waiters: List[str] = []  # open wait steps
        self.askers: Dict[str, List[str]] = {}  # step -> open steps that wait for its event
        self.next: int = 0  # the next step to issue
        self.waited: bool = False  # its ``after`` has passed
        self.blocked: str = ""  # the open foreground step
        self.booted: bool = False
        self.started: bool = False
        self.settling: str = ""  # the settle step that waits for the driver; "boot" before the first step
        self.finished: bool = False
        self.dead: bool = False
        self.on: Dict[Any, Callable[[int, Any], None]] = {
            Received: self._received,
            Boot: self._boot,
            Command: self._command,
            TimerFired: self._alarm,
        }

    # ---- the contract ------------------------------------------------------------------------------------------------
    def handle(self, now: int, item: Input) -> List[Any]:
        out: List[Any] = []
        self.out = out
        name = self.timers.pop_due(now)
        while name is not None:
            self._timer(now, name[0], name[1])
            name = self.timers.pop_due(now)
        handler = self.on.get(type(item))
        if handler is None:
            raise ProtocolError(f"{self.spec.name}: a client takes no {type(item).__name__}")
        handler(now, item)
        self._advance(now)
        return out

    def pending(self) -> List[str]:
        """The open steps. A settle step is not one of them: it waits for the others to be quiet."""
        found = [f"{item.op.kind} {name} is open" for name, item in self.open.items() if name != self.settling]
        if self.settling or self.finished:
            return found
        if not self.started:
            return [*found, "not started"]
        if self.next < len(self.ops):
            found.append(f"{len(self.ops) - self.next} steps are still to come, next {self.ops[self.next].name}")
        return found

    # ---- inputs ------------------------------------------------------------------------------------------------------
    def _boot(self, now: int, boot: Boot) -> None:
        if self.booted:
            raise ProtocolError(f"{self.spec.name}: booted twice")
        self.booted = True
        self.settling = "boot"
        self.timers.set(("boot", 0, 0), now + self.default_timeout_ns)
        self.out.append(Note("settle", 0, "boot"))

    def _alarm(self, now: int, fired: TimerFired) -> None:
        """Whatever is due has run already."""

    def _timer(self, now: int, kind: str, index: int) -> None:
        if kind == "timeout":
            item = self.open.get(self.ops[index].name)
            if item is not None:
                self._end(now, item, "info", "no answer in time")
        elif kind == "after":
            self.waited = True
        elif kind == "boot":
            self._start()
        elif kind == "alive":
            self.dead = False
        elif kind == "sleep":
            item = self.open.get(self.ops[index].name)
            if item is not None:
                self._end(now, item, "ok")

    def _command(self, now: int, command: Command) -> None:
        if command.what == "settled":
            if self.settling == "boot":
                self._start()
            elif self.settling:
                self._end(now, self.open[self.settling], "ok")
        elif command.what == "cancel":
            for name in command.args:
                self._cancel(name)
        elif command.what == "die":
            self._die(now, int(command.args[0]) if command.args else -1)
        else:
            raise ProtocolError(f"{self.spec.name}: a client knows no command {command.what}")

    def _received(self, now: int, received: Received) -> None:
        answer = received.msg
        if type(answer) is not Answer:
            raise ProtocolError(f"{self.spec.name}: a client takes no {type(answer).__name__}")
        item = self.open.get(answer.op) or self._open_part(answer.op)
        if item is None:
            return  # late, doubled, or the answer to a fault's cancel
        operation = item.operation
        if answer.event and not operation.event:
            operation.event = answer.event
            self._event_known(now, item.op.name, answer.event)
        if item.op.kind in TWICE_ANSWERED and answer.state in INTERIM:
            operation.state = answer.state
            operation.num_tokens = operation.promised = answer.num_tokens
            return
        item.answered[received.src] = answer
        if len(item.answered) >= len(item.op.to):
            self._part_done(now, item)

    def _open_part(self, name: str) -> Optional[Open]:
        """The open step of several requests whose present one is called ``name``."""
        step, _, part = name.rpartition("#")
        item = self.open.get(step)
        return item if item is not None and part == str(item.part) else None

    # ---- playing the steps -------------------------------------------------------------------------------------------
    def _start(self) -> None:
        self.timers.cancel(("boot", 0, 0))
        self.settling = ""
        self.started = True
        self.out.append(Note("start"))

    def _advance(self, now: int) -> None:
        """Issue what may be issued; say so when all has ended."""
        ops = self.ops
        if not self.started or (self.dead and self.next < len(ops)):
            return
        while self.next < len(ops) and not self.blocked:
            op = ops[self.next]
            if op.window and len(self.open) >= op.window:
                return
            if op.after_ns and not self.waited:
                if not self.timers.armed(("after", self.next, 0)):
                    self.timers.set(("after", self.next, 0), now + op.after_ns)
                return
            self.waited = False
            self.next += 1
            self._issue(now, self.next - 1, op)
        if self.next >= len(ops) and not self.open and not self.finished:
            self.finished = True
            self.out.append(Note("finished"))

    def _issue(self, now: int, index: int, op: Op) -> None:
        operation = Operation(op=op.name, what=op.kind, text=op.text, start_ns=now)
        self.operations.append(operation)
        self.by_name[op.name] = operation
        item = Open(index, op, operation)
        self.open[op.name] = item
        self.out.append(Note("invoke", 0, op.name))
        if not op.background:
            self.blocked = op.name
        if op.kind == "sleep":
            self.timers.set(("sleep", index, 0), now + op.sleep_ns)
            return
        self.timers.set(("timeout", index, 0), now + (op.timeout_ns or self.default_timeout_ns))
        if op.kind == "settle":
            self.settling = op.name
            self.out.append(Note("settle", 0, op.name))
        elif op.kind == "wait":
            self.waiters.append(op.name)
            self._check_wait(now, item)
        elif op.refers:
            self._ask_about(now, item)
        else:
            self._send_part(now, item)

    def _send_part(self, now: int, item: Open) -> None:
        op = item.op
        if item.part >= len(op.requests):
            self._end(now, item, "ok")
            return
        request = op.requests[item.part]
        for address in op.to:
            self.out.append(Send(address, request))

    def _part_done(self, now: int, item: Open) -> None:
        """Every address has answered this request: take the minimum, keep the worst, go to the next one."""
        answered = item.answered
        answers = [answered[address] for address in sorted(answered)]  # whoever answered first
        operation = item.operation
        worst = min(answers, key=_goodness) if len(answers) > 1 else answers[0]
        tokens = min(answer.num_tokens for answer in answers)
        if item.part == 0:
            operation.num_tokens = tokens
        else:
            operation.num_tokens += tokens
        operation.detail = worst.detail or operation.detail
        operation.n = worst.n
        operation.source = worst.source or operation.source
        operation.found = worst.found or operation.found
        if item.part == 0 or worst.state not in GOOD:
            operation.state = worst.state
            operation.reason = worst.reason
        item.part += 1
        item.answered = {}
        if item.part < len(item.op.requests):
            self._send_part(now, item)
        else:
            self._end(now, item, operation.state, operation.reason)

    def _end(self, now: int, item: Open, state: str, reason: str = "") -> None:
        op = item.op
        operation = item.operation
        operation.state = state
        operation.reason = reason
        operation.end_ns = now
        del self.open[op.name]
        self.timers.cancel(("timeout", item.index, 0))
        if self.blocked == op.name:
            self.blocked = ""
        if self.settling == op.name:
            self.settling = ""
        self.out.append(Note(_outcome(op.kind, state), operation.event, op.name))
        if op.kind == "wait":
            self.waiters.remove(op.name)
        if op.name in self.askers:
            self._event_known(now, op.name, operation.event)
        for name in list(self.waiters):
            waiter = self.open.get(name)
            if waiter is not None:
                self._check_wait(now, waiter)

    def _check_wait(self, now: int, item: Open) -> None:
        if item.op.refers:
            still = any(name in self.open or name not in self.by_name for name in item.op.refers)
        else:
            still = next(iter(self.open)) != item.op.name  # dicts keep the order of issue
        if not still:
            self._end(now, item, "ok")

    # ---- steps that name another step's event -----------------------------------------------------------------------
    def _ask_about(self, now: int, item: Open) -> None:
        """Send it now if the event is known; else it waits until it is, or until the other step has ended without."""
        target = item.op.refers[0]
        operation = self.by_name.get(target)
        event = operation.event if operation is not None else 0
        request = item.op.requests[0]
        if type(request) is StatusRequest and request.idem and not event:
            event = -1  # asks by idempotency key
        if event == 0:
            if target in self.open:
                self.askers.setdefault(target, []).append(item.op.name)
            else:
                self._end(now, item, "refused", f"{target} has no event")
            return
        message = msgspec.structs.replace(request, event=event) if event > 0 else request
        for address in item.op.to:
            self.out.append(Send(address, message))

    def _event_known(self, now: int, name: str, event: int) -> None:
        """``name``'s event is known (0: it ended without one): let those go on that wait for it."""
        for asker in self.askers.pop(name, ()):
            waiting = self.open.get(asker)
            if waiting is not None:
                self._ask_about(now, waiting)
        item = self.open.get(name)
        if event and item is not None and item.cancel:
            self._cancel(name)

    def _cancel(self, name: str) -> None:
        """A fault's cancel: unlike a step's it has no operation of its own, and nobody waits for its answer."""
        item = self.open.get(name)
        if item is None:
            return
        item.cancel = True
        if item.operation.event:
            for address in item.op.to:
                self.out.append(Send(address, CancelRequest(f"{name}!cancel", item.operation.event)))

    def _die(self, now: int, for_ns: int) -> None:
        """All that was open may or may not have happened. Then deaf, and back after ``for_ns`` (-1: never)."""
        self.dead = True
        if for_ns < 0:
            self.next = len(self.ops)
        for item in list(self.open.values()):
            if item.op.name in self.open:
                self._end(now, item, "info", "the client died")
        if not self.started:
            self._start()
        if for_ns >= 0:
            self.timers.set(("alive", 0, 0), now + for_ns)


def _goodness(answer: Answer) -> Tuple[int, int]:
    """Sorts the worst answer first: what did not go well, then what found least."""
    return (1 if answer.state in GOOD else 0), answer.num_tokens


def _outcome(kind: str, state: str) -> str:
    """The note that ends an operation: ok, fail or info. A question is ok whatever the answer says."""
    if state == "info":
        return "info"
    if state in GOOD or (kind == "status" and state != "refused"):
        return "ok"
    return "fail"


def request_name(name: str, part: int, parts: int) -> str:
    """The ``op`` that a request carries: the step's name, with its number where the step has several."""
    return name if parts == 1 else f"{name}#{part}"
