"""How each row of a worker's tables is brought about: a world in the row's state, and what happens then."""

from __future__ import annotations

from typing import Callable, Dict, List, Tuple

import msgspec

from kvcore.protocol.config import Rules, S
from kvcore.protocol.machine import (
    Boot,
    Command,
    CopyDone,
    CopyMoved,
    CopyStopped,
    Effect,
    FillDone,
    Input,
    ReadDone,
    Received,
    TimerFired,
    WindowClosed,
)
from kvcore.protocol.messages import (
    Clear,
    End,
    Expelled,
    Fence,
    Fenced,
    Fetch,
    Hold,
    Moved,
    PeerGone,
    Pid,
    Pin,
    Probe,
    Push,
    Pushed,
    Registered,
    RegisterRefused,
    Release,
    Renew,
    Resync,
    Retain,
    Stop,
    Stopped,
    StoreRequest,
    Unhold,
    UseRequest,
    Wire,
    event_id,
)
from kvcore.scenario.world import build_machine
from tests.core.drive import CPU, Story, keys, lens

Act = Callable[[], List[Effect]]
Case = Callable[[str], Tuple[Story, Act]]
Make = Callable[[Story], Wire]
E = event_id(1, 9)
OTHER = (8, 8)


def hear(w: Story, m: Wire) -> List[Effect]:
    """The node of the story hears something; from the controller, or from whom it would come."""
    src = "a/0" if isinstance(m, (Fenced, Pushed, Stopped)) else "b/0" if isinstance(m, (Push, Stop, Fence)) else "ctl"
    return w.give(w.node, Received("client" if isinstance(m, (StoreRequest, UseRequest)) else src, m))


def inc(w: Story) -> Tuple[int, int]:
    return w.worker(w.node).pools[CPU].inc


def clear(w: Story) -> Clear:
    return Clear(1, 5, CPU, inc(w))


def expelled(w: Story) -> Expelled:
    return Expelled(1, w.worker(w.node).epoch)


# ---- birth
def born(state: str) -> Story:
    w = Story(Rules())
    w.node = "b/0"
    if state in ("new", "refused"):
        w.crash("b/0")
        w.machines["b/0"] = build_machine(w.specs["b/0"])
        w.give("b/0", Boot(nonce=7))
    if state == "refused":
        hear(w, RegisterRefused(1, 7, "duplicate_id", "one", "two"))
    if state == "expelled":
        hear(w, expelled(w))
    return w


def birth(do: Callable[[Story], List[Effect]]) -> Case:
    def case(state: str) -> Tuple[Story, Act]:
        w = born(state)
        return w, lambda: do(w)

    return case


def birth_hears(make: Make) -> Case:
    return birth(lambda w: hear(w, make(w)))


def first_boot(state: str) -> Tuple[Story, Act]:
    w = born("registered")
    w.machines["b/0"] = build_machine(w.specs["b/0"])
    return w, lambda: w.give("b/0", Boot(nonce=7))


def mismatched(state: str) -> Tuple[Story, Act]:
    w = born("new")
    hear(w, RegisterRefused(1, 7, "mismatch", "one", "two"))
    return w, lambda: w.due(w.node, w.specs["b/0"].config.retry_ns)


def succeeded(w: Story) -> List[Effect]:
    hear(w, Probe(5, 0))
    return hear(w, clear(w))


def clear_again(w: Story) -> List[Effect]:
    first = clear(w)
    hear(w, first)
    return hear(w, first)


def nonce(w: Story) -> int:
    return w.worker(w.node).nonce


BIRTH: Dict[str, Case] = {
    "Boot": first_boot,
    "register timer": birth(lambda w: w.give(w.node, TimerFired(("register", 0, 0)))),
    "Registered": birth_hears(lambda w: Registered(1, nonce(w), event_id(1, 70))),
    "Registered: of a higher epoch": birth_hears(lambda w: Registered(1, nonce(w), event_id(1, 70))),
    "Registered: again": birth_hears(lambda w: Registered(1, nonce(w), w.worker(w.node).last_epoch)),
    "Registered: of another process": birth_hears(lambda w: Registered(1, 99, event_id(1, 70))),
    "RegisterRefused": birth_hears(lambda w: RegisterRefused(1, nonce(w), "duplicate_id", "one", "two")),
    "RegisterRefused: mismatch": birth_hears(lambda w: RegisterRefused(1, nonce(w), "mismatch", "one", "two")),
    "register timer: after a mismatch": mismatched,
    "RegisterRefused: of another process": birth_hears(lambda w: RegisterRefused(1, 99, "duplicate_id", "one", "two")),
    "Probe": birth_hears(lambda w: Probe(1, 5)),
    "Expelled": birth_hears(expelled),
    "Expelled: of an epoch before": birth_hears(lambda w: Expelled(1, 1)),
    "beat timer": birth(lambda w: w.give(w.node, TimerFired(("beat", 0, 0)))),
    "Resync": birth_hears(lambda w: Resync(1, CPU)),
    "Clear": birth_hears(clear),
    "Clear: again": birth(clear_again),
    "Clear: of a lower incarnation": birth(succeeded),
    "PeerGone": birth_hears(lambda w: PeerGone(1, "a/0", 1)),
    "Command: full": birth(lambda w: w.give(w.node, Command("full", (CPU, "on")))),
    "Command: unmount": birth(lambda w: w.give(w.node, Command("unmount", (CPU, "on")))),
}


