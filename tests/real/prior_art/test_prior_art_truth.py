"""Prior art: an answer that is not true, data that is lost, and one dead peer that stops everything."""

from __future__ import annotations

import signal
import threading
import time
from typing import Iterator, List

import httpx
import msgspec
import pytest

from tests.real.http.cluster import CPU, NAMESPACE, Workers, eventually
from tests.real.prior_art.town import Town, prompt, within

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]
GONE = ("destination_dead", "destination_restarted", "destination_replaced", "unreachable", "deadline")
GONE_CODES = (409, 504, 503, 404)


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    """``a``, ``b``, two of two ranks, and three that differ from them, in this process; ``far`` is one of its own."""
    found = Town(tmp_path_factory.mktemp("truth"))
    try:
        far = found.instance("far", unfull=False)
        workers: Workers = found.workers
        for name in ("a", "b"):
            workers.add(name)
        for name in ("two", "pair"):
            workers.add(name, ranks=2)
        for name, change in (("chunks", {"chunk_tokens": 32}), ("layers", {"bytes_per_token": 1024}),
                             ("layerwise", {"kv_layout": "layerwise"})):  # fmt: skip
            workers.add(name, namespace=msgspec.structs.replace(NAMESPACE, **change))
        found.cluster.known("a", "b", "two", "pair", "chunks", "layers", "layerwise")
        far.up()
        yield found
    finally:
        found.close()


def test_prior_art_01_destination_fails_after_the_request(town: Town) -> None:
    """Killed, and asked for before anybody could notice: no 200 with tokens that are nowhere. Its next life works."""
    tokens, far = prompt(1_000, 192), town.instances["far"]
    town.cluster.stored("a", tokens)
    far.kill()
    town.fails(town.controller.move("a", "far", tokens), GONE_CODES, GONE)
    assert town.workers.use("a", tokens) == 192
    far.again()
    assert town.controller.held(tokens) == {"a": 192}
    assert town.move("a", "far", tokens)["num_tokens"] == 192
    assert far.complete(tokens) == 192
    assert town.workers.use("a", tokens) == 0


@pytest.mark.parametrize(
    ("name", "field"), [("chunks", "chunk_tokens"), ("layers", "bytes_per_token"), ("layerwise", "kv_layout")]
)
def test_prior_art_01_destination_of_another_form(town: Town, name: str, field: str) -> None:
    """Another chunk size, another number of layers, keys by layer: 409 that names both values, and nothing moves."""
    tokens = prompt(2_000)
    town.cluster.stored("a", tokens)
    answer = town.controller.move("a", name, tokens)
    assert (answer.status_code, answer.json()["reason"]) == (409, "mismatch")
    assert answer.json()["detail"].count(f"{field}=") == 2
    assert town.workers.use("a", tokens) == 200
    assert town.controller.held(tokens) == {"a": 200}


def test_prior_art_04_partial_chunk_settings_differ(town: Town) -> None:
    """``far`` stores no partial chunk of its own; one that is moved there has 12 tokens, and comes back as one."""
    tokens = prompt(4_000, 12)
    town.cluster.stored("a", tokens)
    event = town.move("a", "far", tokens)
    assert (event["num_tokens"], event["bytes"]) == (12, 12 * NAMESPACE.bytes_per_token)
    assert [chunk["num_tokens"] for chunk in event["chunks"]] == [12]
    assert town.controller.held(tokens) == {"far": 12}
    event = town.move("far", "b", tokens)
    assert (event["num_tokens"], town.workers.use("b", tokens)) == (12, 12)


def test_prior_art_05_one_of_two_ranks_destinations_is_dead(town: Town) -> None:
    """All or nothing: no source rank has deleted anything."""
    tokens = prompt(5_000)
    town.cluster.stored("two", tokens)
    town.workers.run(town.workers.ranks["pair"][1].stop())
    town.fails(town.controller.move("two", "pair", tokens), GONE_CODES, GONE)
    assert town.workers.use("two", tokens) == 200
    eventually(lambda: town.controller.held(tokens) == {"two": 200}, 20, "only the source has it")


def test_prior_art_07_client_gave_up(town: Town) -> None:
    """The move ends at its deadline, the client being gone; when its destination returns nothing of it runs."""
    tokens, far = prompt(7_000), town.instances["far"]
    town.cluster.stored("a", tokens)
    far.signal(signal.SIGSTOP)
    try:
        with pytest.raises(httpx.TimeoutException):
            body = {"old_position": ["a", CPU], "new_position": ["far", CPU], "tokens": tokens}
            town.controller.http.post("/move", json={**body, "deadline_s": 0.3, "idempotency_key": "g"}, timeout=0.1)
        events = town.controller.http.get("/events").json()["events"]
        (name,) = [event["event_id"] for event in events if event.get("idempotency_key") == "g"]
        assert town.controller.ended(name)["reason"] in GONE
    finally:
        far.signal(signal.SIGCONT)
    # One that is stopped for so long may have been expelled: it comes back by itself.
    eventually(lambda: "far" in town.controller.instances(), 20)
    assert far.complete(prompt(7_500)) == 0
    assert town.controller.event(name)["state"] == "failed"
    assert town.controller.held(tokens) == {"a": 200}
    assert town.workers.use("a", tokens) == 200


def test_prior_art_11_a_destination_that_does_not_answer_stops_nobody(town: Town) -> None:
    """Its move ends at its deadline, and meanwhile the source moves other things elsewhere."""
    tokens, others, far = prompt(11_000), prompt(11_500), town.instances["far"]
    for one in (tokens, others):
        town.cluster.stored("a", one)
    far.signal(signal.SIGSTOP)
    try:
        begun = time.monotonic()
        answers: List[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(_move(town, "a", "far", tokens, 0.5)))
        asking.start()
        assert town.move("a", "b", others)["num_tokens"] == 200
        asking.join(20)
        assert within(10, begun)
        town.fails(answers[0], GONE_CODES, GONE)
    finally:
        far.signal(signal.SIGCONT)
    assert town.workers.use("b", others) == town.workers.use("a", tokens) == 200


