"""What a start or an end costs in the fabric, with so many flows at once through so many hosts' NICs.

    pytest tests/bench/test_fabric_speed.py --benchmark-enable -s

A prototype that solved the whole component took, for a solve at 64 / 256 / 1,024 coupled flows: 52 / 247 / 466 us
(lazy heap), 43 / 70 / 274 us (numpy).
"""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from kvsim.fabric import Fabric
from kvsim.loop import Loop


class Traffic:
    """``window`` flows between random pairs of hosts, each followed by another when it ends."""

    def __init__(self, hosts: int, window: int, seed: int = 1) -> None:
        self.rng = random.Random(seed)
        self.loop = Loop()
        self.fabric = Fabric(self.loop)
        self.up = [self.fabric.link(f"{i}.out", 5e9) for i in range(hosts)]
        self.down = [self.fabric.link(f"{i}.in", 5e9) for i in range(hosts)]
        self.ended = 0
        self.goal = 0
        for _ in range(window):
            self.start()

    def start(self) -> None:
        a, b = self.rng.sample(range(len(self.up)), 2)
        nbytes = 1_000_000 + int(self.rng.paretovariate(1.2) * 1e6) % (32 << 20)
        after_ns = self.rng.randrange(50_000, 200_000)
        self.fabric.start((self.up[a], self.down[b]), nbytes, self.end, None, after_ns=after_ns)

    def end(self, _: Any) -> None:
        self.ended += 1
        self.start()
        if self.ended == self.goal:
            self.loop.stop()

    def run(self, flows: int) -> None:
        self.goal = self.ended + flows
        self.loop.advance(1 << 60)


@pytest.mark.parametrize(
    ("hosts", "window"), [(10_000, 64), (100, 64), (100, 256), (256, 256), (100, 1024), (1024, 1024)]
)
def test_flows_a_second(hosts: int, window: int, request: pytest.FixtureRequest) -> None:
    flows = 4 * window if request.config.getoption("--benchmark-enable") else 100
    traffic = Traffic(hosts, window)
    traffic.run(2 * window)
    solver = traffic.fabric.solver
    solves, filled = solver.solves, solver.filled
    start_s = time.process_time()
    traffic.run(flows)
    each_us = (time.process_time() - start_s) / flows * 1e6
    solves, filled = solver.solves - solves, solver.filled - filled
    print(
        f"\n{hosts} hosts, {window} flows at once: {each_us:.1f} us a flow (start and end),"
        f" {solves / flows:.2f} solves a flow, {filled / max(1, solves):.1f} flows filled a solve"
    )
    assert len(traffic.fabric.flows) == window