# ---- source and writer: a/0, which holds the chain xy
def pin(text: str = "xy", location: str = CPU) -> Pin:
    return Pin(1, E, location, keys(text), True, 10 * S)


def source(make: Make, text: str = "xy", before: Tuple[Make, ...] = ()) -> Case:
    """``before``: what a/0 hears before it pins."""

    def case(state: str) -> Tuple[Story, Act]:
        w = Story(Rules())
        w.node = "a/0"
        w.event = E
        w.store("a/0", "xy")
        for one in before:
            hear(w, one(w))
        if state == "held":
            hear(w, pin(text))
        return w, lambda: hear(w, make(w))

    return case


def pid(w: Story) -> Pid:
    held = w.worker("a/0").source.pins.get(E)
    return held.pid if held is not None else OTHER


def release(delete: bool) -> Make:
    return lambda w: Release(1, E, pid(w), 2, delete)


def lease(state: str) -> Tuple[Story, Act]:
    w, _ = source(clear)(state)
    return w, lambda: w.give("a/0", TimerFired(("lease", E, 0)))


SOURCE: Dict[str, Case] = {
    "Pin": source(lambda w: pin()),
    "Pin: nothing held": source(lambda w: pin("q")),
    "Pin: a location that is not here": source(lambda w: pin(location="disk")),
    "Renew": source(lambda w: Renew(1, E, pid(w))),
    "Renew: of another pid": source(lambda w: Renew(1, E, OTHER)),
    "Release": source(release(True)),
    "Release: of another pid": source(lambda w: Release(1, E, OTHER, 2, True)),
    "Release: keep": source(release(False)),
    "Release: delete": source(release(True)),
    "Release: delete, a child is here": source(lambda w: Release(1, E, pid(w), 1, True), "x"),
    "Release: delete, a user's pin is on it": source(release(True), before=(lambda w: Hold(1, 5, CPU, keys("xy"), S),)),
    "Release: delete, another event retains it": source(release(True), before=(lambda w: fetch(w, "xy", 5),)),
    "Fence": source(lambda w: Fence(pid(w), OTHER)),
    "lease timer": lease,
    "Clear": source(clear),
    "Expelled": source(expelled),
}


def writer(
    given: Callable[[Story], Input], stopped: bool = False, pinned: bool = True, overtaken: bool = False
) -> Case:
    """``overtaken``: another push, which is to be written after this one, was there first."""

    def case(state: str) -> Tuple[Story, Act]:
        w, _ = source(clear)("held" if pinned else "none")
        w.rid = (9, 5)
        if stopped:
            hear(w, Stop(w.rid))
        if overtaken:
            hear(w, msgspec.structs.replace(push(w), rid=(9, 6), after=w.rid))
        if state == "writing":
            hear(w, push(w))
        return w, lambda: w.give("a/0", given(w))

    return case


def push(w: Story) -> Push:
    return Push(w.rid, pid(w), CPU, (0,), CPU, (0,), (1,), 9)


def heard(make: Make, src: str = "b/0") -> Callable[[Story], Input]:
    return lambda w: Received(src, make(w))


WRITER: Dict[str, Case] = {
    "Push": writer(heard(push)),
    "Push: not above the mark": writer(heard(push), stopped=True),
    "Push: below the mark, and awaited": writer(heard(push), overtaken=True),
    "Push: its pin is gone": writer(heard(push), pinned=False),
    "Push: again": writer(heard(push)),
    "Stop": writer(heard(lambda w: Stop(w.rid))),
    "CopyDone": writer(lambda w: CopyDone(w.rid, True)),
    "CopyMoved": writer(lambda w: CopyMoved(w.rid, 1)),
    "CopyDone: failed": writer(lambda w: CopyDone(w.rid, False)),
    "CopyStopped": writer(lambda w: CopyStopped(w.rid)),
    "Expelled": writer(heard(expelled, "ctl")),
}


