"""Generated scenarios read and push in one run, and have slots of more than one size."""

from __future__ import annotations

from kvcore.protocol.config import WorkerSpec
from kvcore.protocol.machine import Send, StartCopy
from kvcore.protocol.messages import Push
from kvcore.scenario.arbitrary import TINY, scenario_from, seeded
from kvcore.scenario.build import build
from kvcore.scenario.history import ListHistory
from kvsim.run import run

SEEDS = 200


def test_generated_runs_mix_directions_and_slots() -> None:
    mixed = slots = 0
    for seed in range(SEEDS):
        built = build(scenario_from(seeded(seed), TINY, f"seed-{seed}", seed))
        history = ListHistory()
        run(built, sink=history)
        effects = [effect for line in history.lines for effect in line.out]
        read = any(isinstance(effect, StartCopy) and effect.read for effect in effects)
        pushed = any(isinstance(effect, Send) and isinstance(effect.msg, Push) for effect in effects)
        mixed += read and pushed
        workers = [spec for spec in built.specs if isinstance(spec, WorkerSpec)]
        sizes = {place.slot_size(spec.namespace) for spec in workers for place in spec.locations}
        slots += len(sizes) > 1
    assert mixed >= SEEDS // 20 and slots >= SEEDS // 5, (mixed, slots)
