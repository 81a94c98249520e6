"""Locations with the KV of another model than their process's: who may register so, and between what may be moved."""

from __future__ import annotations

from typing import List, Optional, Tuple

import msgspec

from kvcore.protocol.config import Config, NodeSpec, WorkerSpec
from kvcore.protocol.messages import Location, MoveRequest, Namespace, Pin
from kvcore.scenario.world import World, specs
from tests.core.drive import CPU, Story, keys, lens

DRAFT = Namespace(model="draft", ranks=2, chunk_tokens=1, bytes_per_token=1)


class Spaces(Story):
    """Two instances of two ranks with a second location; ``odd``: what lies there at b/1, which comes last."""

    def __init__(self, space: Optional[Namespace], odd: Optional[Namespace] = None) -> None:
        super().__init__(Config().rules)
        nodes: List[NodeSpec] = []
        for spec in specs({"a": 4, "b": 4}, Config(), 2):
            if isinstance(spec, WorkerSpec):
                there = odd if odd is not None and spec.name == "b/1" else space
                second = Location("draft", 4, slot_bytes=64, namespace=there)
                spec = msgspec.structs.replace(spec, locations=(*spec.locations, second))
            nodes.append(spec)
        World.__init__(self, nodes)

    def refusals(self) -> List[str]:
        return [note.detail for name, note in self.notes if (name, note.kind) == ("ctl", "register_refused")]


def test_what_lies_in_a_location_decides_not_whose_process_it_is() -> None:
    w = Spaces(DRAFT)
    for rank in (0, 1):
        w.store(f"a/{rank}", "xy", "draft")
        w.store(f"a/{rank}", "z")
    w.settle()
    event = moved(w, ("a", "draft"), ("b", "draft"), "xy")
    assert w.status(event).state == "done" and w.at("b/1", "draft") == "xy" and w.at("a/0", "draft") == ""
    for src, dst in ((("b", "draft"), ("a", CPU)), (("a", CPU), ("b", "draft")), (("b", "draft"), ("b", CPU))):
        w.sent.clear()
        answer = w.status(moved(w, src, dst, "xy"))
        assert (answer.state, answer.reason) == ("failed", "mismatch")
        assert "draft" in answer.detail and "synthetic" in answer.detail
        assert not any(isinstance(message, Pin) for _, _, message in w.sent), "nobody is asked for it"


def test_slots_of_another_size_alone_are_no_other_kind_of_kv() -> None:
    w = Spaces(None)
    for rank in (0, 1):
        w.store(f"a/{rank}", "xy")
    w.settle()
    assert w.status(moved(w, ("a", CPU), ("b", "draft"), "xy")).state == "done"
    assert w.at("b/0", "draft") == w.at("b/1", "draft") == "xy"


def moved(w: Story, src: Tuple[str, str], dst: Tuple[str, str], text: str) -> int:

    w.request(MoveRequest(w.op(), src, dst, keys(text), lens(text)))
    w.settle()
    return w.begun()[-1]


def test_mates_must_agree_on_every_location() -> None:
    w = Spaces(DRAFT, msgspec.structs.replace(DRAFT, weights="other"))
    assert w.refusals() == ["b rank 1 at b/1: mismatch, have weights=, got weights=other"]
    assert not w.worker("b/1").epoch and w.worker("b/0").epoch


def test_all_locations_are_of_as_many_ranks() -> None:
    w = Spaces(msgspec.structs.replace(DRAFT, ranks=1))
    assert len(w.refusals()) == 4
    assert "ranks, have 2 in all locations, got draft with 1" in w.refusals()[0]
