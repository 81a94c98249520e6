"""A small router: a prompt goes to the engine that holds most of it, or its KV is moved ahead to one that is free.

    router = Router("http://localhost:9000", {"one": "http://localhost:8000", "two": "http://localhost:8001"})
    choice = router.choose(tokens)          # which engine, and what was moved for it
    with router.serving(choice.engine): ...

The controller is asked what each instance holds of the prompt (``/lookup``), and, before a move, what it would cost
(``/move`` with ``dry_run``). How busy an engine is the router knows itself: it counts what it has sent there.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Dict, Iterator, Mapping, NamedTuple, Sequence

import httpx

CPU = "LocalCPUBackend"


class Choice(NamedTuple):
    engine: str
    held: int
    """Tokens of the prompt that it holds, or will when the move has ended."""
    moved: int = 0
    event_id: str = ""


class Router:
    """``busy``: how many requests an engine may have before others are asked; ``worth``: from how many tokens on a
    move is considered."""

    def __init__(self, controller: str, engines: Mapping[str, str], busy: int = 1, worth: int = 256) -> None:
        self.api: httpx.Client = httpx.Client(base_url=controller, timeout=60.0)
        self.engines: Dict[str, str] = dict(engines)
        self.running: Dict[str, int] = dict.fromkeys(engines, 0)
        self.busy: int = busy
        self.worth: int = worth
        self.lock: threading.Lock = threading.Lock()

    def choose(self, tokens: Sequence[int], wait_s: float = 30.0) -> Choice:
        """Where to send the prompt. A move that was begun for it has ended (or failed: then nothing is held there)."""
        held = self.held(tokens)
        best = max(self.engines, key=lambda name: (held[name], -self.running[name]))
        free = min(self.engines, key=lambda name: (self.running[name], -held[name]))
        if self.running[best] < self.busy or free == best:
            return Choice(best, held[best])
        if held[best] - held[free] < self.worth or not self.pays(best, free, tokens):
            return Choice(free, held[free])
        answer = self.api.post("/move", json=self.body(best, free, tokens)).json()
        if "event_id" not in answer:
            return Choice(free, held[free])
        ended = self.api.get(f"/events/{answer['event_id']}/wait", params={"timeout": wait_s}).json()
        done = ended.get("state") == "done"
        moved = answer["num_tokens"] if done else 0
        return Choice(free, max(moved, held[free]), moved, answer["event_id"])

    def held(self, tokens: Sequence[int]) -> Dict[str, int]:
        found = self.api.post("/lookup", json={"tokens": list(tokens)}).raise_for_status().json()["locations"]
        return {name: max(found.get(name, {}).values(), default=0) for name in self.engines}

    def pays(self, src: str, dst: str, tokens: Sequence[int]) -> bool:
        """Is moving it quicker than computing it again?"""
        answer = self.api.post("/move", json={**self.body(src, dst, tokens), "dry_run": True})
        return answer.status_code == 200 and not answer.json()["recompute_is_quicker"]

    def body(self, src: str, dst: str, tokens: Sequence[int]) -> Dict[str, object]:
        """A copy: the engine that is busy now may get the next one."""
        return {"old_position": [src, CPU], "new_position": [dst, CPU], "tokens": list(tokens), "copy": True}

    @contextlib.contextmanager
    def serving(self, engine: str) -> Iterator[str]:
        """Counts a request while it runs; yields the engine's URL."""
        with self.lock:
            self.running[engine] += 1
        try:
            yield self.engines[engine]
        finally:
            with self.lock:
                self.running[engine] -= 1
