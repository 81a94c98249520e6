"""What the controller journals and answers, held against what has really happened: Known and Truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

from kvcore.protocol.controller import Controller
from kvcore.protocol.machine import Begin, Decide, Effect, Journal, Note, Outcome, Send
from kvcore.protocol.messages import Answer, MoveRequest, event_name
from kvcore.scenario.check_ghosts import Ghost

if TYPE_CHECKING:
    from kvcore.scenario.checks import Checker


def watch_controller(c: Checker, now: int, node: str, machine: Controller, effects: Sequence[Effect]) -> None:
    """One step of the controller, effect by effect in their order."""
    for effect in effects:
        kind = type(effect)
        if kind is Send:
            if type(effect.msg) is Answer:  # type: ignore[union-attr]
                _answered(c, now, node, effect.msg)  # type: ignore[union-attr]
        elif kind is Journal:
            record = effect.record  # type: ignore[union-attr]
            if type(record) is Begin:
                _begun(c, machine, record)
            elif type(record) is Decide:
                _decided(c, now, node, machine, record.event, record.n)
            elif type(record) is Outcome:
                _ended(c, now, node, record)
        elif kind is Note and effect.kind == "decided":  # type: ignore[union-attr]
            event = machine.moves.events.get(effect.event)  # type: ignore[union-attr]
            if event is not None:
                _decided(c, now, node, machine, event.number, event.n)


def _begun(c: Checker, machine: Controller, record: Begin) -> None:
    request = record.request
    if not isinstance(request, MoveRequest):
        return
    event = machine.moves.events.get(record.event)
    src = tuple(event.src) if event is not None else ()
    dst = tuple(event.dst) if event is not None else ()
    c.ghosts.begin(Ghost(record.event, request, src, dst))


def _decided(c: Checker, now: int, node: str, machine: Controller, number: int, n: int) -> None:
    """Known: at the decision, every destination has committed as many under the incarnation it is believed in."""
    ghost = c.ghosts.open.get(number)
    if ghost is None or ghost.decided >= 0:
        return
    ghost.decided = n
    ghost.decided_tokens = sum(ghost.lens[:n])
    name = event_name(number)
    event = machine.moves.events.get(number)
    incs = event.dst_incs if event is not None else []
    for r, address in enumerate(ghost.dst):
        believed = machine.registry.inc(address, ghost.dst_location)
        if r < len(incs) and incs[r] != believed:
            text = f"event {name} is decided for {address} in {incs[r]}, believed {believed}"
            c.say("Known", node, now, text, number)
        inc, committed, _ = ghost.commits.get(address, (None, 0, 0))
        if committed < n or inc != believed:
            text = f"event {name} is decided with {n} chunks, {address} in {believed} has committed "
            c.say("Known", node, now, text + (f"{committed} in {inc}" if committed else "none"), number)


def _ended(c: Checker, now: int, node: str, record: Outcome) -> None:
    number = record.event
    ghost = c.ghosts.open.get(number)
    if ghost is None:
        return
    before = ghost.state
    if before and before != record.state:
        c.say("Truth", node, now, f"event {event_name(number)} was {before} and is now {record.state}", number)
    if record.state == "done" and not ghost.drain:
        _done(c, now, node, ghost, record)
    elif record.state == "done" and ghost.replied >= 0 and record.num_tokens != ghost.replied:
        text = f"drain {event_name(number)} is done with {record.num_tokens} tokens, planned {ghost.replied}"
        c.say("Truth", node, now, text, number)
    elif record.state == "failed" and ghost.drops and not ghost.drain:
        text = f"event {event_name(number)} has failed, and has deleted {sum(ghost.drops.values())} chunks"
        c.say("Truth", node, now, text, number)
    ghost.state = record.state
    c.ghosts.end(number, record.state, record.num_tokens)
    c.ghosts.forget_if_spent(number)


def _done(c: Checker, now: int, node: str, ghost: Ghost, record: Outcome) -> None:
    name = event_name(ghost.number)
    tokens = sum(ghost.lens[: record.n])
    wrong = []
    if record.num_tokens != tokens:
        wrong.append(f"is done with {record.num_tokens} tokens, {record.n} chunks have {tokens}")
    if ghost.replied >= 0 and record.num_tokens != ghost.replied:
        wrong.append(f"is done with {record.num_tokens} tokens, replied {ghost.replied}")
    if record.reason == "same_place":
        if ghost.drops:
            wrong.append("moved to its own place, and has deleted")
    else:
        if ghost.decided < 0:
            wrong.append("is done and was never decided")
        for address in ghost.dst:
            _, n, visible = ghost.commits.get(address, (None, 0, 0))
            if min(n, visible) < record.n:
                wrong.append(f"is done with {record.n} chunks, {min(n, visible)} were visible at {address}")
    for item in record.source:
        dropped = ghost.drops.get(ghost.src[item.rank], 0) if item.rank < len(ghost.src) else 0
        if item.deleted >= 0 and item.deleted != dropped:
            wrong.append(f"says deleted {item.deleted} at rank {item.rank}, it was {dropped}")
    for line in wrong:
        c.say("Truth", node, now, f"event {name} {line}", ghost.number)


def _answered(c: Checker, now: int, node: str, m: Answer) -> None:
    """A client is told a number of tokens, or an end."""
    if not m.event or m.state == "refused" or m.state == "ok":
        return
    ghost = c.ghosts.open.get(m.event)
    name = event_name(m.event)
    if m.state in ("copying", "releasing"):
        if ghost is None:
            return
        if ghost.replied < 0:
            ghost.replied = m.num_tokens
        elif ghost.replied != m.num_tokens:
            text = f"event {name} was answered {ghost.replied} tokens, and now {m.num_tokens}"
            c.say("Truth", node, now, text, m.event)
        if m.state == "releasing" and ghost.decided < 0:
            c.say("Truth", node, now, f"event {name} is answered as releasing before its decision", m.event)
        return
    outcome = c.ghosts.outcome(m.event)
    if outcome is None:
        if ghost is not None and m.state in ("done", "failed"):
            c.say("Truth", node, now, f"event {name} is answered as {m.state} before that is journaled", m.event)
    elif m.state in ("done", "failed", "pinning", "reserving") and (m.state, m.num_tokens) != outcome[:2]:
        text = f"event {name} is answered as {m.state} with {m.num_tokens} tokens, it is {outcome[0]} with {outcome[1]}"
        c.say("Truth", node, now, text, m.event)
