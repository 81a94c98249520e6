"""What each route of the controller does, without HTTP: bodies in, replies out. One instance a controller."""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any, Dict, Final, List, Optional, Sequence, Tuple, Union

import msgspec
from msgspec import UNSET, UnsetType

from kvcore.protocol import machine as m
from kvcore.protocol.chunks import chunk_keys, packed_keys, step_chunks
from kvcore.protocol.controller import Controller
from kvcore.protocol.messages import (
    Answer,
    CancelRequest,
    ClearRequest,
    Found,
    Key,
    MoveRequest,
    Namespace,
    PinRequest,
    Position,
    Register,
    StatusRequest,
    Terms,
    UnpinRequest,
    event_name,
    event_number,
    terms,
)
from kvcore.protocol.registry import space_of
from kvcore.scenario.profile import Profile
from kvreal.http import models as b
from kvreal.http.dryrun import dry_run
from kvreal.http.events import EventLog
from kvreal.http.members import Members, fresh
from kvreal.http.status import REASON_HEADER, Reply, of_cancel, of_move, refusal
from kvreal.http.tokens import Packed
from kvreal.http.views import together
from kvreal.service import Service

MANY: Final = "."
"""Between the ids of events that are one to whoever asked: an instance's drain has one event a location."""
_EVENT: Final = re.compile(r"[0-9]{1,10}-[0-9]{1,10}")
NAMED: Final = 20
"""How many known events a 404 names."""
NS: Final = 1_000_000_000


Chunks = Tuple[Tuple[Key, ...], Tuple[int, ...]]
"""(keys, lens) of a prompt."""


def _keys_of(namespace: Namespace, tokens: Sequence[int], salt: str) -> Chunks:
    if isinstance(tokens, Packed):
        return packed_keys(namespace, tokens, "", salt)
    return chunk_keys(namespace, tokens, "", salt)


def _lookup(keys: Sequence[Key], lens: Sequence[int], machine: Controller) -> Sequence[Found]:
    return machine.registry.lookup(keys, lens)


AWAITED_HEADER: Final = "Kvmove-Awaited"
AWAITED_FRESH_S: Final = 0.05


class Settings(msgspec.Struct, frozen=True):
    profile: Profile = Profile()
    prefill_tokens_per_s: float = 8000.0
    """What recomputing is compared with: Llama-3.1-8B on one H100, roughly."""


