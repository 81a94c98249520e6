"""How each row of the controller's tables is brought about: a world in the row's state, and what happens then."""

from __future__ import annotations

from typing import Callable, Dict, List, Tuple

import msgspec

from kvcore.protocol.config import MS, Rules, S, unusual
from kvcore.protocol.machine import Boot, Effect, Received, TimerFired
from kvcore.protocol.messages import (
    NO_ID,
    Alive,
    Beat,
    CancelRequest,
    Cleared,
    ClearRequest,
    Committed,
    Delta,
    Entry,
    Fetch,
    Held,
    LocationSeq,
    LookupRequest,
    MoveRequest,
    Pinned,
    PinRequest,
    Probe,
    Refused,
    Register,
    Registered,
    Release,
    Released,
    Reserved,
    Retain,
    Snap,
    StatusRequest,
    Suspect,
    UnpinRequest,
    Wire,
    event_id,
)
from kvcore.scenario.world import build_machine
from tests.core.drive import CPU, Story, keys, lens

Act = Callable[[], List[Effect]]
Case = Callable[[str], Tuple[Story, Act]]
FIRST = event_id(1, 1)


def hear(w: Story, src: str, m: Wire) -> List[Effect]:
    return w.give("ctl", Received(src, m))


def inc(w: Story, node: str) -> Tuple[int, int]:
    return w.worker(node).pools[CPU].inc


def boot(w: Story) -> List[Effect]:
    """The controller starts again from its journal."""
    w.crash("ctl")
    w.fresh.clear()
    w.machines["ctl"] = build_machine(w.specs["ctl"])
    return w.give("ctl", Boot(journal=tuple(w.journal)))


# ---- coordinator
def request(op: str = "m", text: str = "x", dst: str = "b", idem: str = "k", deadline_ns: int = 0) -> MoveRequest:
    return MoveRequest(op, ("a", CPU), (dst, CPU), keys(text), lens(text), idem=idem, deadline_ns=deadline_ns)


def event_in(
    state: str, ranks: int = 1, dst: str = "b", held: bool = True, deadline_ns: int = 0, age_ns: int = 0, **more: int
) -> Story:
    """A world whose only move, of one chunk from a to b, is in ``state``."""
    w = Story(Rules(), ranks=ranks, **more)
    w.elapse(age_ns)
    for rank in range(ranks) if held else ():
        w.store(f"a/{rank}", "x")
    w.mail()
    w.event = FIRST
    if state == "unknown":
        return w
    w.request(request(dst=dst, deadline_ns=deadline_ns))
    if state == "failed":
        w.request(CancelRequest("c", FIRST))
    if state in ("pinning", "failed"):
        return w
    w.until(Fetch)
    if state == "reserving":
        return w
    w.mail()
    if state == "copying":
        return w
    for at in list(w.copies):
        w.finish_copy(*at)
    if state == "done":
        w.settle()
    else:
        w.until(Release)
    return w


def simple(do: Callable[[Story], List[Effect]], ranks: int = 1, **more: int) -> Case:
    def case(state: str) -> Tuple[Story, Act]:
        w = event_in(state, ranks, **more)
        return w, lambda: do(w)

    return case


def hears(src: str, make: Callable[[Story], Wire], ranks: int = 1) -> Case:
    return simple(lambda w: hear(w, src, make(w)), ranks)


def committed(w: Story, node: str = "b/0", n: int = 1, incarnation: int = 1) -> Committed:
    return Committed(w.event, inc(w, node), n, w.now, incarnation)


def with_one_committed(do: Callable[[Story], List[Effect]], age_ns: int = 0) -> Case:
    """Two ranks, of which b/0 has committed; by a stamp of 0 where the world is older than a lease."""

    def case(state: str) -> Tuple[Story, Act]:
        w = event_in(state, 2, age_ns=age_ns)
        hear(w, "b/0", Committed(w.event, inc(w, "b/0"), 1, 0, 1))
        return w, lambda: do(w)

    return case


def confirming(do: Callable[[Story], List[Effect]]) -> Case:
    """Found decided by a controller that has started again."""

    def case(state: str) -> Tuple[Story, Act]:
        w = event_in(state)
        boot(w)
        w.fresh.clear()
        return w, lambda: do(w)

    return case


