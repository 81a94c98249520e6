"""Locations with slots of different sizes, and with the KV of different models, in one process: over each transport, on
real processes and in simulation alike."""

from __future__ import annotations

from pathlib import Path
from typing import Dict

import pytest

from kvcore.protocol.config import WorkerSpec
from kvcore.scenario.build import BuildError, Built, build
from kvcore.scenario.history import read
from kvcore.scenario.loader import ScenarioError, loads
from kvcore.scenario.result import Result
from kvmove.examine import examine
from kvreal.arena import join
from kvreal.memory import Memory
from kvreal.pool import Pool
from kvreal.run import run
from kvsim.run import run as simulate

KIB = 1 << 10

#: A target model of 1 KiB a token, and a draft of it of 128 bytes in chunks of 8 tokens; disks with larger slots.
TWO_MODELS = """
name: two-models
kv: {bytes_per_token: 1 KiB, chunk: 16 tokens, direction: DIRECTION}
instances:
  a:
    ranks: 2
    locations:
      LocalCPUBackend: 1 MiB
      DraftCPU: {size: 64 KiB, namespace: {model: draft, bytes_per_token: 64, chunk_tokens: 8}}
      LocalDiskBackend: {size: 1 MiB, slot: 64 KiB}
  b:
    ranks: 2
    locations:
      LocalDiskBackend: {size: 1 MiB, slot: 32 KiB}
      DraftCPU: {size: 128 KiB, slot: 2 KiB, namespace: {model: draft, bytes_per_token: 64, chunk_tokens: 8}}
      SmallCPU: {size: 1 MiB, slot: 48 KiB}
      LocalCPUBackend: 1 MiB
steps:
  - store: {at: a/LocalCPUBackend, prompt: p, tokens: 200}
  - store: {at: a/DraftCPU, prompt: p, tokens: 200}
  - settle
  - move: {from: a/LocalCPUBackend, to: b/LocalDiskBackend, prompt: p, copy: true, as: onto-larger}
  - settle
  - move: {from: a/DraftCPU, to: b/DraftCPU, prompt: p, as: draft}
  - settle
  - move: {from: b/LocalDiskBackend, to: b/SmallCPU, prompt: p, copy: true, as: inside}
  - settle
  - move: {from: b/SmallCPU, to: a/LocalDiskBackend, prompt: p, as: between-other-sizes}
  - settle
  - move: {from: a/LocalDiskBackend, to: b/LocalCPUBackend, prompt: p, copy: true, as: off-larger}
  - settle
  - move: {from: b/DraftCPU, to: a/LocalCPUBackend, prompt: p, as: mixed}
  - settle
  - move: {from: a/LocalCPUBackend, to: a/DraftCPU, prompt: p, as: mixed-inside}
  - settle
  - lookup: {prompt: p, as: target}
  - lookup: {prompt: p, of: a/DraftCPU, as: drafted}
  - use: {at: b/DraftCPU, prompt: p, as: use-draft}
  - use: {at: b/LocalCPUBackend, prompt: p, as: use-target}
  - settle
"""

DONE = ("onto-larger", "draft", "inside", "between-other-sizes", "off-larger")
EVERYWHERE = {
    "a/LocalCPUBackend": {"p": 200}, "a/LocalDiskBackend": {"p": 200},
    "b/LocalDiskBackend": {"p": 200}, "b/LocalCPUBackend": {"p": 200}, "b/DraftCPU": {"p": 200},
}  # fmt: skip


def two_models(direction: str = "read") -> Built:
    return build(loads(TWO_MODELS.replace("DIRECTION", direction), "two-models.yaml"))


def good(result: Result) -> None:
    assert not result.violations and not result.hung
    states = {one.op: one.state for one in result.operations}
    assert {op: states[op] for op in DONE} == dict.fromkeys(DONE, "done")
    for op in ("mixed", "mixed-inside"):
        refused = result.operation(op)
        assert refused is not None and (refused.state, refused.reason) == ("failed", "mismatch")
        assert "draft" in refused.detail and "llama" in refused.detail and "\n" not in refused.detail
    found = {name: {f"{at.instance}/{at.location}": at.num_tokens for at in result.operation(name).found}  # type: ignore[union-attr]
             for name in ("target", "drafted")}  # fmt: skip
    assert found["drafted"] == {"b/DraftCPU": 200}
    assert set(found["target"]) == set(EVERYWHERE) - {"b/DraftCPU"}
    assert (states["use-draft"], states["use-target"]) == ("ok", "ok")
    assert result.placement == EVERYWHERE


