"""Byte-exact moves over every transport and between every two kinds of memory that this machine has.

    pytest tests/hardware                      64 MiB a move
    KVMOVE_TOKENS=8192 pytest tests/hardware   1 GiB a move

Each move is a whole one: processes, protocol, transport; then the source's memory is overwritten and each process
compares every byte of what it holds. What this machine lacks is skipped by name.
"""

from __future__ import annotations

import os
from typing import Dict

import pytest

pytest.importorskip("zmq", reason="the real world is not installed: pip install 'kvmove[real]'")

from kvcore.scenario.build import Built, build
from kvcore.scenario.loader import loads
from kvreal.pool import Pool
from kvreal.run import run
from tests.hardware.conftest import ROWS, missing

pytestmark = [pytest.mark.real, pytest.mark.hardware]

TOKENS = int(os.environ.get("KVMOVE_TOKENS", "512"))
BYTES_PER_TOKEN = 131072

#: name -> (transport, environment of its processes). UCX takes what UCX_TLS leaves it.
TRANSPORTS = {
    "nixl": ("nixl", {}),
    "nixl tcp": ("nixl", {"UCX_TLS": "tcp"}),
    "nixl rdma": ("nixl", {"UCX_TLS": "rc,cuda_copy"}),
    "tcp": ("tcp", {}),
}
LOCATIONS = ("LocalCPUBackend", "LocalDiskBackend", "LocalGPUBackend")


def scenario(source: str, target: str, direction: str, tokens: int) -> Built:
    """A partial last chunk is part of it: tokens + 100."""
    size = f"{(-(-(tokens + 100) // 256) + 1) * 32} MiB"
    same = source.split("/")[0] == target.split("/")[0]
    places: Dict[str, Dict[str, str]] = {"a": {}, "b": {}}
    for position in (source, target):
        instance, location = position.split("/")
        places[instance][location] = size
    instances = "\n".join(
        f"  {name}: {{locations: {{{', '.join(f'{n}: {s}' for n, s in where.items())}}}}}"
        for name, where in places.items()
        if where or not same
    )
    return build(
        loads(
            f"""
name: {source} to {target} by {direction}
kv: {{model: llama-3.1-8b, chunk: 256 tokens, direction: {direction}}}
deadline: 120 s
instances:
{instances}
steps:
  - store: {{at: {source}, prompt: warm, tokens: 1}}
  - move: {{from: {source}, to: {target}, prompt: warm}}
  - store: {{at: {source}, prompt: p, tokens: {tokens + 100}}}
  - move: {{from: {source}, to: {target}, prompt: p, as: m}}
  - use: {{at: {target}, prompt: p, tokens: {tokens + 100}, as: used}}
""",
            "hardware.yaml",
        )
    )


def pool_of(transport: str, pools: Dict[str, object]) -> Pool:
    name, env = TRANSPORTS[transport]
    if transport not in pools:
        pools[transport] = Pool(name, env=env)
    pool = pools[transport]
    assert isinstance(pool, Pool)
    return pool


def need(*parts: str) -> None:
    for part in parts:
        lack = missing(part)
        if lack:
            pytest.skip(f"{part}: {lack}")


def move(source: str, target: str, direction: str, transport: str, pools: Dict[str, object]) -> str:
    """Move, check, note the row; what carried the bytes."""
    built = scenario(source, target, direction, TOKENS)
    result = run(built, pool=pool_of(transport, pools))
    assert result.clean, (result.violations, result.hung)
    assert [(o.op, o.state) for o in result.operations if o.op in ("m", "used")] == [("m", "done"), ("used", "ok")]
    nbytes = (TOKENS + 100) * BYTES_PER_TOKEN
    assert int(result.metrics["bytes_checked"]) == nbytes + BYTES_PER_TOKEN
    assert result.placement == {target: {"p": TOKENS + 100, "warm": 1}}
    (phases,) = [p for p in result.phases if p.op == "m"]
    assert phases.bytes == nbytes and result.transport is not None
    speed = nbytes / phases.copy_ns
    ROWS.append(
        (
            transport, source, target, direction, result.transport, f"{nbytes / 2**20:.0f}", f"{speed:.2f}",
            str(result.metrics["bytes_checked"]),
        )
    )  # fmt: skip
    return result.transport


@pytest.mark.parametrize("direction", ["read", "push"])
@pytest.mark.parametrize("target", LOCATIONS)
@pytest.mark.parametrize("source", LOCATIONS)
@pytest.mark.parametrize("transport", list(TRANSPORTS))
def test_between_instances(
    transport: str, source: str, target: str, direction: str, pools: Dict[str, object]
) -> None:
    need(transport, source, target)
    if "LocalGPUBackend" in (source, target) and transport == "tcp":
        pytest.skip("LocalGPUBackend: the tcp transport does not reach GPU memory; nixl does")
    if "LocalDiskBackend" in (source, target) and transport == "nixl rdma":
        pytest.skip("LocalDiskBackend: an RDMA device cannot register a file's pages")
    carried = move(f"a/{source}", f"b/{target}", direction, transport, pools)
    if transport == "nixl tcp":
        assert carried == "nixl/ucx/tcp"
    elif transport == "tcp":
        assert carried == "tcp"
    elif transport == "nixl rdma":
        assert "rc" in carried
    else:
        assert carried.startswith("nixl/ucx/") and "unknown" not in carried


@pytest.mark.parametrize(("source", "target"), [(a, b) for a in LOCATIONS for b in LOCATIONS if a != b])
def test_between_tiers_of_one_instance(source: str, target: str, pools: Dict[str, object]) -> None:
    need(source, target)
    assert move(f"a/{source}", f"a/{target}", "read", "tcp", pools) == "memcpy"