def last_pinned(held: bool = True, dst: str = "b") -> Case:
    def case(state: str) -> Tuple[Story, Act]:
        w = event_in(state, held=held, dst=dst)
        letter = w.until(Pinned)
        return w, lambda: w.say(letter)

    return case


def pinned(make: Callable[[Story], Wire]) -> Case:
    """In pinning, a second rank is missing still."""

    def case(state: str) -> Tuple[Story, Act]:
        w = event_in(state, 2 if state == "pinning" else 1)
        if state == "pinning":
            w.say(w.until(Pinned))
        return w, lambda: hear(w, "a/0", make(w))

    return case


def new_epoch(node: str) -> Case:
    def case(state: str) -> Tuple[Story, Act]:
        w = event_in(state)
        w.fresh.clear()
        w.boot(node)
        w.only(Register, Probe, Alive, Registered)
        return w, lambda: w.say(w.take(Beat))

    return case


def other_namespace(state: str) -> Tuple[Story, Act]:
    w = event_in(state)
    w.specs["b/0"] = msgspec.structs.replace(
        w.specs["b/0"],
        namespace=msgspec.structs.replace(w.specs["b/0"].namespace, dtype="float8"),
    )
    w.boot("b/0")
    w.mail()
    return w, lambda: w.request(request())


def given_up(state: str) -> Tuple[Story, Act]:
    w = event_in("releasing")
    w.elapse(12 * S, lose=(Release,))
    assert w.status(w.event).reason == "source_unreachable"
    return w, lambda: hear(w, "b/0", committed(w))


def give_up(w: Story) -> List[Effect]:
    limit = w.controller().moves.events[w.event].give_up_ns
    w.elapse(limit - w.now - 1, lose=(Release, Retain))
    return w.due("ctl", limit)


def at_deadline(state: str) -> Tuple[Story, Act]:
    w = event_in(state, deadline_ns=150 * MS)
    return w, lambda: w.due("ctl", 150 * MS)


def fires(kind: str, of: Callable[[Story], int]) -> Callable[[Story], List[Effect]]:
    return lambda w: w.give("ctl", TimerFired((kind, of(w), 0)))


def number(node: str) -> Callable[[Story], int]:
    return lambda w: w.controller().registry.by_address[node].number


def released(w: Story, node: str = "a/0") -> Wire:
    return Released(w.event, w.worker(node).source.pins[w.event].pid, 1)