class Face:
    def __init__(self, service: Service, log: EventLog, settings: Settings = Settings()) -> None:  # noqa: B008
        self.service: Service = service
        self.machine: Controller = service.machine  # type: ignore[assignment]
        self.log: EventLog = log
        self.settings: Settings = settings
        #: what each instance's keys are made from, also of those that have not been heard since a restart
        self.registers: Dict[str, Register] = {}
        #: each namespace that some instance has; None: to be gathered anew
        self.spaces: Optional[List[Namespace]] = None
        self.members: Members = Members(self.machine, service.node.now, self._nowhere)
        service.listeners.append(log.step)
        service.listeners.append(self._learn)
        service.onlookers.append(log.onlook)
        self.awaited: Tuple[float, List[str]] = (0.0, [])

    def _learn(self, now: int, item: m.Input, effects: List[m.Effect]) -> None:
        if isinstance(item, m.Boot):
            for record in item.journal:
                if isinstance(record, m.EpochIssued):
                    self.registers[record.register.instance] = record.register
        for effect in effects:
            if isinstance(effect, m.Journal) and isinstance(effect.record, m.EpochIssued):
                self.registers[effect.record.register.instance] = effect.record.register
            elif isinstance(effect, m.Note) and effect.kind == "believed":
                self.spaces = None

    def _namespace(self, instance: str, location: str) -> Optional[Namespace]:
        rank = self.machine.registry.ranks.get((instance, 0))
        register = rank.register if rank is not None else self.registers.get(instance)
        return space_of(register, location) if register is not None else None

    def _keys(self, instance: str, location: str, tokens: Sequence[int], salt: str) -> Optional[Chunks]:
        namespace = self._namespace(instance, location)
        return _keys_of(namespace, tokens, salt) if namespace is not None else None

    def _step(self, body: b.MoveBody) -> int:
        namespace = self._namespace(*body.old_position) if body.granularity == "prefix" else None
        return step_chunks(namespace) if namespace is not None else 0

    # ---- who is there
    def _nowhere(self, position: Position) -> Optional[Reply]:
        """Why there is no such place."""
        registry = self.machine.registry
        ranks, reason, detail = registry.place(position)
        if ranks is not None:
            return None
        return self._refused(reason, detail, position)

    def _refused(self, reason: str, detail: str, *positions: Position, event: int = 0) -> Reply:
        registry = self.machine.registry
        if reason == "unknown_instance":
            awaited = self.members.awaited()
            for instance, _ in positions:
                if instance in awaited and registry.instance(instance) is None:
                    return refusal("not_ready", f"{instance!r} has not been heard since this controller's restart")
            return refusal(reason, detail, event, registry.instances())
        if reason == "unknown_location":
            known: Dict[str, None] = {}
            for instance, _ in positions:
                for rank in registry.instance(instance) or []:
                    known.update(dict.fromkeys(f"{instance}/{name}" for name in rank.views))
            return refusal(reason, detail, event, list(known))
        return refusal(reason, detail, event)

    # ---- moves
    async def move(self, body: b.MoveBody, idem: str = "") -> Reply:
        if body.copy is not None and body.should_copy is not None and body.copy != body.should_copy:
            return refusal("bad_body", "copy and should_copy contradict one another", field="should_copy")
        if idem and body.idempotency_key and idem != body.idempotency_key:
            return refusal("bad_body", "the header names another idempotency key", field="idempotency_key")
        keys: Tuple[Key, ...] = ()
        lens: Tuple[int, ...] = ()
        if body.tokens:
            found = self._keys(*body.old_position, body.tokens, body.cache_salt)
            if found is None:
                return self._nowhere(body.old_position) or refusal("not_ready", "its registration is not complete")
            keys, lens = found
        if body.dry_run:
            settings = self.settings
            return dry_run(
                self.machine, body.old_position, body.new_position, keys, lens, body.if_room,
                settings.profile, settings.prefill_tokens_per_s,
            )  # fmt: skip
        request = MoveRequest(
            "", body.old_position, body.new_position, keys, lens,
            copy=bool(body.copy or body.should_copy), idem=body.idempotency_key or idem,
            deadline_ns=round((body.deadline_s or 0) * NS), evict=not body.if_room, terms=terms_of(body),
            step=self._step(body),
        )  # fmt: skip
        return self._moved(await self._begin(request), body.old_position, body.new_position)

    async def _begin(self, request: MoveRequest) -> Answer:
        """The first answer; the last one where the move has failed in the same breath. A request that was made before
        is answered as it was then, whatever has become of it since."""
        again = bool(request.idem) and request.idem in self.machine.moves.by_idem
        asked = self.service.begin(request)
        answer = await asked.first
        if not again and asked.end.done() and (end := asked.end.result()).state == "failed":
            return end
        return answer

    def _moved(self, answer: Answer, *positions: Position) -> Reply:
        if answer.state == "refused":
            return self._refused(answer.reason, answer.detail, *positions, event=answer.event)
        return of_move(answer)

    async def drain(self, body: b.DrainBody, idem: str = "") -> Reply:
        """One event a location; together they are one to whoever asked."""
        ranks = self.machine.registry.instance(body.instance_id)
        if ranks is None:
            return self._nowhere((body.instance_id, "")) or refusal("unknown_instance", body.instance_id)
        names = list(body.locations or ranks[0].views)
        for instance in (body.instance_id, *body.to):
            for name in names:
                nowhere = self._nowhere((instance, name))
                if nowhere is not None:
                    return nowhere
        if body.instance_id in body.to:
            return refusal("bad_body", f"{body.instance_id} cannot be drained to itself", field="to")
        key = body.idempotency_key or idem
        requests = [
            MoveRequest(
                "", (body.instance_id, name), (body.to[0], name),
                copy=body.copy, idem=f"{key}/{name}" if key else "", deadline_ns=round((body.deadline_s or 0) * NS),
                evict=not body.if_room, also=tuple((instance, name) for instance in body.to[1:]), terms=terms_of(body),
            )
            for name in names
        ]  # fmt: skip
        moves = self.machine.moves
        new = [request for request in requests if not request.idem or request.idem not in moves.by_idem]
        if new and len(moves.events) + len(new) > self.machine.spec.config.events_max:
            return refusal("busy", f"{len(moves.events)} events")  # all of its locations or none
        return self._drained([await self._begin(request) for request in requests], body.instance_id, names)

    def _drained(self, answers: List[Answer], instance: str, names: List[str]) -> Reply:
        """The answers of a drain's events, one a location, as one."""
        refused = next((answer for answer in answers if answer.state == "refused"), None)
        if refused is not None:
            return self._moved(refused, *[(instance, name) for name in names])
        tokens = sum(answer.num_tokens for answer in answers)
        ids = MANY.join(event_name(answer.event) for answer in answers)
        held = [answer for answer in answers if answer.reason != "nothing_held"]
        if not held:
            return Reply(200, b.MoveReply(0, ids), {REASON_HEADER: "nothing_held"})
        if all(answer.state == "failed" for answer in held):
            reply = refusal(held[0].reason, held[0].detail, held[0].event)
            return Reply(reply.status, msgspec.structs.replace(reply.body, event_id=ids), reply.headers)  # type: ignore[type-var]
        return Reply(200, b.MoveReply(tokens, ids))

    # ---- events
    def _numbers(self, name: str) -> List[int]:
        """Those of an id; none if it is no id."""
        parts = name.split(MANY)
        return [event_number(part) for part in parts] if all(_EVENT.fullmatch(part) for part in parts) else []

    def _unknown(self, name: str) -> Reply:
        known = [view.event_id for view in self.log.newest(NAMED)]
        return refusal("unknown_event", f"no event {name[:80]!r} is known, or it has been forgotten", known=known)

    def event(self, name: str, full: bool = True) -> Reply:
        views = [self.log.get(number, full) for number in self._numbers(name)]
        if not views or None in views:
            return self._unknown(name)
        return Reply(200, views[0] if len(views) == 1 else together(name, [view for view in views if view is not None]))

    def events(self, limit: int, state: str, kind: str) -> Reply:
        return Reply(200, b.EventsReply(self.log.newest(limit, state, kind)))

    async def wait(self, name: str, timeout_s: float) -> Reply:
        until = time.monotonic() + timeout_s
        numbers = self._numbers(name)
        for number in numbers:
            await self.log.ended(number, max(0.0, until - time.monotonic()))
        whole = self.log.whole(numbers[0]) if len(numbers) == 1 else None
        return self.event(name) if whole is None else Reply(200, msgspec.Raw(whole))

    async def cancel(self, name: str) -> Reply:
        numbers = self._numbers(name)
        if not numbers or any(number not in self.log.records for number in numbers):
            return self._unknown(name)
        if len(numbers) == 1 and self.log.records[numbers[0]].kind == "pin":
            return await self.unpin(b.EventBody(event_id=name))
        if len(numbers) == 1 and (record := self.log.records[numbers[0]]).kind == "clear":
            return of_cancel(Answer("", record.state, 0, numbers[0]))
        replies = [of_cancel(await self.service.ask(CancelRequest("", number))) for number in numbers]
        return max(replies, key=lambda reply: reply.status)

    async def check_finish(self, body: b.EventBody) -> Reply:
        reply = self.event(body.event_id, full=False)
        view = reply.body
        if not isinstance(view, b.EventView):
            return reply
        return Reply(200, b.CheckFinishReply(view.state, view.reason if isinstance(view.reason, str) else ""))

    # ---- lookups, pins, clears
    async def lookup(self, body: b.LookupBody) -> Reply:
        found: Dict[str, Dict[str, int]] = {}
        for namespace in self._spaces():
            keys, lens = _keys_of(namespace, body.tokens, body.cache_salt)
            if not keys:
                continue
            # It changes nothing, so it is no input.
            for item in await self.service.peek(partial(_lookup, keys, lens)):
                found.setdefault(item.instance, {})[item.location] = item.num_tokens
        best: Dict[str, List[Union[str, int]]] = {
            name: [at := max(places, key=lambda place: (places[place], place)), places[at]]
            for name, places in found.items()
        }
        awaited = self._awaited()
        headers = {AWAITED_HEADER: ",".join(awaited)} if awaited else {}
        return Reply(200, b.LookupReply(fresh("lookup"), best, found), headers)

    def _awaited(self) -> List[str]:
        """Instances that have not been heard since this controller's restart, as of some milliseconds ago: what they
        hold is not in an answer, and nobody should take them for empty."""
        now = time.monotonic()
        if now > self.awaited[0]:
            self.awaited = (now + AWAITED_FRESH_S, self.members.awaited())
        return self.awaited[1]

    def _spaces(self) -> List[Namespace]:
        """A thousand instances mostly have one. One that has gone costs a lookup that finds nothing."""
        if self.spaces is None:
            self.spaces = list(
                {space: None for rank in self.machine.registry.ranks.values() for space in rank.spaces()}
            )
        return self.spaces

    async def pin(self, body: b.PinBody, seconds: float = 0.0) -> Reply:
        position = (body.instance_id, body.location)
        nowhere = self._nowhere(position)
        if nowhere is not None:
            return nowhere
        found = self._keys(body.instance_id, body.location, body.tokens, body.cache_salt)
        if found is None:
            return refusal("not_ready", "its registration is not complete")
        answer = await self.service.ask(PinRequest("", position, *found, lease_ns=round(seconds * NS)))
        return self._pinned(answer, position, bool(seconds))

    def _pinned(self, answer: Answer, position: Position, lease: bool) -> Reply:
        name = event_name(answer.event)
        if answer.reason == "nothing_held":
            self._note("pin", answer, position, 0)
            empty: Any = b.LeaseReply(0, name, 0.0) if lease else b.MoveReply(0, name)
            return Reply(200, empty, {REASON_HEADER: "nothing_held"})
        if answer.state != "ok":
            return self._refused(answer.reason, answer.detail, position, event=answer.event)
        if lease:
            return Reply(200, b.LeaseReply(answer.num_tokens, name, self.log.expires_in_s(answer.event)))
        return Reply(200, b.MoveReply(answer.num_tokens, name))

    async def lease(self, body: Union[b.LeaseBody, b.RenewBody]) -> Reply:
        if isinstance(body, b.LeaseBody):
            return await self.pin(body, body.seconds)
        numbers = self._numbers(body.event_id)
        if len(numbers) != 1:
            return self._unknown(body.event_id)
        answer = await self.service.ask(PinRequest("", ("", ""), (), (), round(body.seconds * NS), numbers[0]))
        if answer.reason == "unknown_event":
            return self._no_pin(body.event_id)
        return self._pinned(answer, self._pinned_at(numbers[0]), True)

    async def unpin(self, body: b.EventBody) -> Reply:
        numbers = self._numbers(body.event_id)
        if len(numbers) != 1:
            return self._unknown(body.event_id)
        answer = await self.service.ask(UnpinRequest("", numbers[0]))
        if answer.reason == "unknown_event":
            return self._no_pin(body.event_id)
        return self._pinned(answer, self._pinned_at(numbers[0]), False)

    def _pinned_at(self, number: int) -> Position:
        """Where that pin is: an instance that is still to be heard after a restart is not unknown."""
        view = self.log.get(number)
        if view is None or isinstance(view.old_position, UnsetType):
            return "", ""
        return view.old_position[0], view.old_position[1]

    def _no_pin(self, name: str) -> Reply:
        """The machine holds no such pin: 409 if the event is known all the same, with what it is; else 404."""
        reply = self.event(name)
        view = reply.body
        if not isinstance(view, b.EventView):
            return reply
        reason = "already_done" if view.kind == "pin" else "no_pin"
        ended = f" ({view.reason})" if isinstance(view.reason, str) else ""
        detail = f"event {name} is a {view.kind}, {view.state}{ended}: it keeps nothing"
        error = b.ErrorReply(reason=reason, detail=detail, event_id=name, state=view.state)
        return Reply(409, error, {REASON_HEADER: reason})

    async def clear(self, body: b.ClearBody) -> Reply:
        position = (body.instance_id, body.location)
        nowhere = self._nowhere(position)
        if nowhere is not None:
            return nowhere
        view = self.machine.registry.ranks[(body.instance_id, 0)].views[body.location]
        tokens = sum(entry.num_tokens for entry in view.entries.values())
        answer = await self.service.ask(ClearRequest("", position))
        self._note("clear", answer, position, tokens)
        if answer.state != "ok":
            return self._refused(answer.reason, answer.detail, position, event=answer.event)
        return Reply(200, b.MoveReply(tokens, event_name(answer.event)))

    def _note(self, kind: str, answer: Answer, position: Position, tokens: int) -> None:
        """Of what is not journaled too the event's id, which is answered, is known afterwards."""
        if not answer.event:
            return
        good = answer.state == "ok"
        now = self.service.node.now()
        view = b.EventView(
            event_id=event_name(answer.event), kind=kind, state="done" if good else "failed",
            num_tokens=tokens if good else 0, reason=answer.reason or UNSET, detail=answer.detail or UNSET,
            old_position=list(position), ended=now / 1e9,
        )  # fmt: skip
        self.log.note(now, view)

    def ready(self) -> Reply:
        """Once the journal is replayed; whoever can ask is proof that it listens."""
        if not self.service.running or not self.machine.incarnation:
            return refusal("not_ready", "the controller is not ready")
        return Reply(200, b.ReadyReply("ready", self.machine.incarnation))

    async def status(self, number: int) -> Answer:
        return await self.service.ask(StatusRequest("", number))


def terms_of(body: Union[b.MoveBody, b.DrainBody]) -> Optional[Terms]:
    return terms(body.priority, body.weight, body.bandwidth_cap_bytes_per_s or 0)
