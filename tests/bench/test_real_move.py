"""A 512 MiB move over NIXL beside a bare NIXL transfer of the same descriptors, in the same run on the same machine.

Two ratios are printed, bare time over ours: of the copy alone (what transport and window cost), and of the whole move,
from the client's request to its last answer (what the protocol costs). Goal: 0.85 of the whole.
"""

from __future__ import annotations

import statistics
from typing import Any, List

import pytest

pytest.importorskip("zmq")

from kvcore.scenario.build import Built, build
from kvcore.scenario.loader import loads
from kvreal.bare import BareNixl, Shape
from kvreal.pool import Pool
from kvreal.run import run
from kvreal.transfer import available

pytestmark = pytest.mark.real

TOKENS = 4096
MOVES = 10
CHUNK_BYTES = 32 << 20
NBYTES = TOKENS * 131072


def there_and_back(direction: str) -> Built:
    """One prompt that is moved from a to b and back, again and again: the connection is made, the pages are there."""
    steps = [f"  - store: {{at: a/LocalCPUBackend, prompt: p, tokens: {TOKENS}}}"]
    for i in range(MOVES):
        source, target = ("a", "b") if i % 2 == 0 else ("b", "a")
        steps.append(f"  - move: {{from: {source}/LocalCPUBackend, to: {target}/LocalCPUBackend, prompt: p, as: m{i}}}")
    text = "\n".join(
        ["name: there and back", f"kv: {{model: llama-3.1-8b, direction: {direction}}}", "instances:"]
        + [f"  {name}: {{locations: {{LocalCPUBackend: 1 GiB}}}}" for name in "ab"]
        + ["deadline: 60 s", "steps:", *steps, ""]
    )
    return build(loads(text, "bench.yaml"))


@pytest.mark.skipif("nixl" not in available(), reason="nixl is not installed here")
@pytest.mark.parametrize("direction", ["read", "push"])
def test_a_move_beside_bare_nixl(benchmark: Any, direction: str) -> None:
    built = there_and_back(direction)
    shape = Shape(NBYTES, CHUNK_BYTES)
    bare: List[float] = []
    whole: List[float] = []
    copy: List[float] = []
    with BareNixl(NBYTES, merged=False) as limit, Pool("nixl") as pool:
        seconds = limit.meters["bare nixl read" if direction == "read" else "bare nixl write"]
        run(built, pool=pool)

        def once() -> None:
            bare.extend(seconds(shape) for _ in range(MOVES))
            result = run(built, pool=pool)
            assert result.clean and result.transport is not None and result.transport.startswith("nixl")
            whole.extend(o.duration_ns / 1e9 for o in result.operations if o.what == "move")
            copy.extend((p.copy_ns + p.queue_ns) / 1e9 for p in result.phases)

        benchmark.pedantic(once, rounds=3, warmup_rounds=1)
    print(f"\n512 MiB by {direction}, {len(whole)} moves, {len(bare)} bare transfers, seconds best / median")
    for name, times in (("bare NIXL", bare), ("copy of a move", copy), ("whole move", whole)):
        best, median = min(times), statistics.median(times)
        line = f"  {name:15} {best:.4f} / {median:.4f}   {NBYTES / best / 1e9:5.1f} / {NBYTES / median / 1e9:5.1f} GB/s"
        if times is not bare:
            line += f"   of bare: {min(bare) / best:.2f} / {statistics.median(bare) / median:.2f}"
        print(line)
    benchmark.extra_info["of_bare_median"] = statistics.median(bare) / statistics.median(whole)


def test_pooled_runs(benchmark: Any) -> None:
    """How long a small scenario takes on warm processes: what generated ones cost."""
    from tests.real.scenarios import scenario

    built = scenario()
    with Pool("auto") as pool:
        run(built, pool=pool)
        benchmark.pedantic(lambda: run(built, pool=pool), rounds=10)
    print(f"\na small scenario on warm processes: {benchmark.stats.stats.median * 1000:.0f} ms")