retry = fires("retry", lambda w: w.event)
COORDINATOR: Dict[str, Case] = {
    "MoveRequest": simple(lambda w: w.request(request())),
    "MoveRequest: a place that is not there": simple(lambda w: w.request(request(dst="q"))),
    "MoveRequest: namespaces differ": other_namespace,
    "MoveRequest: the same idempotency key": simple(lambda w: w.request(request("again"))),
    "MoveRequest: its key for another move": simple(lambda w: w.request(request("again", "y"))),
    "Pinned": hears("a/0", lambda w: Pinned(w.event, inc(w, "a/0"), (7, 7), (0,))),
    "Pinned: others missing": simple(lambda w: w.say(w.until(Pinned)), 2),
    "Pinned: the last rank": last_pinned(),
    "Pinned: the last rank, a move to its own place": last_pinned(dst="a"),
    "Pinned: again": pinned(lambda w: w.ever(Pinned)[2]),
    "Pinned: another pid": pinned(lambda w: Pinned(w.event, inc(w, "a/0"), (7, 7), (0,))),
    "Pinned: the pin is gone": hears("a/0", lambda w: Pinned(w.event, NO_ID)),
    "Reserved": hears("b/0", lambda w: Reserved(w.event, inc(w, "b/0"), 1)),
    "Reserved: others missing": hears("b/0", lambda w: Reserved(w.event, inc(w, "b/0"), 1), 2),
    "Reserved: the last rank": hears("b/0", lambda w: Reserved(w.event, inc(w, "b/0"), 1)),
    "Reserved: under another incarnation": hears("b/0", lambda w: Reserved(w.event, (9, 9), 1)),
    "Reserved: done by giving up": given_up,
    "Committed": hears("b/0", committed),
    "Committed: others missing": hears("b/0", committed, 2),
    "Committed: the last rank": hears("b/0", committed),
    "Committed: the last rank, another's is old": with_one_committed(
        lambda w: hear(w, "b/1", committed(w, "b/1")), 20 * S
    ),
    "Committed: n = 0": hears("b/0", lambda w: committed(w, n=0)),
    "Committed: under another incarnation": hears("b/0", lambda w: Committed(w.event, (9, 9), 1, 0, 1)),
    "Committed: the last confirmation after a restart": confirming(
        lambda w: hear(w, "b/0", committed(w, incarnation=2))
    ),
    "Committed: n = 0, before the confirmation": confirming(lambda w: hear(w, "b/0", committed(w, "b/0", 0, 2))),
    "Committed: done by giving up": given_up,
    "Refused: of Pin": hears("a/0", lambda w: Refused(w.event, "Pin", "unknown_location")),
    "Refused: of Fetch": hears("b/0", lambda w: Refused(w.event, "Fetch", "full", inc(w, "b/0"))),
    "Refused: of Fetch, by a rank that has committed": with_one_committed(
        lambda w: hear(w, "b/0", Refused(w.event, "Fetch", "full", inc(w, "b/0")))
    ),
    "Released": hears("a/0", lambda w: Released(w.event, (7, 7), 1)),
    "Released: others missing": hears("a/0", released, 2),
    "Released: the last rank": hears("a/0", released),
    "Released: of another pid": hears("a/0", lambda w: Released(w.event, (7, 7), 1)),
    "retry timer": simple(retry),
    "retry timer: renew_ns have passed": simple(lambda w: w.due("ctl", 3 * S)),
    "retry timer: before the confirmation": confirming(retry),
    "retry timer: deadline": at_deadline,
    "retry timer: give up": simple(give_up),
    "retry timer: give up the confirmation": confirming(give_up),
    "forget timer": simple(lambda w: w.due("ctl", S), events_kept_ns=S),
    "CancelRequest": simple(lambda w: w.request(CancelRequest("again", w.event))),
    "StatusRequest": simple(lambda w: w.request(StatusRequest("again", w.event))),
    "StatusRequest: wait": simple(lambda w: w.request(StatusRequest("again", w.event, wait=True))),
    "Beat: of a participant's new epoch": new_epoch("b/0"),
    "Beat: of a source's new epoch": new_epoch("a/0"),
    "Beat: of a destination's new epoch": new_epoch("b/0"),
    "Beat: of a former participant's new epoch": new_epoch("b/0"),
    "dead timer: of a participant": simple(fires("dead", number("b/0"))),
    "dead timer: of a source": simple(fires("dead", number("a/0"))),
    "dead timer: of a destination": simple(fires("dead", number("b/0"))),
    "Boot: from the journal": simple(boot),
}


def _cleared(node: str) -> Case:
    return hears(node, lambda w: Cleared(0, CPU, (inc(w, node)[0], 1)))


def _by_state(**cases: Case) -> Case:
    """The same case, brought about differently in some state."""
    return lambda state: cases.get(state, cases["other"])(state)


nothing_held = hears("a/0", lambda w: Pinned(w.event, inc(w, "a/0")))
lapsed = hears("b/0", lambda w: committed(w, n=0))
COORDINATOR["Pinned: nothing held"] = _by_state(pinning=last_pinned(held=False), other=nothing_held)
COORDINATOR["Committed: n = 0, its retention has lapsed"] = _by_state(
    copying=with_one_committed(lambda w: hear(w, "b/0", committed(w, n=0))), other=lapsed
)
COORDINATOR["retry timer"] = _by_state(copying=with_one_committed(retry), other=simple(retry))
COORDINATOR["Cleared: of a participant's location"] = _cleared("b/0")
COORDINATOR["Cleared: of a former participant's location"] = _cleared("b/0")
COORDINATOR["Cleared: of the destination"] = _cleared("b/0")
COORDINATOR["Cleared: of the source"] = _cleared("a/0")


# ---- registry
CLAIM = 60


