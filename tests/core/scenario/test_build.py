"""A scenario compiles to specs, ready messages and keys; what cannot be is refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, Dict

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.protocol.chunks import chunk_keys
from kvcore.protocol.config import ControllerSpec, WorkerSpec
from kvcore.protocol.messages import MoveRequest, Namespace, PinRequest, StatusRequest, StoreRequest, UseRequest
from kvcore.scenario.build import BuildError, build, decode, encode, make_machine, placement
from kvcore.scenario.client import Client, ClientSpec, Op
from kvcore.scenario.prompts import PromptError, Prompts, PromptText, generated_ids
from tests.core.scenario.tiny import play, scenario

SPACE = Namespace(chunk_tokens=4)
STORE = {"store": {"at": "a/cpu", "prompt": "p", "tokens": "5", "as": "s"}}
MOVE = {"move": {"from": "a/cpu", "to": "b/cpu", "prompt": "p", "as": "m"}}


def ops(*steps: Any, **more: Any) -> Dict[str, Op]:
    spec = build(scenario(steps=steps, **more)).specs[-1]
    assert isinstance(spec, ClientSpec)
    return {op.name: op for op in spec.ops}


def test_the_order_of_nodes_and_what_they_are() -> None:
    built = build(scenario(steps=[STORE, MOVE]))
    assert built.nodes == ("ctl", "a/0", "b/0", "client")
    assert isinstance(built.specs[0], ControllerSpec) and isinstance(built.specs[-1], ClientSpec)
    for spec in built.specs:
        assert make_machine(spec).timers.next() is None
    assert isinstance(make_machine(built.specs[-1]), Client)
    assert built.deadline_ns == 3 * built.config.deadline_ns


def test_ranks_share_tokens_and_space() -> None:
    place = {"locations": {"cpu": {"size": "64 B"}}, "ranks": 2}
    built = build(scenario(kv={"chunk": "2 tokens", "bytes_per_token": "4 B"}, instances={"a": place}))
    worker = built.specs[2]
    assert isinstance(worker, WorkerSpec)
    assert (worker.name, worker.instance, worker.rank) == ("a/1", "a", 1)
    assert worker.namespace.bytes_per_token == 2 and worker.namespace.ranks == 2
    assert built.bytes_per_token == {"a/0/cpu": 2, "a/1/cpu": 2}
    assert worker.locations[0].slots == 8
    assert built.ranks("a") == ("a/0", "a/1")


def test_the_messages_are_ready() -> None:
    found = ops(
        STORE,
        {"use": {"at": "a/cpu", "prompt": "p", "hold": "1 s", "as": "u"}},
        {"pin": {"at": "a/cpu", "prompt": "p", "tokens": "2", "lease": "2 leases", "as": "pin"}},
        {"move": {"from": "a/cpu", "to": "b/cpu", "all": True, "copy": True, "if_room": True, "idem": "i", "as": "m"}},
        {"status": {"op": "m", "wait": True, "as": "st"}},
        {"unpin": {"pin": "pin", "as": "un"}},
    )
    assert found["s"].to == ("a/0",) and found["m"].to == ("ctl",)
    store, use, pin = (found[name].requests[0] for name in ("s", "u", "pin"))
    assert isinstance(store, StoreRequest) and store.lens == (2, 2, 1)
    assert isinstance(use, UseRequest) and use.keys == store.keys and use.hold_ns == 10**9
    assert found["u"].timeout_ns > 10**9
    assert isinstance(pin, PinRequest) and pin.keys == store.keys[:1]
    move = found["m"].requests[0]
    assert isinstance(move, MoveRequest)
    assert (move.keys, move.copy, move.evict, move.idem) == ((), True, False, "i")
    assert found["st"].requests == (StatusRequest("st", idem="i", wait=True),) and found["st"].refers == ("m",)
    assert found["un"].refers == ("pin",)


def test_a_fill_is_many_prompts_and_two_fills_are_other_ones() -> None:
    fill = {"at": "a/cpu", "slots": 5, "each": "2 chunks"}
    found = ops({"fill": {**fill, "as": "f"}}, {"fill": {**fill, "as": "g"}})
    lens = [request.lens for request in found["f"].requests if isinstance(request, StoreRequest)]
    assert lens == [(2, 2), (2, 2), (2,)]
    assert [request.op for request in found["f"].requests] == ["f#0", "f#1", "f#2"]
    keys = [r.keys[0] for name in ("f", "g") for r in found[name].requests if isinstance(r, StoreRequest)]
    assert len(set(keys)) == 6


def test_a_namespace_that_differs_changes_keys_where_it_differs() -> None:
    instances = {
        "a": {"locations": {"cpu": {"size": "16 B"}}},
        "b": {"locations": {"cpu": {"size": "16 B"}}, "namespace": {"dtype": "fp8"}},
        "c": {"locations": {"cpu": {"size": "16 B"}}},
    }
    at_b = {"store": {"at": "b/cpu", "prompt": "p", "tokens": "5", "as": "t"}}
    built = build(scenario(instances=instances, steps=[STORE, at_b, {"lookup": {"prompt": "p", "as": "l"}}]))
    client = built.specs[-1]
    assert isinstance(client, ClientSpec)
    a, b, lookup = (op.requests[0] for op in client.ops)
    assert isinstance(a, StoreRequest) and isinstance(b, StoreRequest) and a.keys != b.keys
    assert getattr(lookup, "keys", ()) == a.keys, "lookups are asked under what most have"
    assert built.prompts["p"].keys == a.keys and built.own_prompts["b"]["p"].keys == b.keys


def test_a_fault_may_give_one_rank_another_namespace() -> None:
    place = {"locations": {"cpu": {"size": "16 B"}}, "ranks": 2}
    kv = {"chunk": "2 tokens", "bytes_per_token": "2 B"}
    built = build(scenario(kv=kv, instances={"a": place}, faults=[{"namespace": {"node": "a/1", "weights": "w2"}}]))
    assert [s.namespace.weights for s in built.specs if isinstance(s, WorkerSpec)] == ["", "w2"]


def test_an_id_that_is_claimed_is_what_the_controller_hears() -> None:
    instances = {
        "a": {"locations": {"cpu": {"size": "16 B"}}, "id": "x"},
        "b": {"locations": {"cpu": {"size": "16 B"}}, "id": "x"},
    }
    move = ops(STORE, MOVE, instances=instances)["m"].requests[0]
    assert isinstance(move, MoveRequest) and move.src == move.dst == ("x", "cpu")


def test_ids_tokens_and_shares() -> None:
    prompts = Prompts(
        {
            "p": PromptText(tokens=100),
            "q": PromptText(tokens=100, shares=(("p", 10),)),
            "r": PromptText(ids=(1, 2, 3)),
            "s": PromptText(tokens=100, salt="t"),
        }
    )
    p, q = prompts.ids("p", 100), prompts.ids("q", 100)
    assert p[:10] == q[:10] and p[10:] != q[10:]
    assert prompts.keys(SPACE, "p", 40)[0][:2] == prompts.keys(SPACE, "q", 40)[0][:2]
    assert prompts.keys(SPACE, "r", 3) == chunk_keys(SPACE, [1, 2, 3])
    assert prompts.ids("p", 5) == p[:5]
    with pytest.raises(PromptError, match="3 token ids, 4 are asked for"):
        prompts.ids("r", 4)


def test_prompts_that_share_in_a_circle_are_refused() -> None:
    prompts = Prompts({"p": PromptText(shares=(("q", 2),)), "q": PromptText(shares=(("p", 2),))})
    with pytest.raises(PromptError, match="p -> q -> p"):
        prompts.ids("p", 4)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=5), st.integers(0, 100), st.integers(0, 100))
def test_longer_prompts_begin_with_shorter_ones(name: str, one: int, other: int) -> None:
    short, long = sorted((one, other))
    assert generated_ids(name, long)[:short] == generated_ids(name, short)
    assert len(generated_ids(name, long)) == long
    assert all(0 <= value < 2**17 for value in generated_ids(name, long))


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(1, 20), min_size=1), st.integers(1, 20), st.integers(0, 20))
def test_what_is_held_is_the_longest_prefix(used: Any, stored: int, lost: int) -> None:
    """Of every prefix that some step uses, the longest all of whose chunks are there."""
    prompts = Prompts({"p": PromptText()})
    used = sorted(used | {stored})
    for count in used:
        prompts.keys(SPACE, "p", count)
    has = list(prompts.keys(SPACE, "p", stored)[0])
    if lost < len(has):
        del has[lost]
    expected = max(
        sum(lens[:n])
        for keys, lens in [prompts.keys(SPACE, "p", count) for count in used]
        for n in range(len(keys) + 1)
        if all(key in has for key in keys[:n])
    )
    assert prompts.all(SPACE, ("p",))["p"].held(set(has)) == expected


def test_placement_is_the_minimum_over_ranks_and_a_dead_rank_holds_nothing() -> None:
    place = {"locations": {"cpu": {"size": "32 B"}}, "ranks": 2}
    kv = {"chunk": "2 tokens", "bytes_per_token": "2 B"}
    built = build(scenario(kv=kv, instances={"a": place}, steps=[STORE]))
    keys = built.prompts["p"].keys
    assert placement(built, {"a/0": {"cpu": keys}, "a/1": {"cpu": keys[:2]}}) == {"a/cpu": {"p": 4}}
    assert placement(built, {"a/0": {"cpu": keys}}) == {}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"instances": {}}, "instances: none"),
        ({"steps": [MOVE]}, "prompt p has no length"),
        ({"steps": [STORE, {"move": {"from": "z/cpu", "to": "b/cpu", "prompt": "p"}}]}, "there is no instance 'z'"),
        ({"steps": [STORE, {"move": {"from": "a/gpu", "to": "b/cpu", "prompt": "p"}}]}, "no location 'gpu'"),
        ({"steps": [STORE, {"lookup": {"prompt": "p", "tokens": "6"}}]}, "expected 1 to 5"),
        ({"steps": [{"cancel": {"op": "m"}}]}, "m is no earlier step, expected a move before it"),
        ({"steps": [STORE, {"cancel": {"op": "s"}}]}, "s is a store, expected a move"),
        ({"steps": [STORE, STORE]}, "2 steps are called s"),
        ({"steps": [{"status": {}}]}, "a status needs op or idem"),
        ({"kv": {"model": "gpt-9"}}, "'gpt-9' is not known"),
        ({"kv": {"chunk": "2 tokens", "bytes_per_token": "100 B"}}, "16 B is less than one chunk"),
        ({"instances": {"a": {"ranks": 3, "locations": {"cpu": {"size": "9 B"}}}}}, "cannot share 1 bytes a token"),
        ({"instances": {"a": {"ranks": 0}}}, "expected 1 or more"),
        ({"without": ["h99"]}, "there is no rule 'h99'"),
        ({"prompts": {"p": {"ids": [1, 2]}}, "steps": [STORE]}, "expected 1 to 2"),
        ({"prompts": {"p": {"tokens": "5", "shares": {"q": 2}}}, "steps": [STORE]}, "q, which is no prompt"),
        ({"faults": [{"namespace": {"node": "a", "chunk_tokens": 99}}]}, "less than one chunk of 99 tokens"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change: Any, text: str) -> None:
    with pytest.raises(BuildError) as caught:
        build(scenario(**change))
    assert text in str(caught.value) and "\n" not in str(caught.value)


FAULT = {"when": {"sent": "Pin"}, "delay": "2 leases"}
LINKS = {"links": {"a-b": {"bandwidth": "10 Gbit/s", "latency": "20 us"}}}


def test_built_survives_the_wire() -> None:
    built = build(scenario(steps=[STORE, MOVE], faults=[FAULT], network=LINKS, expect={"m": {"state": "done"}}), seed=7)
    assert built.seed == 7
    assert decode(encode(built)) == built


def test_the_same_in_every_process() -> None:
    code = (
        "from tests.core.scenario.test_build import *; import hashlib;"
        "print(hashlib.sha256(encode(build(scenario(steps=[STORE, MOVE], faults=[FAULT], network=LINKS)))).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_played_through_real_machines_a_move_moves() -> None:
    _, _, result = play(steps=[STORE, MOVE, {"settle": {}}, {"lookup": {"prompt": "p", "as": "l"}}])
    states = {operation.op: (operation.state, operation.num_tokens) for operation in result.operations}
    assert states["s"] == ("ok", 5) and states["m"] == ("done", 5)
    assert result.placement == {"b/cpu": {"p": 5}}
    assert [msgspec.structs.astuple(one) for one in result.operation("l").found] == [("b", "cpu", 5)]  # type: ignore[union-attr]