# ---- destination and quarantine: b/0, which takes x from a/0
def fetch(
    w: Story, text: str = "x", event: int = E, by_push: bool = False, epoch: int = 0, step: int = 0
) -> Fetch:
    here = (epoch, 0) if epoch else inc(w)
    src_epoch = w.worker("a/0").epoch
    slots = tuple(range(3, 3 + len(text)))
    return Fetch(
        1, event, CPU, here, keys(text), lens(text), "a/0", src_epoch, CPU, (src_epoch, 1), slots, 30 * S, 0, by_push,
        step=step,
    )  # fmt: skip


def in_steps(given: Callable[[Story], Input], by_push: bool = False, copied: bool = False, nth: int = 0) -> Case:
    """Four chunks in four steps. ``nth``: the step that it is about; ``copied``: its bytes are there."""

    def case(state: str) -> Tuple[Story, Act]:
        w = reserved("none")
        hear(w, fetch(w, "wxyz", by_push=by_push, step=1))
        parts = w.worker("b/0").destination.reservations[E].parts
        w.rid = parts[nth].rid
        if copied:
            w.give("b/0", CopyDone(w.rid, True))
        return w, lambda: w.give("b/0", given(w))

    return case


def reserved(state: str, by_push: bool = False, held: bool = False) -> Story:
    w = Story(Rules())
    w.node = "b/0"
    w.event = E
    if held:
        w.store("b/0", "x")
    if state != "none":
        hear(w, fetch(w, by_push=by_push))
        w.rid = w.worker("b/0").destination.reservations[E].rid
    if state in ("fencing", "retained"):
        w.give("b/0", CopyDone(w.rid, True))
    if state == "retained":
        hear(w, Fenced(w.rid, True))
    return w


def destination(given: Callable[[Story], Input], by_push: bool = False, held: bool = False, full: bool = False) -> Case:
    def case(state: str) -> Tuple[Story, Act]:
        w = reserved(state, by_push, held)
        if full:
            w.give("b/0", Command("full", (CPU, "on")))
        return w, lambda: w.give("b/0", given(w))

    return case


def told(make: Make, by_push: bool = False, held: bool = False, full: bool = False, src: str = "ctl") -> Case:
    return destination(heard(make, src), by_push, held, full)


DESTINATION: Dict[str, Case] = {
    "Fetch": told(fetch),
    "Fetch: another incarnation than mine": told(lambda w: fetch(w, epoch=77)),
    "Fetch: by push": told(lambda w: fetch(w, by_push=True), by_push=True),
    "Fetch: in steps": told(lambda w: fetch(w, "wxyz", step=1)),
    "CopyDone: of a step": in_steps(lambda w: CopyDone(w.rid, True)),
    "CopyDone: of a step, failed": in_steps(lambda w: CopyDone(w.rid, False)),
    "Fenced: alive, of a step": in_steps(heard(lambda w: Fenced(w.rid, True), "a/0"), copied=True),
    "Fenced: alive, of a step that has others before it": in_steps(
        heard(lambda w: Fenced(w.rid, True), "a/0"), copied=True, nth=1
    ),
    "Pushed: good, of a step": in_steps(heard(lambda w: Pushed(w.rid, True), "a/0"), by_push=True),
    "End: in steps": in_steps(heard(lambda w: End(1, E), "ctl")),
    "Fetch: all is here": told(fetch, held=True),
    "Fetch: no slot for the first": told(fetch, full=True),
    "Retain": told(lambda w: Retain(1, E, CPU, 0)),
    "CopyDone": destination(lambda w: CopyDone(w.rid if w.worker("b/0").destination.reservations else OTHER, True)),
    "CopyMoved": destination(lambda w: CopyMoved(w.rid, 1)),
    "Moved": told(lambda w: Moved(w.rid, 1), src="a/0"),
    "CopyDone: failed": destination(lambda w: CopyDone(w.rid, False)),
    "CopyDone: of another reservation": destination(lambda w: CopyDone(OTHER, True)),
    "CopyStopped": destination(lambda w: CopyStopped(OTHER)),
    "CopyStopped: of another reservation": destination(lambda w: CopyStopped(OTHER)),
    "Pushed": told(lambda w: Pushed(OTHER, True), src="a/0"),
    "Pushed: good": told(lambda w: Pushed(w.rid, True), by_push=True, src="a/0"),
    "Pushed: failed": told(lambda w: Pushed(w.rid, False), by_push=True, src="a/0"),
    "Pushed: of another reservation": told(lambda w: Pushed(OTHER, True), by_push=True, src="a/0"),
    "Stopped": told(lambda w: Stopped(OTHER), src="a/0"),
    "Stopped: of another reservation": told(lambda w: Stopped(OTHER), src="a/0"),
    "Fenced": told(lambda w: Fenced(w.rid, True), src="a/0"),
    "Fenced: alive": told(lambda w: Fenced(w.rid, True), src="a/0"),
    "Fenced: not alive": told(lambda w: Fenced(w.rid, False), src="a/0"),
    "End": told(lambda w: End(1, E)),
    "End: by push": told(lambda w: End(1, E), by_push=True),
    "reservation timer": destination(lambda w: TimerFired(("reservation", E, 0))),
    "retention timer": destination(lambda w: TimerFired(("retention", E, 0))),
    "Clear": told(clear),
    "Expelled": told(expelled),
    "WindowClosed": destination(lambda w: WindowClosed("a/0", 1)),
}