def register(
    w: Story, nonce: int = CLAIM, rank: int = 0, version: int = 1, dtype: str = "bfloat16", **constants: int
) -> Register:
    spec = w.specs["b/0"]
    namespace = msgspec.structs.replace(spec.namespace, dtype=dtype)
    said = {**dict(unusual(spec.config)), **constants}
    return Register("b", rank, nonce, namespace, spec.locations, version=version, constants=tuple(said.items()))


def place_in(state: str, ranks: int = 1) -> Story:
    """A world whose controller has the place (b, 0) in ``state``; b holds x."""
    w = Story(Rules(), ranks=ranks)
    w.who = ("b", 0)
    w.store("b/0", "x")
    w.mail()
    if state in ("unknown", "issued"):
        w.give("ctl", TimerFired(("dead", number("b/0")(w), 0)))
    if state in ("issued", "probing", "succeeding"):
        hear(w, "b/0", register(w))
    if state == "succeeding":
        w.give("ctl", TimerFired(("probe", number("b/0")(w), 0)))
    w.fresh.clear()
    return w


def place(do: Callable[[Story], List[Effect]], ranks: int = 1) -> Case:
    def case(state: str) -> Tuple[Story, Act]:
        w = place_in(state, ranks)
        return w, lambda: do(w)

    return case


def place_hears(make: Callable[[Story], Wire], src: str = "b/0") -> Case:
    return place(lambda w: hear(w, src, make(w)))


def known(w: Story) -> int:
    """The epoch believed at (b, 0), or the one of its process."""
    rank = w.controller().registry.ranks.get(("b", 0))
    return rank.epoch if rank is not None else w.worker("b/0").epoch


def issued(w: Story) -> int:
    return max((epoch for _, epoch in w.controller().registry.issued), default=0)


def beat(epoch: int, seq: int) -> Beat:
    return Beat(epoch, (LocationSeq(CPU, (epoch, 0), seq),))


def beats(state: str) -> Tuple[Story, Act]:
    w = place_in(state)
    epoch, seq = {"issued": (issued(w), 0), "unknown": (77, 0)}.get(state, (known(w), 1))
    return w, lambda: hear(w, "b/0", beat(epoch, seq))


def unlike_its_mate(state: str) -> Tuple[Story, Act]:
    w = place_in(state, 2)
    return w, lambda: hear(w, "b/0", register(w, dtype="float8"))


def overtaken_by_its_mate(state: str) -> Tuple[Story, Act]:
    """Both ranks are gone; (b, 0) registers with another namespace than (b, 1), which is believed first."""
    w = place_in("unknown", 2)
    w.give("ctl", TimerFired(("dead", number("b/1")(w), 0)))
    hear(w, "b/0", register(w, dtype="float8"))
    epoch = issued(w)
    hear(w, "b/1", register(w, rank=1))
    hear(w, "b/1", beat(epoch + 1, 0))
    return w, lambda: hear(w, "b/0", beat(epoch, 0))


def restored(state: str) -> Tuple[Story, Act]:
    w = place_in("believed")
    boot(w)
    return w, lambda: w.give("ctl", TimerFired(("restored", 0, 0)))


def delta(seq: int, epoch: int = 0) -> Callable[[Story], Wire]:
    return lambda w: Delta(CPU, (epoch or known(w), 0), seq, (Entry(b"y", b"", 1),))


def again(state: str) -> Tuple[Story, Act]:
    """The Register that the known or the issued process has sent before."""
    w = place_in(state)
    nonce = w.worker("b/0").nonce if state == "believed" else CLAIM
    return w, lambda: hear(w, "b/0", register(w, nonce))


