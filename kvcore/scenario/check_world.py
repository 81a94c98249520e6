"""The checkers in a World: ``watch = attach(world)``, and ``watch.checker.violations`` says what went wrong."""

from __future__ import annotations

from typing import Dict, List, Optional, Tuple, final

from kvcore.protocol.machine import Effect, Input
from kvcore.protocol.messages import Key
from kvcore.scenario.checks import Checker, Violation
from kvcore.scenario.world import World


@final
class Memory:
    """What a World's slots hold, as a checker asks for it."""

    def __init__(self, slots: Dict[Tuple[str, str], Dict[int, Key]]) -> None:
        self.slots: Dict[Tuple[str, str], Dict[int, Key]] = slots

    def __call__(self, node: str, location: str, slot: int) -> Optional[bytes]:
        return self.slots.get((node, location), {}).get(slot)


@final
class Watch:
    """An observer. It sees every input, who has died meanwhile, and looks at all bytes after each step."""

    def __init__(self, faults: bool = True) -> None:
        self.checker: Checker = Checker(None, faults)

    def __call__(self, world: World, node: str, item: Input, effects: List[Effect]) -> None:
        checker = self.checker
        if checker.content is None:
            checker.content = Memory(world.memory)
        for name in [name for name in checker.shadows if name not in world.machines]:
            checker.died(name)
        checker.step(world.now, node, world.machines[node], item, effects)
        for name in checker.shadows:
            checker.touched(world.now, name, world.machines[name])

    def quiet(self, world: World) -> List[Violation]:
        """Ask for what must hold once nothing is under way; all violations so far."""
        self.checker.quiet(world.now, world.machines)
        return self.checker.violations


def attach(world: World, faults: bool = True) -> Watch:
    """Watch a world from now on."""
    watch = Watch(faults)
    watch.checker.content = Memory(world.memory)
    for name, machine in world.machines.items():
        watch.checker.boot(name, machine)
    world.observe = watch
    return watch
