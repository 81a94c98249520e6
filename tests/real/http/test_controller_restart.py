"""SIGKILL of the controller, at every effect of a move and in between: every answer stays true, and nothing is lost."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Iterator, List

import httpx
import pytest

from tests.real.http.cluster import CPU, Cluster, cluster, eventually

pytestmark = pytest.mark.real


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Cluster]:
    found = cluster(tmp_path)
    try:
        found.workers.add("a")
        found.workers.add("b")
        found.known("a", "b")
        yield found
    finally:
        found.close()


def prompt(first: int, count: int = 200) -> List[int]:
    return list(range(first, first + count))


def test_events_instances_and_keys_survive_a_sigkill(two: Cluster) -> None:
    controller = two.controller
    tokens = prompt(0)
    two.stored("a", tokens)
    done = controller.move("a", "b", tokens, idempotency_key="k").json()
    before = controller.ended(done["event_id"])
    failed = controller.move("a", "b", prompt(500)).json()["event_id"]
    lease = controller.post("/lease", instance_id="b", location=CPU, tokens=tokens, seconds=60).json()["event_id"]
    controller.kill()
    line = controller.start()
    assert "incarnation 2" in line
    after = controller.event(done["event_id"])
    assert (after["state"], after["num_tokens"]) == ("done", 200)
    # All of it: ranks, chunks, bytes, times.
    assert after == before
    event = controller.event(failed)
    assert (event["state"], event["reason"]) == ("failed", "nothing_held")
    assert controller.event(lease)["state"] == "held"
    # Before the workers have been heard again nobody is told that they are unknown.
    again = controller.move("a", "b", tokens, idempotency_key="k")
    assert (again.status_code, again.json()) == (200, done)
    two.known("a", "b")
    eventually(lambda: controller.held(tokens) == {"b": 200}, 20, "the view is whole again")
    assert controller.post("/unpin", event_id=lease).status_code == 200
    new = controller.ended(controller.move("b", "a", tokens).json()["event_id"])
    assert new["event_id"].startswith("2-")
    assert new["state"] == "done"
    assert two.workers.use("a", tokens) == 200


def test_an_instance_not_heard_since_a_restart_is_503_then_404(two: Cluster) -> None:
    controller = two.controller
    two.workers.remove("b")
    controller.kill()
    controller.start("--set=dead=2 s")
    answer = controller.move("a", "b", prompt(0))
    assert (answer.status_code, answer.json()["reason"]) == (503, "not_ready")
    assert "b" in two.controller.post("/lookup", tokens=list(prompt(0))).headers["Kvmove-Awaited"].split(",")
    assert answer.headers["retry-after"]
    eventually(lambda: controller.move("a", "b", prompt(0)).status_code == 404, 20, "it is not waited for any more")


def test_a_pin_whose_instance_is_not_heard_since_a_restart_is_503_and_still_held(two: Cluster) -> None:
    controller = two.controller
    two.stored("b", prompt(0))
    where = {"instance_id": "b", "location": CPU, "tokens": prompt(0)}
    lease = controller.post("/lease", **where, seconds=60).json()["event_id"]
    pin = controller.post("/pin", **where).json()["event_id"]
    two.workers.remove("b")
    controller.kill()
    controller.start("--set=dead=20 s")
    renewed = controller.post("/lease", event_id=lease, seconds=60)
    unpinned = controller.post("/unpin", event_id=pin)
    for answer in (renewed, unpinned):
        assert (answer.status_code, answer.json()["reason"]) == (503, "not_ready"), answer.text
        assert answer.headers["retry-after"]
    assert [controller.event(event)["state"] for event in (lease, pin)] == ["held", "held"]


def test_an_instance_that_restarts_is_a_new_epoch_and_its_move_fails(two: Cluster) -> None:
    controller = two.controller
    (first,) = [one for one in controller.http.get("/instances").json()["instances"] if one["instance_id"] == "b"]
    two.workers.remove("b")
    eventually(lambda: controller.instances() == ["a"], 20, "the dead one is out")
    two.workers.add("b")
    two.known("b")
    (second,) = [one for one in controller.http.get("/instances").json()["instances"] if one["instance_id"] == "b"]
    assert first["ranks"][0]["epoch"] != second["ranks"][0]["epoch"]


def test_a_deadline_is_504_and_a_lost_destination_is_409(two: Cluster) -> None:
    controller = two.controller
    tokens = prompt(0)
    two.stored("a", tokens)
    two.workers.run(two.workers.ranks["b"][0].stop())  # believed for dead_ns more
    answer = controller.move("a", "b", tokens, deadline_s=0.2)
    assert (answer.status_code, answer.json()["reason"]) == (504, "deadline"), answer.text
    two.workers.ranks.pop("b")
    assert two.workers.use("a", tokens) == 200
    two.workers.add("c")
    two.known("c")
    two.workers.run(two.workers.ranks["c"][0].stop())
    answer = controller.move("a", "c", tokens)
    assert (answer.status_code, answer.json()["reason"]) == (409, "destination_dead"), answer.text
    assert answer.json()["event_id"]
    two.workers.ranks.pop("c")
    eventually(lambda: not two.workers.pending(), 20, "nothing is left over")


def test_a_move_that_waits_can_be_cancelled(two: Cluster) -> None:
    controller = two.controller
    tokens = prompt(0)
    two.stored("a", tokens)
    two.workers.run(two.workers.ranks["b"][0].stop())
    two.workers.ranks.pop("b")
    found: List[httpx.Response] = []
    thread = threading.Thread(target=lambda: found.append(controller.move("a", "b", tokens)))
    thread.start()
    (event,) = eventually(lambda: controller.http.get("/events").json()["events"])
    name = event["event_id"]
    answer = controller.http.delete(f"/events/{name}")
    assert (answer.status_code, answer.headers["kvmove-reason"]) == (200, "cancelled")
    thread.join(10)
    assert (found[0].status_code, found[0].json()["reason"]) == (409, "cancelled")
    assert found[0].json()["event_id"] == name
    assert two.workers.use("a", tokens) == 200


def test_a_queue_bound_is_429_with_retry_after(tmp_path: Path) -> None:
    found = cluster(tmp_path, "--events-max", "1")
    controller = found.controller
    try:
        found.workers.add("a")
        found.workers.add("b")
        found.known("a", "b")
        found.stored("a", prompt(0))
        found.workers.run(found.workers.ranks.pop("b")[0].stop())
        thread = threading.Thread(target=lambda: controller.move("a", "b", prompt(0)))
        thread.start()
        eventually(lambda: controller.http.get("/events").json()["events"])
        answer = controller.move("a", "b", prompt(0))
        assert (answer.status_code, answer.json()["reason"]) == (429, "busy"), answer.text
        assert int(answer.headers["retry-after"]) > 0
        thread.join(10)
    finally:
        found.close()


def test_a_client_that_gives_up_hears_the_truth_later(two: Cluster) -> None:
    controller = two.controller
    tokens = prompt(0)
    two.stored("a", tokens)
    two.workers.run(two.workers.ranks.pop("b")[0].stop())
    with pytest.raises(httpx.ReadTimeout):
        body = {"old_position": ["a", CPU], "new_position": ["b", CPU], "tokens": tokens}
        controller.http.post("/move", json=body, timeout=0.1)
    (event,) = controller.http.get("/events").json()["events"]
    ended = controller.ended(event["event_id"])
    assert (ended["state"], ended["reason"]) == ("failed", "destination_dead")
    assert [chunk["source"] for chunk in ended["chunks"]] == ["untouched"] * 4
    assert two.workers.use("a", tokens) == 200


def test_a_damaged_journal_is_refused_and_left_as_it_is(two: Cluster) -> None:
    controller = two.controller
    controller.move("a", "b", prompt(0))
    assert controller.stop() == 0
    data = controller.journal.read_bytes()
    spoiled = data[:4096] + bytes(200) + data[4296:]
    controller.journal.write_bytes(spoiled)
    with pytest.raises(AssertionError, match="journal"):
        controller.start()
    assert controller.process is not None
    assert controller.process.wait(10) == 2
    assert controller.journal.read_bytes() == spoiled


def test_drain_spreads_an_instance_over_others_as_one_event(tmp_path: Path) -> None:
    found = cluster(tmp_path)
    controller = found.controller
    try:
        for name in ("a", "b", "c"):
            found.workers.add(name, places=(CPU, "LocalDiskBackend"))
        found.known("a", "b", "c")
        hot = [prompt(first, 64) for first in range(0, 600, 100)]
        for tokens in hot:
            found.stored("a", tokens)
        assert found.workers.store("a", prompt(900, 64), "LocalDiskBackend") == 64
        eventually(lambda: controller.held(prompt(900, 64)).get("a") == 64)
        answer = controller.post("/drain", instance_id="a", to=["b", "c"], idempotency_key="d")
        assert answer.status_code == 200, answer.text
        assert answer.json()["num_tokens"] == 7 * 64
        event = controller.ended(answer.json()["event_id"])
        assert (event["kind"], event["state"], event["num_tokens"]) == ("drain", "done", 7 * 64)
        assert len(event["children"]) == 2
        where = [next(iter(controller.held(tokens))) for tokens in hot]
        assert sorted(where) == ["b"] * 3 + ["c"] * 3
        assert all(found.workers.use(at, tokens) == 64 for at, tokens in zip(where, hot))
        again = controller.post("/drain", instance_id="a", to=["b", "c"], idempotency_key="d")
        assert again.json() == answer.json()
        assert controller.post("/check_finish", event_id=answer.json()["event_id"]).json()["status"] == "done"
        for body, code in (
            ({"instance_id": "a", "to": ["a"]}, 422),
            ({"instance_id": "x", "to": ["a"]}, 404),
            ({"instance_id": "a", "to": ["x"]}, 404),
            ({"instance_id": "a", "to": ["b"], "locations": ["L9"]}, 404),
            ({"instance_id": "a", "to": []}, 422),
        ):
            assert controller.post("/drain", **body).status_code == code
    finally:
        found.close()