REGISTRY: Dict[str, Case] = {
    "Register": place_hears(register),
    "Register: of another version": place_hears(lambda w: register(w, version=2)),
    "Register: its beats do not fit into dead": place_hears(lambda w: register(w, beat_ns=10**18)),
    "Register: other constants": place_hears(lambda w: register(w, lease_ns=12_345_678_901)),
    "Register: another rank has another namespace": unlike_its_mate,
    "Register: again": again,
    "Register: of another process": place_hears(lambda w: register(w, CLAIM + 1)),
    "Register: of the claimant": place_hears(register),
    "Register: of a third process": place_hears(lambda w: register(w, CLAIM + 1), "elsewhere"),
    "Register: of the successor": place_hears(register),
    "Alive": place_hears(lambda w: Alive(CLAIM, known(w), 1)),
    "Alive: by the known process": place_hears(lambda w: Alive(CLAIM, known(w), 1)),
    "Alive: by the claimant, at the known address": place_hears(lambda w: Alive(CLAIM, 0, CLAIM)),
    "Alive: of another probe": place_hears(lambda w: Alive(CLAIM + 1, known(w), 1)),
    "probe timer": place(lambda w: w.give("ctl", TimerFired(("probe", number("b/0")(w), 0)))),
    "Beat": beats,
    "Beat: another rank, believed meanwhile, has another namespace": overtaken_by_its_mate,
    "Beat: of the successor": place_hears(lambda w: beat(issued(w), 0)),
    "Beat: of the known process": place_hears(lambda w: beat(known(w), 1)),
    "Beat: seq is not the view's": place_hears(lambda w: beat(known(w), 5)),
    "Beat: under another epoch": place_hears(lambda w: beat(77, 1)),
    "Delta": place_hears(delta(2)),
    "Delta: the next": place_hears(delta(2)),
    "Delta: again": place_hears(delta(1)),
    "Delta: after a gap": place_hears(delta(5)),
    "Delta: under another epoch": place_hears(delta(2, 77)),
    "Snap": place_hears(lambda w: Snap(CPU, (known(w), 0), 2, ())),
    "Snap: older than the view": place_hears(lambda w: Snap(CPU, (known(w), 0), 0, ())),
    "Suspect": place_hears(lambda w: Suspect("b/0", known(w)), "a/0"),
    "Suspect: of the issued epoch": place_hears(lambda w: Suspect("b/0", issued(w)), "a/0"),
    "Suspect: of the believed epoch": place_hears(lambda w: Suspect("b/0", known(w)), "a/0"),
    "Suspect: of an epoch before": place_hears(lambda w: Suspect("b/0", 77), "a/0"),
    "dead timer": place(lambda w: w.give("ctl", TimerFired(("dead", number("b/0")(w), 0)))),
    "restored timer: of an epoch from the journal": restored,
    "LookupRequest": place(lambda w: w.request(LookupRequest("l", keys("x"), lens("x")))),
}


# ---- fanout
def pin_request(op: str = "p", at: str = "b") -> PinRequest:
    return PinRequest(op, (at, CPU), keys("x"), lens("x"))


def clear_request(op: str = "p", at: str = "b") -> ClearRequest:
    return ClearRequest(op, (at, CPU))


def fan(do: Callable[[Story], List[Effect]], first: Wire = pin_request(), ranks: int = 1, **more: int) -> Case:  # noqa: B008
    """A world in which ``first`` has been asked, if the state is asking; b holds x."""

    def case(state: str) -> Tuple[Story, Act]:
        w = Story(Rules(), ranks=ranks, **more)
        w.event = FIRST
        for rank in range(ranks):
            w.store(f"b/{rank}", "x")
        w.mail()
        if state == "asking":
            w.request(first)
        return w, lambda: do(w)

    return case


def unpin(state: str) -> Tuple[Story, Act]:
    w, _ = fan(lambda w: [])("asking")
    w.mail()
    return w, lambda: w.request(UnpinRequest("u", w.event))


def live_pin(act: Callable[[Story], List[Effect]]) -> Case:
    """A pin that lives; if the state is asking, its lease is being begun again."""

    def case(state: str) -> Tuple[Story, Act]:
        w, _ = fan(lambda w: [])("asking")
        w.mail()
        if state == "asking":
            w.request(PinRequest("r", ("b", CPU), (), (), event=w.event))
        return w, lambda: act(w)

    return case


def rank_restarts(first: Wire) -> Case:
    def do(w: Story) -> List[Effect]:
        w.fresh.clear()
        w.boot("b/0")
        w.only(Register, Probe, Alive, Registered)
        return w.say(w.take(Beat))

    return fan(do, first)


