"""SIGKILL before every effect of a move and of a copy, over two ranks: what was sent before has arrived, or has not."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.real.http.cluster import CPU, MS, QUICK, ROOT, Cluster, Controller, Workers, eventually

pytestmark = pytest.mark.real
LAST = 40
ENDED = ("done", "failed")


class Mother:
    """The process that lives are forked from."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.real.http.forked"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, bufsize=1,
        )  # fmt: skip

    def ask(self, line: str) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


class Lives(Controller):
    """A controller whose lives are forked; each writes to a file of its own."""

    def __init__(self, folder: Path, mother: Mother) -> None:
        super().__init__(folder)
        self.mother = mother
        self.pid = 0
        self.count = 0

    def begin(self, die_before: int, flush: bool) -> None:
        self.count += 1
        out = self.folder / f"life-{self.count}"
        sets = [f"--set={name[:-3]}={getattr(QUICK, name) // MS} ms" for name in QUICK.__struct_fields__ if _set(name)]
        ports = json.dumps({"pull": self.pull, "reply": self.reply})
        argv = ["controller", "--port", str(self.port), "--monitor-ports", ports, "--journal", str(self.journal), *sets]
        command = {"argv": argv, "out": str(out), "die_before": die_before, "flush": flush}
        self.pid = self.mother.ask(json.dumps(command))
        eventually(self._ready, 20, f"life {self.count} is ready")

    def said(self) -> str:
        return (self.folder / f"life-{self.count}").read_text()

    def ended_by(self) -> int:
        """The signal by which the life that runs ends; waits for that."""
        self.pid = 0
        return os.WTERMSIG(self.mother.ask(""))

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.ended_by()
        self.http.close()


def _set(name: str) -> bool:
    return name.endswith("_ns") and name not in ("events_kept_ns", "hold_ns")


@pytest.fixture(scope="module")
def mother() -> Iterator[Mother]:
    found = Mother()
    yield found
    found.close()


def moved(lives: Lives, tokens: list[int], key: str, copy: bool) -> httpx.Response | None:
    """None: nobody answered."""
    try:
        return lives.move("a", "b", tokens, idempotency_key=key, copy=copy)
    except httpx.TransportError:
        return None


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "copy, flush", [(False, True), (False, False), (True, True)], ids=["move", "move, last message lost", "copy"]
)
def test_prior_art_06_every_answer_stays_true(tmp_path: Path, mother: Mother, copy: bool, flush: bool) -> None:
    lives = Lives(tmp_path, mother)
    found = Cluster(lives, Workers(f"127.0.0.1:{lives.pull}"))
    states: Counter[str] = Counter()
    died: list[str] = []
    try:
        lives.begin(1, flush)
        for name in ("a", "b"):
            found.workers.add(name, ranks=2)
        for at in range(1, LAST):
            found.known("a", "b")
            tokens = list(range(at * 1000, at * 1000 + 200))
            found.stored("a", tokens)
            answer = moved(lives, tokens, f"key-{at}", copy)
            if answer is not None and answer.status_code == 200:
                lives_on(lives, answer)
            if "dies before" not in lives.said():
                break
            died.append(lives.said().rpartition("dies before ")[2].split()[0])
            assert lives.ended_by() == signal.SIGKILL
            lives.begin(at + 1, flush)
            event = after(lives, tokens, f"key-{at}", answer, copy)
            states[event["state"] if event else "never begun"] += 1
            held(found, tokens, event, copy)
        assert died[:1] == ["Begin"]
        for kind in ("Begin", "Pin", "Fetch", "Promised", "Answer", "Decide", "Release", "Outcome"):
            assert kind in died, died
        assert died.count("Pin") == died.count("Fetch") == died.count("Release") == 2, died
        assert set(states) == {"never begun", "failed", "done"}, states
        nothing_leaks(found)
    finally:
        found.close()


def lives_on(lives: Lives, answer: httpx.Response) -> None:
    """Until the event has ended, or its controller has."""
    with contextlib.suppress(httpx.TransportError):
        lives.http.get(f"/events/{answer.json()['event_id']}/wait", params={"timeout": 20})


def after(
    lives: Lives, tokens: list[int], key: str, answer: httpx.Response | None, copy: bool
) -> dict[str, Any] | None:
    """The event as the next life knows it, ended, and agreeing with what was answered before. None: it never began."""
    events = [event for event in lives.http.get("/events").json()["events"] if event.get("idempotency_key") == key]
    if not events:
        assert answer is None
        return None
    assert len(events) == 1, events
    name = events[0]["event_id"]
    event = lives.ended(name)
    assert lives.event(name)["state"] == event["state"]
    again = moved(lives, tokens, key, copy)
    assert again is not None
    if answer is not None and answer.status_code == 200:
        assert answer.json() == {"num_tokens": 200, "event_id": name}
        assert (again.status_code, again.json()) == (200, answer.json()), (event, again.text)
    elif event["state"] == "done":
        assert (again.status_code, again.json()) == (200, {"num_tokens": 200, "event_id": name})
    if event["state"] == "failed":
        assert event["reason"] == "controller_restarted", event
    return event


