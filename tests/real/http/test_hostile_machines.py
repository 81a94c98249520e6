"""Well-formed messages that make no sense, from a peer that lies: whatever they say, no machine stops."""

from __future__ import annotations

import types
import typing
from typing import Any, get_args, get_origin

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcore.protocol import machine as m
from kvcore.protocol import messages as msg
from kvcore.protocol.config import Config, ControllerSpec, WorkerSpec
from kvcore.protocol.controller import Controller
from kvcore.protocol.machine import Machine
from kvcore.protocol.messages import Wire, event_id
from kvcore.protocol.worker import Worker
from kvreal.endpoints import FACES_ONLY

SPACE = msg.Namespace(chunk_tokens=64, bytes_per_token=4, ranks=1)
KEYS = tuple(bytes([n]) * 32 for n in range(1, 5))
PLACES = (msg.Location("L1", 6), msg.Location("L2", 3))
CONTROLLER = "127.0.0.1:8300"
PEERS = ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
KINDS = [kind for kind in get_args(Wire) if kind not in FACES_ONLY]

integers = st.sampled_from(
    [0, 1, 2, 3, 4, 5, 7, -1, -(2**63), 2**63 - 1, 2**64 - 1, *[event_id(1, n) for n in range(5)], event_id(2, 1)]
)
strings = st.sampled_from(["L1", "L2", "a", "b", "", "Pin", "Fetch", "full", "stale_inc", "L9", CONTROLLER, *PEERS])
floats = st.sampled_from([0.0, -1.0, 1.0, 1e-300, 5e9, 1e300, float("inf"), float("nan")])
blobs = st.sampled_from([*KEYS, b"", b"x", b"y" * 32])


def of(kind: Any) -> st.SearchStrategy[Any]:
    """Anything of a message's field type, with what is known here more often than not."""
    plain = {int: integers, float: floats, str: strings, bytes: blobs, bool: st.booleans()}
    if kind in plain:
        return plain[kind]
    if get_origin(kind) in (typing.Union, types.UnionType):
        return st.one_of([st.none() if part is type(None) else of(part) for part in get_args(kind)])
    if get_origin(kind) is tuple:
        args = get_args(kind)
        if args[-1] is Ellipsis:
            return st.lists(of(args[0]), max_size=4).map(tuple)
        return st.tuples(*[of(arg) for arg in args])
    return struct(kind)


_made: dict[Any, st.SearchStrategy[Any]] = {}


def struct(kind: Any) -> st.SearchStrategy[Any]:
    if kind not in _made:
        hints = typing.get_type_hints(kind)
        _made[kind] = st.builds(kind, **{name: of(hints[name]) for name in kind.__struct_fields__})
    return _made[kind]


anything = st.one_of([struct(kind) for kind in KINDS])
sent = st.tuples(st.sampled_from([CONTROLLER, *PEERS]), anything, st.integers(0, 10**9))
MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def give(machine: Machine, now: int, item: m.Input) -> list[m.Effect]:
    effects = machine.handle(now, item)
    # what a driver would do next: encode all that is sent, and write all that is journaled
    for effect in effects:
        if isinstance(effect, m.Send):
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(effect.msg), type=Wire) == effect.msg
        elif isinstance(effect, m.Journal):
            assert msgspec.json.decode(msgspec.json.encode(effect.record), type=m.JournalRecord) == effect.record
    return effects


def register(instance: str, nonce: int) -> msg.Register:
    return msg.Register(instance, 0, nonce, SPACE, PLACES, "tcp|127.0.0.1|1|p")


def controller() -> Controller:
    """Two instances, one of which holds four chunks; a move, a copy and a pin on their way."""
    machine = Controller(ControllerSpec(CONTROLLER, Config()))
    give(machine, 0, m.Boot())
    for number, (name, address) in enumerate(zip("ab", PEERS), 1):
        give(machine, number, m.Received(address, register(name, number)))
        inc = (event_id(1, number), 0)
        beat = msg.Beat(inc[0], tuple(msg.LocationSeq(place.name, inc, 1) for place in PLACES))
        give(machine, number, m.Received(address, beat))
        entries = (
            tuple(msg.Entry(key, KEYS[i - 1] if i else b"", 64) for i, key in enumerate(KEYS)) if name == "a" else ()
        )
        give(machine, number, m.Received(address, msg.Snap("L1", inc, 1, entries)))
    for op, copy in (("move", False), ("copy", True)):
        request = msg.MoveRequest(op, ("a", "L1"), ("b", "L1"), KEYS, (64,) * 4, copy)
        give(machine, 10, m.Received("http/1", request))
    give(machine, 11, m.Received("http/1", msg.PinRequest("pin", ("a", "L1"), KEYS, (64,) * 4)))
    give(machine, 12, m.Received("http/1", msg.ClearRequest("clear", ("b", "L2"))))
    return machine


def worker() -> Worker:
    """Registered, with two chunks in L1."""
    machine = Worker(WorkerSpec(PEERS[0], "a", 0, CONTROLLER, SPACE, PLACES, Config()))
    give(machine, 0, m.Boot(nonce=1, endpoint="tcp|127.0.0.1|1|p"))
    give(machine, 1, m.Received(CONTROLLER, msg.Registered(1, 1, event_id(1, 1))))
    for effect in give(machine, 2, m.Received("http/1", msg.StoreRequest("s", "L1", KEYS[:2], (64, 64)))):
        if isinstance(effect, m.StartFill):
            give(machine, 3, m.FillDone(effect.fid, True))
    assert len(machine.pools["L1"].index) == 2
    return machine


def attacked(machine: Machine, attack: list[tuple[str, Any, int]]) -> None:
    now = 100
    for src, message, wait_ns in attack:
        now += wait_ns
        effects = give(machine, now, m.Received(src, message))
        for effect in effects:
            # a driver that carries everything out, and well
            if isinstance(effect, m.StartCopy):
                give(machine, now, m.CopyDone(effect.rid, True, "", "tcp"))
            elif isinstance(effect, m.AbortCopy):
                give(machine, now, m.CopyStopped(effect.rid))
            elif isinstance(effect, m.CloseWindow):
                give(machine, now, m.WindowClosed(effect.peer, effect.epoch))
    for _ in range(50):
        timer = machine.timers.next()
        if timer is None:
            return
        now = max(now, timer[0])
        give(machine, now, m.TimerFired(timer[1]))


@MANY
@given(st.lists(sent, min_size=1, max_size=25))
def test_no_message_stops_a_controller(attack: list[tuple[str, Any, int]]) -> None:
    machine = controller()
    attacked(machine, attack)
    answers = give(machine, 2**62, m.Received("http/9", msg.LookupRequest("l", KEYS, (64,) * 4)))
    assert any(isinstance(effect, m.Send) and effect.dst == "http/9" for effect in answers)


@MANY
@given(st.lists(sent, min_size=1, max_size=25))
def test_no_message_stops_a_worker(attack: list[tuple[str, Any, int]]) -> None:
    attacked(worker(), attack)
