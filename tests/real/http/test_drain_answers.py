"""What /drain and a move of everything answer: alike each time, never 200 for a failure, all locations or none."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import pytest

from kvcore.protocol.chunks import chunk_keys
from kvcore.protocol.messages import StoreRequest
from tests.real.http.cluster import CPU, Cluster, cluster, eventually

pytestmark = pytest.mark.real
DISK = "LocalDiskBackend"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = cluster(tmp_path_factory.mktemp("drains"))
    try:
        found.workers.add("a", ranks=2)
        found.workers.add("b", ranks=2)
        found.workers.add("c", places=(CPU, DISK))
        found.workers.add("d", places=(CPU, DISK))
        found.known("a", "b", "c", "d")
        yield found
    finally:
        found.close()


def test_a_drain_that_fails_at_once_fails_each_time(shared: Cluster) -> None:
    """Rank 1 lacks what rank 0 holds: there is nothing whole to move, and something is left."""
    controller = shared.controller
    rank = shared.workers.ranks["a"][0]
    keys, lens = chunk_keys(rank.spec.namespace, range(100))  # type: ignore[union-attr]
    shared.workers.run(rank.ask(StoreRequest("", CPU, keys, lens), 20))
    held = "/instances"
    eventually(lambda: '"chunks":2' in controller.http.get(held).text, what="the controller knows rank 0's chunks")
    for path, body in (
        ("/drain", {"instance_id": "a", "to": ["b"], "idempotency_key": "d"}),
        ("/move", {"old_position": ["a", CPU], "new_position": ["b", CPU], "idempotency_key": "m"}),
    ):
        answers = [controller.post(path, **body) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [409, 409]
        assert answers[0].json() == answers[1].json()
        assert answers[0].json()["reason"] == "incomplete"
        assert controller.event(answers[0].json()["event_id"])["state"] == "failed"


def test_a_drain_of_nothing_says_so_each_time(shared: Cluster) -> None:
    answers = [shared.controller.post("/drain", instance_id="d", to=["c"], idempotency_key="none") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert answers[0].json()["num_tokens"] == 0
    assert [answer.headers["kvmove-reason"] for answer in answers] == ["nothing_held"] * 2


def test_a_drain_of_two_locations_is_one_event_with_the_sum_of_both(shared: Cluster) -> None:
    controller = shared.controller
    shared.stored("c", range(1000, 1100))
    assert shared.workers.store("c", range(2000, 2064), DISK) == 64
    eventually(lambda: controller.held(range(2000, 2064)).get("c") == 64)
    answer = controller.post("/drain", instance_id="c", to=["d"]).json()
    event = controller.ended(answer["event_id"])
    parts = [controller.event(name) for name in event["children"]]
    assert (event["state"], event["num_tokens"]) == ("done", 164)
    # of whole prompts nothing was there before, so all of it was copied: 512 bytes a token
    assert [part["bytes"] for part in parts] == [100 * 512, 64 * 512]
    assert (event["bytes"], event["transport"]) == (164 * 512, parts[0]["transport"])
    assert set(event["phases_s"]) == {"pinning", "reserving", "copying", "releasing"}
    assert event["duration_s"] == pytest.approx(event["ended"] - event["begun"])
    assert event["progress"]["moved_tokens"] == 164


def test_a_key_that_is_used_for_something_else_is_told_what_differs(shared: Cluster) -> None:
    shared.stored("a", range(64))
    first = shared.controller.move("a", "b", range(64), copy=True, idempotency_key="k")
    assert first.status_code == 200
    for change, words in (
        ({"copy": False}, "copy was true, is false"),
        ({"if_room": True}, "if_room was false, is true"),
        ({"tokens": [5]}, "tokens were 64 tokens, are 1 tokens, and not the same"),
        ({"new_position": ["a", CPU]}, f"new_position was b/{CPU}, is a/{CPU}"),
    ):
        body = {
            "old_position": ["a", CPU], "new_position": ["b", CPU], "tokens": list(range(64)), "copy": True,
            "idempotency_key": "k", **change,
        }  # fmt: skip
        other = shared.controller.post("/move", **body)
        assert (other.status_code, other.json()["reason"]) == (422, "idempotency_key_reused")
        assert words in other.json()["detail"]
        assert first.json()["event_id"] in other.json()["detail"]


def test_every_event_id_that_was_answered_is_known(shared: Cluster) -> None:
    """Of a clear, and of a pin of nothing, too."""
    controller = shared.controller
    shared.stored("d", range(5000, 5064))
    place = {"instance_id": "d", "location": CPU}
    cleared = controller.post("/clear", **place).json()
    event = controller.event(cleared["event_id"])
    assert (event["kind"], event["state"], event["num_tokens"]) == ("clear", "done", cleared["num_tokens"])
    assert event["num_tokens"] >= 64
    pinned = controller.post("/pin", **place, tokens=[1, 2, 3])
    assert pinned.headers["kvmove-reason"] == "nothing_held"
    event = controller.event(pinned.json()["event_id"])
    assert (event["kind"], event["state"], event["reason"], event["num_tokens"]) == ("pin", "failed", "nothing_held", 0)
    assert controller.post("/check_finish", event_id=cleared["event_id"]).json() == {"status": "done", "reason": ""}
    assert controller.http.delete(f"/events/{cleared['event_id']}").status_code == 409


def test_a_pin_of_what_is_not_there_any_more_is_over(shared: Cluster) -> None:
    """Its place was cleared, or its process ended: nothing is held, and the event must not say so."""
    controller = shared.controller
    shared.workers.add("e")
    shared.known("e")
    for what, reason in (("clear", "cleared"), ("restart", "restarted")):
        shared.stored("e", range(6000, 6064))
        place = {"instance_id": "e", "location": CPU}
        pinned = controller.post("/lease", **place, tokens=list(range(6000, 6064)), seconds=300).json()
        assert (pinned["num_tokens"], controller.event(pinned["event_id"])["state"]) == (64, "held")
        if what == "clear":
            assert controller.post("/clear", **place).status_code == 200
        else:
            shared.workers.remove("e")
            shared.workers.add("e")
        eventually(lambda name=pinned["event_id"]: controller.event(name)["state"] == "done", what="the pin is over")
        assert controller.event(pinned["event_id"])["reason"] == reason
        assert controller.post("/unpin", event_id=pinned["event_id"]).status_code == 409


def test_a_drain_of_two_locations_begins_whole_or_not_at_all(tmp_path: Path) -> None:
    """One event may be in flight, and there are two locations: refused, and nothing has begun."""
    found = cluster(tmp_path, "--events-max", "1")
    try:
        for name in ("a", "b"):
            found.workers.add(name, places=(CPU, DISK))
        found.known("a", "b")
        found.stored("a", range(64))
        answer = found.controller.post("/drain", instance_id="a", to=["b"], idempotency_key="d")
        assert (answer.status_code, answer.json()["reason"]) == (429, "busy")
        assert found.controller.http.get("/events").json()["events"] == []
    finally:
        found.close()