def held(found: Cluster, tokens: list[int], event: dict[str, Any] | None, copy: bool) -> None:
    """Every byte is where the answer says; reading compares them all."""
    here = {name: found.workers.use(name, tokens) for name in ("a", "b")}
    there = {name: count for name, count in here.items() if count}
    eventually(lambda: found.controller.held(tokens) == there, 20, f"the controller sees {there}")
    if event is None or event["state"] == "failed":
        assert here["a"] == 200, (here, event)
        return
    assert here["b"] == 200, (here, event)
    if copy:
        assert here["a"] == 200, (here, event)
    else:
        deleted = [rank["deleted"] for rank in event["ranks"]]
        kept = [rank["kept"] for rank in event["ranks"]]
        assert here["a"] == (0 if 4 in deleted else here["a"]), (here, event)
        if deleted == [0, 0] and kept == [4, 4]:
            assert here["a"] == 200, (here, event)


def nothing_leaks(found: Cluster) -> None:
    """Once all leases have run out, a slot is in use for what is visible and for nothing else."""
    eventually(lambda: not found.workers.pending(), 20, "the workers are quiet")

    async def pools() -> list[Any]:
        return [
            (len(pool.index), sorted(pool.refs.values()), pool.moving, pool.user, pool.retained)
            for services in found.workers.ranks.values()
            for service in services
            for pool in service.machine.pools.values()  # type: ignore[attr-defined]
        ]

    for index, refs, moving, user, retained in found.workers.run(pools()):
        assert refs == [1] * index
        assert (moving, user, retained) == ({}, {}, {})


def test_the_view_converges_while_moves_go_on(tmp_path: Path, mother: Mother) -> None:
    """Six prompts wander between two instances through five lives of the controller; none is lost."""
    lives = Lives(tmp_path, mother)
    found = Cluster(lives, Workers(f"127.0.0.1:{lives.pull}"))
    prompts = [list(range(n * 1000, n * 1000 + 200)) for n in range(6)]
    enough = threading.Event()
    ended: Counter[str] = Counter()
    try:
        lives.begin(0, True)
        for name in ("a", "b"):
            found.workers.add(name, ranks=2)
        found.known("a", "b")
        for tokens in prompts:
            found.stored("a", tokens)
        threads = [
            threading.Thread(target=wander, args=(f"http://127.0.0.1:{lives.port}", tokens, enough, ended), daemon=True)
            for tokens in prompts
        ]
        for thread in threads:
            thread.start()
        for life in range(4):
            before = ended["done"]
            eventually(lambda before=before: ended["done"] >= before + 5, 20, f"moves go on in life {life}")
            os.kill(lives.pid, signal.SIGKILL)
            assert lives.ended_by() == signal.SIGKILL
            lives.begin(0, True)
        enough.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        found.known("a", "b")
        nothing_leaks(found)
        for tokens in prompts:
            here = {name: found.workers.use(name, tokens) for name in ("a", "b")}
            assert max(here.values()) == 200, here
            expected = {name: count for name, count in here.items() if count}
            eventually(lambda tokens=tokens, expected=expected: lives.held(tokens) == expected, 10, f"{expected}")
            # A move that a death failed may leave a copy behind; the next one takes the source with it.
            src, dst = ("a", "b") if here["a"] == 200 else ("b", "a")
            assert lives.ended(lives.move(src, dst, tokens).json()["event_id"])["state"] == "done"
            assert (found.workers.use(src, tokens), found.workers.use(dst, tokens)) == (0, 200)
        assert not [event for event in lives.http.get("/events").json()["events"] if event["state"] not in ENDED]
    finally:
        enough.set()
        found.close()


def wander(url: str, tokens: list[int], enough: threading.Event, ended: Counter[str]) -> None:
    """Move one prompt to and fro; each request is repeated under its key until somebody answers."""
    places = ["a", "b"]
    with httpx.Client(base_url=url, timeout=20) as http:
        for turn in itertools.count():
            body = {
                "old_position": [places[0], CPU], "new_position": [places[1], CPU], "tokens": tokens,
                "idempotency_key": f"{tokens[0]}-{turn}",
            }  # fmt: skip
            state = ""
            while not enough.is_set() and state not in ENDED:
                with contextlib.suppress(httpx.TransportError):
                    answer = http.post("/move", json=body).json()
                    if answer.get("event_id"):
                        event = http.get(f"/events/{answer['event_id']}/wait", params={"timeout": 20}).json()
                        state = event.get("state", "")
            if enough.is_set():
                return
            ended[state] += 1
            if state == "done":
                places.reverse()
