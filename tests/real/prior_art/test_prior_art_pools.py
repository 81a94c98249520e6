"""Prior art: pages that nothing ever frees, questions that are answered 500, and gaps that nobody repairs."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator, List

import httpx
import msgspec
import pytest
import zmq

from tests.real.http.cluster import CPU, Cluster, cluster, eventually
from tests.real.prior_art.town import prompt

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]
CHUNK = 64
SLOTS = 8


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """``a`` and ``b`` have room for eight chunks, ``c`` and ``d`` for 64."""
    found = cluster(tmp_path_factory.mktemp("pools"))
    try:
        for name in ("a", "b"):
            found.workers.add(name, slots=SLOTS)
        for name in ("c", "d"):
            found.workers.add(name)
        found.known("a", "b", "c", "d")
        yield found
    finally:
        found.close()


def moved(found: Cluster, src: str, dst: str, tokens: List[int]) -> None:
    answer = found.controller.move(src, dst, tokens)
    assert answer.status_code == 200, answer.text
    event = found.controller.ended(answer.json()["event_id"])
    assert (event["state"], event["num_tokens"]) == ("done", len(tokens)), event
    eventually(lambda: found.controller.held(tokens) == {dst: len(tokens)}, 20, "the source has deleted")


def test_prior_art_08_source_pages_are_free_after_moves(shared: Cluster) -> None:
    """160 chunks moved out of pools of eight: all eight can be filled again, each with bytes that are its own."""
    tokens = prompt(8_000, SLOTS * CHUNK)
    shared.stored("a", tokens)
    for turn in range(20):
        moved(shared, *(("a", "b") if turn % 2 == 0 else ("b", "a")), tokens)
    assert shared.workers.use("a", tokens) == len(tokens)
    for name, first in (("b", 8_600), ("a", 9_200)):  # a's are evicted by as many others
        fresh = prompt(first, SLOTS * CHUNK)
        assert shared.workers.store(name, fresh) == len(fresh)
        assert shared.workers.use(name, fresh) == len(fresh)
    eventually(lambda: not shared.workers.pending(), 20, "nothing is held")


def test_prior_art_09_chunks_that_were_moved_in_can_be_evicted_and_cleared(shared: Cluster) -> None:
    tokens, more, kept = prompt(9_800, SLOTS * CHUNK), prompt(10_400, SLOTS * CHUNK), prompt(11_000, SLOTS * CHUNK)
    shared.controller.post("/clear", instance_id="b", location=CPU)
    for one in (tokens, kept):
        shared.stored("c", one)
    moved(shared, "c", "b", tokens)
    # Until b has heard that the event is over it keeps them: its client may hear so first.
    eventually(lambda: not shared.workers.pending(), 20, "nothing is retained")
    assert shared.workers.store("b", more) == len(more)
    assert (shared.workers.use("b", more), shared.workers.use("b", tokens)) == (len(more), 0)
    moved(shared, "c", "b", kept)
    answer = shared.controller.post("/clear", instance_id="b", location=CPU)
    assert (answer.status_code, answer.json()["num_tokens"]) == (200, len(kept))
    assert shared.workers.use("b", kept) == 0
    assert shared.workers.store("b", tokens) == len(tokens)


def test_prior_art_15_concurrent_operations_on_one_source(shared: Cluster) -> None:
    """The reference's own measure: four at a time, 400 moves in all and as many health calls; none is answered 5xx."""
    prompts = [prompt(100_000 + number * 100, CHUNK) for number in range(16)]
    for one in prompts:
        shared.stored("c", one)
    url = f"http://127.0.0.1:{shared.controller.port}"

    def client(number: int) -> Counter[object]:
        seen: Counter[object] = Counter()
        with httpx.Client(base_url=url, timeout=30) as http:
            for turn in range(50):
                src, dst = ("c", "d") if turn % 2 == 0 else ("d", "c")
                tokens = prompts[number * 4 + turn % 4]
                body = {"old_position": [src, CPU], "new_position": [dst, CPU], "tokens": tokens}
                seen["move", http.post("/move", json=body).status_code] += 1
                seen["health", http.post("/health", json={"instance_id": "c"}).status_code] += 1
        return seen

    with ThreadPoolExecutor(4) as pool:
        seen = sum(pool.map(client, range(4)), Counter[object]())
    assert seen == {("move", 200): 200, ("health", 200): 200}
    eventually(lambda: not shared.workers.pending(), 20, "all moves have ended")
    for one in prompts:
        at = {name: shared.workers.use(name, one) for name in ("c", "d")}
        assert max(at.values()) == CHUNK, at


def test_prior_art_21_a_failure_has_its_own_reason(shared: Cluster) -> None:
    """What went wrong, in a word for programs and a line for people, in the answer and in the event."""
    tokens, kept = prompt(21_000), prompt(21_500, SLOTS * CHUNK)
    for name in ("a", "b"):
        shared.controller.post("/clear", instance_id=name, location=CPU)
    shared.stored("c", tokens)
    shared.stored("a", kept)
    pin = shared.controller.post("/pin", instance_id="a", location=CPU, tokens=kept).json()["event_id"]
    answer = shared.controller.move("c", "a", tokens)
    body = answer.json()
    assert (answer.status_code, body["reason"]) == (507, "full")
    event = shared.controller.event(body["event_id"])
    assert (event["state"], event["reason"]) == ("failed", "full")
    assert "not supported" not in body["detail"] and body["detail"]
    assert shared.controller.post("/unpin", event_id=pin).status_code == 200
    moved(shared, "c", "a", tokens)


def test_prior_art_23_a_gap_in_what_was_heard_is_repaired(shared: Cluster) -> None:
    """A worker's inventory moves on unheard: the next beat tells, and the whole of it is asked for."""
    tokens = prompt(23_000)
    (service,) = shared.workers.ranks["d"]
    real = service.network.send

    def deaf(dst: str, message: object, *rest: object) -> object:
        return None if type(message).__name__ == "Delta" else real(dst, message, *rest)  # type: ignore[arg-type]

    service.network.send = deaf  # type: ignore[method-assign,assignment]
    try:
        assert shared.workers.store("d", tokens) == 200
        eventually(lambda: shared.controller.held(tokens) == {"d": 200}, 10, "the gap is repaired")
    finally:
        service.network.send = real  # type: ignore[method-assign]


def test_prior_art_17_after_malformed_frames_the_registry_still_hears(shared: Cluster) -> None:
    tokens = prompt(17_000)
    with zmq.Context() as context, context.socket(zmq.PUSH) as sock:
        sock.setsockopt(zmq.LINGER, 1000)
        sock.connect(f"tcp://127.0.0.1:{shared.controller.pull}")
        for junk in (b"", b"\xc1" * 100, b"\x80" * 4096, msgspec.msgpack.encode({"type": "KVAdmitMsg", "key": 1})):
            sock.send_multipart([junk, junk])
    shared.stored("d", tokens)
    moved(shared, "d", "c", tokens)
