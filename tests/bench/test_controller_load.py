"""64 clients with lookups and moves while instances restart: no 5xx that is not a true answer, no hang, memory flat."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("zmq")

import httpx

from tests.real.http.cluster import CPU, Cluster, cluster, eventually

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]
CLIENTS = 64
WARM_S = 4.0
SECONDS = float(os.environ.get("KVMOVE_LOAD_S", "20"))
NAMES = ("a", "b", "c", "d")
#: What may be answered, and with which reasons: an instance that is away, a move that it has ended, no room.
TRUE: Dict[int, Tuple[str, ...]] = {
    200: ("", "nothing_held"),
    404: ("unknown_instance",),
    409: (
        "source_dead", "source_restarted", "source_replaced", "destination_dead", "destination_restarted",
        "destination_replaced", "source_cleared", "pin_lost", "copy_failed", "source_gone", "destination_gone",
    ),
    503: ("not_ready",),
    504: ("deadline", "unreachable"),
    507: ("full",),
}  # fmt: skip


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def prompts() -> List[List[int]]:
    return [list(range(number * 1000, number * 1000 + 200)) for number in range(40)]


async def client(url: str, until: float, seed: int, seen: Counter[Any], slowest: List[float]) -> None:
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        while time.monotonic() < until:
            tokens = rng.choice(prompts_made)
            begun = time.monotonic()
            if rng.random() < 0.5:
                answer = await http.post("/lookup", json={"tokens": tokens})
                what = "lookup"
            else:
                src, dst = rng.sample(NAMES, 2)
                body = {"old_position": [src, CPU], "new_position": [dst, CPU], "tokens": tokens, "deadline_s": 5}
                answer = await http.post("/move", json=body)
                what = "move"
            slowest[0] = max(slowest[0], time.monotonic() - begun)
            seen[what, answer.status_code, answer.headers.get("kvmove-reason", "")] += 1
            await asyncio.sleep(0.02)


prompts_made = prompts()


async def load(found: Cluster, seconds: float, restart: bool) -> Tuple[Counter[Any], float]:
    url = f"http://127.0.0.1:{found.controller.port}"
    until = time.monotonic() + seconds
    seen: Counter[Any] = Counter()
    slowest = [0.0]
    clients = [asyncio.create_task(client(url, until, seed, seen, slowest)) for seed in range(CLIENTS)]

    def again(name: str) -> None:
        found.workers.remove(name)
        found.workers.add(name)
        for tokens in prompts_made[NAMES.index(name) :: len(NAMES)]:
            found.workers.store(name, tokens)

    turn = 0
    while restart and time.monotonic() < until - 2:
        await asyncio.sleep(1.5)
        await asyncio.to_thread(again, NAMES[turn % len(NAMES)])
        turn += 1
    await asyncio.gather(*clients)
    return seen, slowest[0]


def test_64_clients_while_instances_restart(tmp_path: Path) -> None:
    found = cluster(tmp_path, "--events-kept", "1000")
    try:
        for name in NAMES:
            found.workers.add(name, slots=256)
        found.known(*NAMES)
        for number, tokens in enumerate(prompts_made):
            found.workers.store(NAMES[number % len(NAMES)], tokens)
        assert found.controller.process is not None
        pid = found.controller.process.pid
        asyncio.run(load(found, WARM_S, False))
        before = resident_bytes(pid)
        seen, slowest_s = asyncio.run(load(found, SECONDS, True))
        after = resident_bytes(pid)
        total = sum(seen.values())
        print(f"\n64 clients, {SECONDS:.0f} s, instances restarting: {total} answers, slowest {slowest_s:.2f} s, "
              f"memory {before >> 20} -> {after >> 20} MiB")  # fmt: skip
        for (what, status, reason), count in sorted(seen.items()):
            print(f"  {what} {status} {reason or 'ok'}: {count}")
        untrue = {key: count for key, count in seen.items() if key[2] not in TRUE.get(key[1], ())}
        assert untrue == {}
        assert {key[1] for key in seen if key[0] == "lookup"} == {200}
        assert slowest_s < 15, "a deadline of 5 s, and what it takes to undo"
        assert after < before * 1.25 + (8 << 20), (before, after)
        found.known(*NAMES)
        eventually(lambda: not found.workers.pending(), 30, "every move has ended, at every worker")
        events = found.controller.http.get("/events", params={"limit": 1000}).json()["events"]
        assert {event["state"] for event in events} <= {"done", "failed"}
    finally:
        found.close()
