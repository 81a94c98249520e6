"""A scenario's steps, compiled to what the client plays: addresses, ready messages, durations in nanoseconds."""

from __future__ import annotations

from collections import Counter
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from kvcore.protocol.chunks import step_chunks
from kvcore.protocol.config import Config
from kvcore.protocol.messages import (
    CancelRequest,
    ClearRequest,
    LookupRequest,
    MoveRequest,
    Namespace,
    PinRequest,
    Position,
    StatusRequest,
    StoreRequest,
    Terms,
    UnpinRequest,
    UseRequest,
    terms,
)
from kvcore.scenario.client import Op, Request, request_name
from kvcore.scenario.prompts import Keys, Prompts, PromptText
from kvcore.scenario.schema import CONTROLLER, STEP_KINDS, Body, Scenario, Step, step_names
from kvcore.scenario.units import Duration, Tokens


class BuildError(ValueError):
    """A scenario that cannot be built; one line."""


class Compiler:
    """``own``: the namespace of each instance, and of each place (``a/LocalCPUBackend``); ``common``: the one that most
    instances have, which lookups are asked under."""

    def __init__(
        self,
        scenario: Scenario,
        config: Config,
        own: Mapping[str, Namespace],
        common: Namespace,
        prompts: Prompts,
    ) -> None:
        self.scenario: Scenario = scenario
        self.config: Config = config
        self.own: Mapping[str, Namespace] = own
        self.common: Namespace = common
        self.prompts: Prompts = prompts
        self.chunk: int = scenario.kv.chunk_tokens
        self.kinds: Dict[str, str] = {}  # step name -> kind, of the steps so far
        self.idems: Dict[str, str] = {}  # step name -> its idempotency key
        self.lengths: Dict[str, int] = {}  # prompt -> tokens of all of it
        self.named: Dict[str, None] = {}
        self.filled: Dict[str, int] = {}  # prefix of fills -> how many prompts of it there are
        self._by_kind: Dict[str, Callable[[str, Any], Op]] = {
            "store": self._store,
            "move": self._move,
            "lookup": self._lookup,
            "use": self._use,
            "pin": self._pin,
            "unpin": self._unpin,
            "clear": self._clear,
            "cancel": self._cancel,
            "status": self._status,
            "settle": self._settle,
            "sleep": self._sleep,
            "wait": self._wait,
            "fill": self._fill,
        }

    def ops(self) -> Tuple[Op, ...]:
        steps = self.scenario.steps
        self._measure(steps)
        names = step_names(steps)
        name, times = Counter(names).most_common(1)[0] if names else ("", 1)
        if times > 1:
            raise BuildError(f"{self.scenario.name}: {times} steps are called {name}")
        return tuple([self._op(name, step) for name, step in zip(names, steps)])

    def named_prompts(self) -> Tuple[str, ...]:
        """The prompts that steps name."""
        return tuple(self.named)

    def _error(self, where: str, text: str) -> BuildError:
        return BuildError(f"{self.scenario.name}: {where}: {text}")

    # ---- prompts and places ------------------------------------------------------------------------------------------
    def _measure(self, steps: Tuple[Step, ...]) -> None:
        """Each prompt's length: as declared, else the most that a store says."""
        for name, text in self.prompts.texts.items():
            self.lengths[name] = text.tokens or len(text.ids)
        declared = {name: length for name, length in self.lengths.items() if length}
        for step in steps:
            store = step.store
            if store is not None and store.tokens is not None and store.prompt not in declared:
                count = store.tokens.count(self.chunk)
                self.lengths[store.prompt] = max(self.lengths.get(store.prompt, 0), count)
                self.prompts.declare(store.prompt, PromptText())

    def _keys(self, where: str, namespace: Namespace, prompt: str, tokens: Optional[Tokens]) -> Keys:
        length = self.lengths.get(prompt, 0)
        count = tokens.count(self.chunk) if tokens is not None else length
        if prompt not in self.prompts.texts or not length:
            raise self._error(where, f"prompt {prompt} has no length: declare it, or say a store's tokens")
        if not 0 < count <= length:
            raise self._error(where, f"tokens: {count}, expected 1 to {length}, all of prompt {prompt}")
        self.named[prompt] = None
        return self.prompts.keys(namespace, prompt, count)

    def _position(self, where: str, at: str) -> Position:
        instance, _, location = at.partition("/")
        spec = self.scenario.instances.get(instance)
        if spec is None:
            raise self._error(where, f"there is no instance {instance!r}")
        if location not in spec.locations:
            raise self._error(where, f"instance {instance} has no location {location!r}")
        return instance, location

    def _claimed(self, position: Position) -> Position:
        """The position as the controller knows it: under the id that the instance claims."""
        return self.scenario.instances[position[0]].id or position[0], position[1]

    def _ranks(self, instance: str) -> Tuple[str, ...]:
        return tuple([f"{instance}/{rank}" for rank in range(self.scenario.instances[instance].ranks)])

    def _ns(self, duration: Optional[Duration]) -> int:
        return duration.ns(self.config) if duration is not None else 0

    def _target(self, where: str, name: str, kinds: Tuple[str, ...]) -> Tuple[str, ...]:
        kind = self.kinds.get(name)
        if kind not in kinds:
            what = f"a {kind}" if kind else "no earlier step"
            raise self._error(where, f"{name} is {what}, expected a {' or '.join(kinds)} before it")
        return (name,)

    # ---- steps -------------------------------------------------------------------------------------------------------
    def _op(self, name: str, step: Step) -> Op:
        kind = step.kind
        if not kind:
            raise self._error(f"step {name}", "it says nothing to do")
        op = self._by_kind[kind](name, step.body)
        self.kinds[name] = kind
        return op

    def _plain(
        self,
        name: str,
        kind: str,
        body: Body,
        text: str,
        requests: Tuple[Request, ...] = (),
        to: Tuple[str, ...] = (CONTROLLER,),
        refers: Tuple[str, ...] = (),
        sleep_ns: int = 0,
        more_ns: int = 0,
    ) -> Op:
        """``more_ns``: what it takes by itself, on top of the client's default timeout."""
        timeout_ns = self._ns(body.timeout)
        if not timeout_ns and more_ns:
            timeout_ns = self.config.deadline_ns + 2 * self.config.lease_ns + more_ns
        return Op(
            name,
            kind,
            text,
            requests,
            to,
            self._ns(body.after),
            body.background,
            timeout_ns,
            refers,
            sleep_ns,
            body.window,
        )

    def _move(self, name: str, body: Any) -> Op:
        where = f"step {name}"
        src = self._position(where, body.src)
        dst = self._position(where, body.dst)
        keys, lens = ((), ()) if body.all else self._keys(where, self.own[body.src], body.prompt, body.tokens)
        if body.idem:
            self.idems[name] = body.idem
        deadline_ns = self._ns(body.deadline)
        request = MoveRequest(
            name,
            self._claimed(src),
            self._claimed(dst),
            keys,
            lens,
            body.copy,
            body.idem,
            deadline_ns,
            not body.if_room,
            (),
            self._terms(body),
            self._step(self.own[body.src], body),
        )
        what = "all" if body.all else f"{body.prompt}, {sum(lens)} tokens"
        text = f"{what}: {body.src} -> {body.dst}{', copy' if body.copy else ''}"
        more_ns = max(0, deadline_ns - self.config.deadline_ns)
        return self._plain(name, "move", body, text, (request,), more_ns=more_ns)

    def _step(self, own: Namespace, body: Any) -> int:
        if body.granularity != "prefix":
            return 0
        return step_chunks(own, body.step.count(own.chunk_tokens) if body.step is not None else 0)

    def _terms(self, body: Any) -> Optional[Terms]:
        cap = 0 if body.cap is None else int(body.cap.bytes_per_s)
        return terms(body.priority, body.weight, cap)

    def _store(self, name: str, body: Any) -> Op:
        where = f"step {name}"
        instance, location = self._position(where, body.at)
        keys, lens = self._keys(where, self.own[body.at], body.prompt, body.tokens)
        request = StoreRequest(name, location, keys, lens)
        text = f"{body.prompt}, {sum(lens)} tokens: {body.at}"
        return self._plain(name, "store", body, text, (request,), self._ranks(instance))

    def _use(self, name: str, body: Any) -> Op:
        where = f"step {name}"
        instance, location = self._position(where, body.at)
        keys, lens = self._keys(where, self.own[body.at], body.prompt, body.tokens)
        hold_ns = self._ns(body.hold)
        request = UseRequest(name, location, keys, lens, hold_ns)
        text = f"{body.prompt}: {body.at}"
        return self._plain(name, "use", body, text, (request,), self._ranks(instance), more_ns=hold_ns)

    def _lookup(self, name: str, body: Any) -> Op:
        where = f"step {name}"
        if body.of:
            self._position(where, body.of)
        space = self.own[body.of] if body.of else self.common
        keys, lens = self._keys(where, space, body.prompt, body.tokens)
        return self._plain(name, "lookup", body, body.prompt, (LookupRequest(name, keys, lens),))

    def _pin(self, name: str, body: Any) -> Op:
        where = f"step {name}"
        position = self._position(where, body.at)
        keys, lens = self._keys(where, self.own[body.at], body.prompt, body.tokens)
        request = PinRequest(name, self._claimed(position), keys, lens, self._ns(body.lease))
        return self._plain(name, "pin", body, f"{body.prompt}: {body.at}", (request,))

    def _unpin(self, name: str, body: Any) -> Op:
        refers = self._target(f"step {name}", body.pin, ("pin",))
        return self._plain(name, "unpin", body, body.pin, (UnpinRequest(name, 0),), refers=refers)

    def _clear(self, name: str, body: Any) -> Op:
        position = self._position(f"step {name}", body.at)
        return self._plain(name, "clear", body, body.at, (ClearRequest(name, self._claimed(position)),))

    def _cancel(self, name: str, body: Any) -> Op:
        refers = self._target(f"step {name}", body.op, ("move",))
        return self._plain(name, "cancel", body, body.op, (CancelRequest(name, 0),), refers=refers)

    def _status(self, name: str, body: Any) -> Op:
        """By the idempotency key that it says, or that its move has, where the event is not known."""
        refers = self._target(f"step {name}", body.op, ("move", "pin", "clear")) if body.op else ()
        idem = body.idem or self.idems.get(body.op, "")
        if not refers and not idem:
            raise self._error(f"step {name}", "a status needs op or idem")
        request = StatusRequest(name, 0, idem, body.wait)
        return self._plain(name, "status", body, body.op or f"idem {idem}", (request,), refers=refers)

    def _settle(self, name: str, body: Any) -> Op:
        return self._plain(name, "settle", body, "", to=())

    def _sleep(self, name: str, body: Any) -> Op:
        return self._plain(name, "sleep", body, str(body.duration), to=(), sleep_ns=self._ns(body.duration))

    def _wait(self, name: str, body: Any) -> Op:
        for other in body.ops:
            self._target(f"step {name}", other, STEP_KINDS)
        return self._plain(name, "wait", body, ", ".join(body.ops) or "all so far", to=(), refers=body.ops)

    def _fill(self, name: str, body: Any) -> Op:
        """Distinct prompts, each ``each`` long, one store after another; a shorter one last if it does not divide."""
        where = f"step {name}"
        instance, location = self._position(where, body.at)
        total = body.tokens.count(self.chunk) if body.tokens is not None else body.slots * self.chunk
        each = body.each.count(self.chunk)
        if total < 1 or each < 1:
            raise self._error(where, "a fill needs slots or tokens above 0")
        parts = (total + each - 1) // each
        requests: List[Request] = []
        for part in range(parts):
            number = self.filled[body.prefix] = self.filled.get(body.prefix, 0) + 1
            prompt = f"{body.prefix}-{number}"
            self.prompts.declare(prompt, PromptText())
            self.lengths[prompt] = min(each, total - part * each)
            keys, lens = self.prompts.keys(self.own[body.at], prompt, self.lengths[prompt])
            requests.append(StoreRequest(request_name(name, part, parts), location, keys, lens))
        text = f"{parts} prompts, {total} tokens: {body.at}"
        return self._plain(name, "fill", body, text, tuple(requests), self._ranks(instance))