def test_prior_art_11_a_move_to_itself_deletes_nothing(town: Town) -> None:
    tokens = prompt(11_700)
    town.cluster.stored("a", tokens)
    event = town.move("a", "a", tokens)
    assert event["reason"] == "same_place"
    assert {(chunk["destination"], chunk["source"]) for chunk in event["chunks"]} == {("present", "kept")}
    assert town.workers.use("a", tokens) == 200
    assert town.move("a", "b", tokens)["num_tokens"] == 200


def test_prior_art_12_after_a_timeout_and_a_restart_the_next_move_works(town: Town) -> None:
    tokens, far = prompt(12_000, 192), town.instances["far"]
    eventually(lambda: "far" in town.controller.instances(), 20)
    town.cluster.stored("a", tokens)
    far.signal(signal.SIGSTOP)
    answer = town.controller.move("a", "far", tokens, deadline_s=0.2)
    assert (answer.status_code, answer.json()["reason"]) == (504, "deadline")
    far.kill()
    far.again()
    assert town.move("a", "far", tokens)["num_tokens"] == 192
    assert far.complete(tokens) == 192


def test_prior_art_13_source_crashes_mid_move(town: Town) -> None:
    """/move is answered; the source's next life is one that can be moved to and from."""
    tokens, far = prompt(13_000, 192), town.instances["far"]  # whole chunks: it stores no others
    assert far.complete(tokens) == 0
    eventually(lambda: town.controller.held(tokens) == {"far": 192}, 20)
    far.signal(signal.SIGSTOP)  # what is asked of it now is in flight when it dies
    answers: List[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(_move(town, "far", "b", tokens, 20)))
    asking.start()
    eventually(lambda: any(e["state"] == "pinning" for e in town.controller.http.get("/events").json()["events"]), 5)
    far.kill()
    asking.join(20)
    town.fails(answers[0], GONE_CODES, ("source_dead", "source_restarted", "source_replaced"))
    far.again()
    assert town.controller.held(tokens) == {}
    assert far.complete(tokens) == 0
    eventually(lambda: town.controller.held(tokens) == {"far": 192}, 20)
    assert town.move("far", "b", tokens)["num_tokens"] == 192
    assert town.workers.use("b", tokens) == 192


def test_prior_art_14_while_a_move_runs_its_source_beats_and_admits(town: Town) -> None:
    """The move waits for a destination that is stopped; its source is heard all the time, with what it stores."""
    tokens, stored, far = prompt(14_000), prompt(14_500), town.instances["far"]
    town.cluster.stored("a", tokens)
    far.signal(signal.SIGSTOP)
    try:
        answers: List[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(_move(town, "a", "far", tokens, 0.6)))
        asking.start()
        town.cluster.stored("a", stored)
        assert asking.is_alive(), "the move was over before the source had stored anything"
        assert town.controller.post("/health", instance_id="a").json()["error_codes"] == {"0": 0}
        asking.join(20)
        assert answers[0].status_code in GONE_CODES
    finally:
        far.signal(signal.SIGCONT)


def test_prior_art_16_moves_to_one_destination_do_not_wait_for_each_other(town: Town) -> None:
    """One of them cannot go on, as its source is stopped; another to the same destination is done meanwhile."""
    stuck, quick, far = prompt(16_000, 192), prompt(16_500), town.instances["far"]
    eventually(lambda: "far" in town.controller.instances(), 20)
    assert far.complete(stuck) == 0
    eventually(lambda: town.controller.held(stuck) == {"far": 192}, 20)
    town.cluster.stored("a", quick)
    far.signal(signal.SIGSTOP)
    try:
        asking = threading.Thread(target=lambda: _move(town, "far", "b", stuck, 0.6))
        asking.start()
        assert town.move("a", "b", quick)["num_tokens"] == 200
        assert asking.is_alive(), "the first had ended before the second"
        asking.join(20)
    finally:
        far.signal(signal.SIGCONT)


def test_prior_art_20_who_is_dead_is_not_listed(town: Town) -> None:
    far = town.instances["far"]
    eventually(lambda: "far" in town.controller.instances(), 20)
    far.kill()
    eventually(lambda: "far" not in town.controller.instances(), 20, "it is out after its dead time")
    assert town.controller.post("/health", instance_id="far").status_code == 404
    infos = town.controller.post("/query_worker_info", instance_id="all").json()["worker_infos"]
    assert "far" not in {info["instance_id"] for info in infos}
    answer = town.controller.move("a", "far", prompt(20_000))
    assert (answer.status_code, answer.json()["reason"]) == (404, "unknown_instance")
    assert "far" not in answer.json()["known"]


def test_prior_art_06_no_event_is_left_without_an_end(town: Town) -> None:
    """After all of the above: each event can still be asked for, has ended, and no worker holds anything for one."""
    events = town.controller.http.get("/events", params={"limit": 1000}).json()["events"]
    assert events and {event["state"] for event in events} == {"done", "failed"}
    eventually(lambda: not town.workers.pending(), 20, "the workers are quiet")


def _move(town: Town, src: str, dst: str, tokens: List[int], deadline_s: float) -> httpx.Response:
    """From a thread of its own, over a connection of its own."""
    body = {"old_position": [src, CPU], "new_position": [dst, CPU], "tokens": tokens, "deadline_s": deadline_s}
    return httpx.post(f"http://127.0.0.1:{town.controller.port}/move", json=body, timeout=30)