def cleared(w: Story) -> List[Effect]:
    return hear(w, "b/0", Cleared(w.event, CPU, (inc(w, "b/0")[0], 1)))


FANOUT: Dict[str, Case] = {
    "PinRequest": fan(lambda w: w.request(pin_request("q"))),
    "ClearRequest": fan(lambda w: w.request(clear_request("q"))),
    "PinRequest: a place that is not there": fan(lambda w: w.request(pin_request(at="q"))),
    "ClearRequest: a place that is not there": fan(lambda w: w.request(clear_request(at="q"))),
    "UnpinRequest: of a live pin": unpin,
    "UnpinRequest: of no pin": fan(lambda w: w.request(UnpinRequest("u", w.event))),
    "UnpinRequest: of a pin that is not yet": fan(lambda w: w.request(UnpinRequest("u", w.event))),
    "Held": fan(lambda w: hear(w, "b/0", Held(w.event, 1))),
    "Held: others missing": fan(lambda w: hear(w, "b/0", Held(w.event, 1)), ranks=2),
    "Held: the last rank": fan(lambda w: hear(w, "b/0", Held(w.event, 1))),
    "Held: n = 0, to a pin": fan(lambda w: hear(w, "b/0", Held(w.event, 0))),
    "Cleared": fan(cleared),
    "Cleared: others missing": fan(cleared, clear_request(), ranks=2),
    "Cleared: the last rank": fan(cleared, clear_request()),
    "fanout timer": fan(lambda w: w.give("ctl", TimerFired(("fanout", w.event, 0)))),
    "fanout timer: deadline": fan(lambda w: w.due("ctl", 100 * MS), deadline_ns=100 * MS),
    "PinRequest: of a live pin": live_pin(lambda w: w.request(PinRequest("q", ("b", CPU), (), (), event=w.event))),
    "PinRequest: of no pin": fan(lambda w: w.request(PinRequest("q", ("b", CPU), (), (), event=w.event))),
    "hold timer": live_pin(lambda w: w.give("ctl", TimerFired(("hold", w.event, 0)))),
    "Beat: of a rank's new epoch": rank_restarts(pin_request()),
    "Beat: of a rank's new epoch, to a pin": rank_restarts(pin_request()),
    "Beat: of a rank's new epoch, to a clear": rank_restarts(clear_request()),
}


# ---- drain
def draining(do: Callable[[Story], List[Effect]], chains: Tuple[str, ...] = ("xy",)) -> Case:
    def case(state: str) -> Tuple[Story, Act]:
        w = Story(Rules())
        w.event = FIRST
        for chain in chains:
            w.store("a/0", chain)
        w.mail()
        if state == "draining":
            w.request(drain())
        return w, lambda: do(w)

    return case


def drain(op: str = "d") -> MoveRequest:
    return MoveRequest(op, ("a", CPU), ("b", CPU))


DRAIN: Dict[str, Case] = {
    "MoveRequest: no keys": draining(lambda w: w.request(drain("e"))),
    "MoveRequest: no keys, nothing is held": draining(lambda w: w.request(drain("e")), ()),
    "Released": draining(lambda w: hear(w, "a/0", Released(w.event, (7, 7)))),
    "Refused": draining(lambda w: hear(w, "b/0", Refused(w.event, "Fetch", "full"))),
    "Released: of a chain, others to come": draining(lambda w: w.say(w.until(Released)), ("xy", "xz")),
    "Released: of the last chain": draining(lambda w: w.say(w.until(Released))),
    "CancelRequest": draining(lambda w: w.request(CancelRequest("c", w.event))),
    "StatusRequest": draining(lambda w: w.request(StatusRequest("c", w.event))),
    "StatusRequest: wait": draining(lambda w: w.request(StatusRequest("c", w.event, wait=True))),
}


def _refused(w: Story) -> List[Effect]:
    w.until(Fetch)
    return hear(w, "b/0", Refused(FIRST + 1, "Fetch", "full", inc(w, "b/0")))


DRAIN["Refused: of the last chain"] = draining(_refused)
CASES: Dict[str, Dict[str, Case]] = {
    "coordinator": COORDINATOR,
    "registry": REGISTRY,
    "fanout": FANOUT,
    "drain": DRAIN,
}