@pytest.mark.parametrize("direction", ["read", "push"])
@pytest.mark.parametrize("transport", ["socket", "tcp", "nixl", "arena"])
def test_two_models_and_four_sizes_of_slots_in_one_process(transport: str, direction: str, tmp_path: Path) -> None:
    built = two_models(direction)
    with Pool(transport) as pool:
        real = run(built, history=tmp_path / "h.jsonl", pool=pool)
    good(real)
    replay, violations = examine(*read(tmp_path / "h.jsonl"), quiet=True)
    assert replay.equal and not violations
    assert real.metrics["bytes_checked"] == 4 * 200 * KIB + 200 * 128
    simulated = simulate(built)
    good(simulated)
    sizes = [{phases.op: phases.bytes for phases in result.phases} for result in (real, simulated)]
    assert sizes[0] == sizes[1] == {op: 200 * 128 if op == "draft" else 200 * KIB for op in DONE}


def test_what_is_built_has_each_location_s_own_slots() -> None:
    a, b = (spec for spec in two_models().specs if isinstance(spec, WorkerSpec) and spec.rank == 0)
    ours, theirs = ({one.name: (one.slots, one.slot_size(s.namespace)) for one in s.locations} for s in (a, b))
    assert ours == {"LocalCPUBackend": (64, 8192), "DraftCPU": (64, 512), "LocalDiskBackend": (16, 32768)}
    assert theirs["DraftCPU"] == (64, 1024) and theirs["SmallCPU"] == (21, 24576)
    assert a.space("DraftCPU").model == "draft" and a.space("LocalCPUBackend") == a.namespace


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("{size: 1 MiB, slot: 8 KiB}", "instances.a.locations.X.slot: 8 KiB is less than one chunk of 16384 bytes"),
        ("{size: 16 KiB, slot: 32 KiB}", "instances.a.locations.X.size: 16 KiB is less than one slot of 32 KiB"),
        ("{size: 1 KiB, namespace: {bytes_per_token: 128}}", "X.size: 1 KiB is less than one chunk: 16 tokens of 128"),
        ("{size: 1 MiB, namespace: {modle: x}}", "unknown namespace field 'modle', expected model,"),
        ("{size: 1 MiB, namespace: {ranks: 2}}", "found ranks, which are the whole instance's"),
        ("{size: 1 MiB, namespace: {bytes_per_token: much}}", "found 'much', expected a whole number"),
    ],
)
def test_what_cannot_be_is_one_line(place: str, why: str) -> None:
    kv = "kv: {bytes_per_token: 1 KiB, chunk: 16 tokens}"
    text = f"name: t\n{kv}\ninstances: {{a: {{locations: {{X: {place}}}}}}}\n"
    with pytest.raises((ScenarioError, BuildError)) as refused:
        build(loads(text, "t.yaml"))
    assert why in str(refused.value) and "\n" not in str(refused.value)


# ---- memory ----------------------------------------------------------------------------------------------------------
SIZES: Dict[str, int] = {"small": 4 * KIB, "large": 64 * KIB, "SmallDiskBackend": 8 * KIB}


def laid_out(arena: str = "") -> Memory:
    memory = Memory(arena=arena, arena_bytes=1 << 20)
    memory.lay_out([("usual", 8), ("small", 16), ("large", 4), ("SmallDiskBackend", 4)], 16 * KIB, 0, SIZES)
    return memory


@pytest.mark.parametrize("in_arena", [False, True])
def test_slots_of_all_sizes_are_apart(in_arena: bool, tmp_path: Path) -> None:
    memory = laid_out(str(tmp_path / "arena") if in_arena else "")
    try:
        slots = [(name, slot) for name, place in memory.places.items() for slot in range(place.slots)]
        for number, (name, slot) in enumerate(slots):
            size = memory.places[name].slot_bytes
            assert size == SIZES.get(name, 16 * KIB)
            data = memory.get("usual", 0, 1).repeat(size)
            data[:] = number % 251
            memory.put(name, slot, data, b"k")
        for number, (name, slot) in enumerate(slots):
            assert set(memory.get(name, slot, memory.places[name].slot_bytes, b"k").tolist()) == {number % 251}
        for name, place in memory.places.items():
            memory.note(name, list(range(place.slots)))
        assert memory.wipe() == sum(memory.places[name].slot_bytes for name, _ in slots)
    finally:
        memory.leave_arena()
        memory.close()


def test_of_an_arena_only_slots_of_one_size_are_handed_over(tmp_path: Path) -> None:
    memory = laid_out(str(tmp_path / "arena"))
    try:
        memory.put("usual", 0, memory.get("usual", 1, KIB), b"")
        assert not memory.share("usual", [0], "large", [0])
        memory.lay_out([("usual", 8), ("other", 8), ("large", 4)], 16 * KIB, 0, SIZES)
        assert sorted(memory.members) == [16 * KIB, 64 * KIB], "what has slots of a size that is not used is left"
        memory.soil("usual", [0])
        assert memory.share("usual", [0], "other", [3])
        other = join(str(tmp_path / "arena"), "other", 4 * KIB, 1 << 20)
        other.leave()
    finally:
        memory.leave_arena()
        memory.close()
    assert not (tmp_path / "arena").exists()