def _fencing_hears_of_another(state: str) -> Tuple[Story, Act]:
    w = reserved(state)
    return w, lambda: w.give("b/0", CopyDone(OTHER, True))


DESTINATION["CopyDone"] = lambda state: (
    destination(lambda w: CopyDone(w.rid, True))(state) if state == "copying" else _fencing_hears_of_another(state)
)


def quarantine(given: Callable[[Story], Input], by_push: bool = False) -> Case:
    def case(state: str) -> Tuple[Story, Act]:
        w = reserved("copying", by_push)
        if state == "waiting":
            hear(w, End(1, E))
        else:
            w.rid = OTHER
        return w, lambda: w.give("b/0", given(w))

    return case


QUARANTINE: Dict[str, Case] = {
    "CopyDone": quarantine(lambda w: CopyDone(w.rid, True)),
    "CopyStopped": quarantine(lambda w: CopyStopped(w.rid)),
    "Pushed": quarantine(heard(lambda w: Pushed(w.rid, True), "a/0"), by_push=True),
    "Stopped": quarantine(heard(lambda w: Stopped(w.rid), "a/0"), by_push=True),
    "WindowClosed": quarantine(lambda w: WindowClosed("a/0", w.worker("a/0").epoch), by_push=True),
    "quarantine timer": quarantine(lambda w: TimerFired(("quarantine", *w.rid)), by_push=True),
}


# ---- engine and hold: b/0
def engine(
    given: Callable[[Story], Input], before: Tuple[Wire, ...] = (), stored: str = "", full: bool = False
) -> Case:
    def case(state: str) -> Tuple[Story, Act]:
        w = Story(Rules())
        w.node = "b/0"
        w.event = E
        if stored:
            w.store("b/0", stored)
        if full:
            w.give("b/0", Command("full", (CPU, "on")))
        for m in before:
            hear(w, m)
        return w, lambda: w.give("b/0", given(w))

    return case


STORE = StoreRequest("s", CPU, keys("x"), lens("x"))
USE = UseRequest("u", CPU, keys("x"), lens("x"))
ENGINE: Dict[str, Case] = {
    "StoreRequest": engine(heard(lambda w: STORE, "client")),
    "StoreRequest: all is here": engine(heard(lambda w: STORE, "client"), stored="x"),
    "StoreRequest: no slot for the first": engine(heard(lambda w: STORE, "client"), full=True),
    "FillDone": engine(lambda w: FillDone(1, True), (STORE,)),
    "FillDone: cleared meanwhile, or failed": engine(lambda w: FillDone(1, False), (STORE,)),
    "UseRequest": engine(heard(lambda w: USE, "client"), stored="x"),
    "UseRequest: nothing held": engine(heard(lambda w: USE, "client")),
    "ReadDone": engine(lambda w: ReadDone(2, True), (USE,), stored="x"),
}


def user_pin(given: Callable[[Story], Input]) -> Case:
    def case(state: str) -> Tuple[Story, Act]:
        return engine(given, (hold(),) if state == "held" else (), stored="x")(state)

    return case


def hold(text: str = "x") -> Hold:
    return Hold(1, E, CPU, keys(text), S)


HOLD: Dict[str, Case] = {
    "Hold": user_pin(heard(lambda w: hold(), "ctl")),
    "Hold: nothing held": user_pin(heard(lambda w: hold("q"), "ctl")),
    "Unhold": user_pin(heard(lambda w: Unhold(1, E), "ctl")),
    "hold timer": user_pin(lambda w: TimerFired(("hold", E, 0))),
}
CASES: Dict[str, Dict[str, Case]] = {
    "birth": BIRTH,
    "source": SOURCE,
    "writer": WRITER,
    "destination": DESTINATION,
    "quarantine": QUARANTINE,
    "engine": ENGINE,
    "hold": HOLD,
}
