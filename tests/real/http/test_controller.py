"""The controller's HTTP, against a real controller process and workers that move real bytes."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Iterator, List

import httpx
import msgspec
import pytest
import zmq

from tests.real.http.cluster import CPU, NAMESPACE, ROOT, Cluster, cluster, eventually

pytestmark = pytest.mark.real
TOKENS = list(range(1000, 1200))  # three chunks of 64 tokens and one of 8


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One controller and its instances, for all tests here: each test has prompts of its own."""
    found = cluster(tmp_path_factory.mktemp("controller"))
    try:
        found.workers.add("a", places=(CPU, "LocalDiskBackend"))
        found.workers.add("b", places=(CPU, "LocalDiskBackend"))
        found.workers.add("two", ranks=2)
        found.workers.add("small", slots=2)
        found.workers.add("other", namespace=msgspec.structs.replace(NAMESPACE, model="another"))
        found.known("a", "b", "two", "small", "other")
        yield found
    finally:
        found.close()


def prompt(first: int, count: int = 200) -> List[int]:
    return list(range(first, first + count))


# ---- moves
def test_a_move_is_answered_in_the_references_form_and_ends_done(shared: Cluster) -> None:
    tokens = prompt(10_000)
    shared.stored("a", tokens)
    answer = shared.controller.move("a", "b", tokens)
    assert answer.status_code == 200
    assert list(answer.json()) == ["num_tokens", "event_id"]
    assert answer.json()["num_tokens"] == 200
    event = shared.controller.ended(answer.json()["event_id"])
    assert (event["state"], event["kind"], event["transport"], event["bytes"]) == ("done", "move", "tcp", 200 * 512)
    assert [(chunk["num_tokens"], chunk["destination"], chunk["source"]) for chunk in event["chunks"]] == [
        *[(64, "copied", "deleted")] * 3, (8, "copied", "deleted"),
    ]  # fmt: skip
    assert list(event["phases_s"]) == ["pinning", "reserving", "copying", "releasing"]
    assert event["ranks"][0]["deleted"] == 4
    assert shared.workers.use("b", tokens) == 200
    assert shared.workers.use("a", tokens) == 0


def test_a_slow_move_says_how_far_it_is(shared: Cluster) -> None:
    tokens = prompt(5_000_000, 32 * 64)
    shared.stored("a", tokens)
    answer = shared.controller.move("a", "b", tokens, bandwidth_cap_bytes_per_s=len(tokens) * 512)  # a second
    event_id = answer.json()["event_id"]
    seen = []
    while (event := shared.controller.event(event_id))["state"] not in ("done", "failed"):
        if event["state"] == "copying":
            progress = event["progress"]
            assert progress["planned_tokens"] == len(tokens)
            assert progress["moved_chunks"] == progress["moved_tokens"] // 64
            seen.append((progress["moved_tokens"], event["bytes"]))
    assert event["state"] == "done" and "progress" not in event
    assert seen == sorted(seen) and any(0 < moved < len(tokens) for moved, _ in seen)
    assert all(nbytes == moved * 512 for moved, nbytes in seen)
    assert (event["bytes"], event["ranks"][0]["deleted"]) == (len(tokens) * 512, 32)


@pytest.mark.parametrize("name", ["copy", "should_copy"])
def test_prior_art_02_a_copy_keeps_the_source(shared: Cluster, name: str) -> None:
    tokens = prompt(11_000 if name == "copy" else 11_500)
    shared.stored("a", tokens)
    event = shared.controller.ended(shared.controller.move("a", "b", tokens, **{name: True}).json()["event_id"])
    assert (event["kind"], event["state"], event["chunks"][0]["source"]) == ("copy", "done", "kept")
    assert shared.workers.use("a", tokens) == shared.workers.use("b", tokens) == 200


def test_what_is_there_already_is_not_copied_and_said_so(shared: Cluster) -> None:
    tokens = prompt(12_000)
    shared.stored("a", tokens)
    shared.stored("b", tokens[:128])
    event = shared.controller.ended(shared.controller.move("a", "b", tokens).json()["event_id"])
    assert [chunk["destination"] for chunk in event["chunks"]] == ["present", "present", "copied", "copied"]
    assert event["bytes"] == 72 * 512
    assert event["ranks"][0]["present"] == 2


def test_nothing_held_is_200_with_zero_and_the_reason(shared: Cluster) -> None:
    answer = shared.controller.move("a", "b", prompt(13_000))
    assert answer.status_code == 200
    assert answer.json()["num_tokens"] == 0
    assert answer.headers["kvmove-reason"] == "nothing_held"
    event = shared.controller.event(answer.json()["event_id"])
    assert (event["state"], event["reason"]) == ("failed", "nothing_held")


def test_unknown_places_are_404_and_name_the_known_ones(shared: Cluster) -> None:
    for src, dst in (("nobody", "b"), ("a", "nobody")):
        answer = shared.controller.move(src, dst, TOKENS)
        assert answer.status_code == 404
        assert answer.json()["reason"] == "unknown_instance"
        assert answer.json()["known"] == ["a", "b", "other", "small", "two"]
        assert "'nobody'" in answer.json()["detail"]
    answer = shared.controller.post("/move", old_position=["a", "L9"], new_position=["b", CPU], tokens=TOKENS)
    assert (answer.status_code, answer.json()["reason"]) == (404, "unknown_location")
    assert f"a/{CPU}" in answer.json()["known"]


def test_prior_art_03_a_mismatch_is_409_with_both_values(shared: Cluster) -> None:
    tokens = prompt(14_000)
    shared.stored("two", tokens)
    answer = shared.controller.move("two", "a", tokens)
    assert answer.status_code == 409
    assert answer.json()["reason"] == "mismatch"
    assert "ranks=2" in answer.json()["detail"]
    assert "ranks=1" in answer.json()["detail"]
    assert shared.workers.use("two", tokens) == 200
    event = shared.controller.event(answer.json()["event_id"])
    assert (event["state"], event["reason"]) == ("failed", "mismatch")


def test_prior_art_10_a_full_destination_is_507_and_the_source_keeps(shared: Cluster) -> None:
    tokens, there = prompt(15_000), prompt(15_500, 128)
    shared.stored("a", tokens)
    shared.stored("small", there)
    answer = shared.controller.move("a", "small", tokens, if_room=True)
    assert (answer.status_code, answer.json()["reason"]) == (507, "full")
    assert shared.workers.use("a", tokens) == 200
    assert shared.workers.use("small", there) == 128


def test_a_body_with_a_mistake_is_422_and_names_the_field(shared: Cluster) -> None:
    good = {"old_position": ["a", CPU], "new_position": ["b", CPU], "tokens": [1]}
    for change, field in (
        ({"cpy": True}, "cpy"),
        ({"tokens": [1, "x"]}, "tokens[1]"),
        ({"tokens": [-1]}, "tokens[0]"),
        ({"old_position": ["a"]}, "old_position"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"copy": True, "should_copy": False}, "should_copy"),
        ({"granularity": "foo"}, "granularity"),
    ):
        answer = shared.controller.post("/move", **{**good, **change})
        assert (answer.status_code, answer.json()["field"]) == (422, field), answer.text
    answer = shared.controller.post("/move", **{**good, "granularity": "prefx"})
    expected = "granularity: unknown value 'prefx', expected move or prefix (did you mean 'prefix'?)"
    assert answer.json()["detail"] == expected
    answer = shared.controller.http.post("/move", content=b"{not json")
    assert answer.status_code == 422
    deep = b'{"event_id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for path in ("/lease", "/unpin", "/move"):
        assert shared.controller.http.post(path, content=deep).status_code == 422
    whole = {**good, "tokens": [1.0, 2.0]}  # integers, by JSON's own definition
    assert shared.controller.post("/move", **whole).status_code == 200
    assert shared.controller.post("/move", **{**good, "tokens": [1.5]}).status_code == 422
    answer = shared.controller.post("/move", new_position=["b", CPU])
    assert (answer.status_code, answer.json()["field"]) == (422, "old_position")


@pytest.mark.parametrize(
    "option", [{"priority": 101}, {"weight": 0}, {"bandwidth_cap_bytes_per_s": 0}, {"priority": 1.5}]
)
def test_terms_that_cannot_be_are_422(shared: Cluster, option: dict[str, int]) -> None:
    answer = shared.controller.move("a", "b", TOKENS, **option)
    assert answer.status_code == 422
    assert answer.json()["field"] in option


def test_compress_and_decompress_are_501(shared: Cluster) -> None:
    for path in ("/compress", "/decompress"):
        answer = shared.controller.post(path, instance_id="a", method="cachegen", location=CPU, tokens=[1])
        assert answer.status_code == 501


def test_an_idempotency_key_moves_once(shared: Cluster) -> None:
    tokens = prompt(16_000)
    shared.stored("a", tokens)
    first = shared.controller.move("a", "b", tokens, idempotency_key="once")
    shared.controller.ended(first.json()["event_id"])
    again = shared.controller.move("a", "b", tokens, idempotency_key="once")
    assert (again.status_code, again.json()) == (200, first.json())
    header = {"Idempotency-Key": "once"}
    body = {"old_position": ["a", CPU], "new_position": ["b", CPU], "tokens": tokens}
    assert shared.controller.http.post("/move", json=body, headers=header).json() == first.json()
    other = shared.controller.move("a", "b", tokens[:64], idempotency_key="once")
    assert (other.status_code, other.json()["reason"]) == (422, "idempotency_key_reused")


def test_a_dry_run_says_what_would_move_and_moves_nothing(shared: Cluster) -> None:
    tokens = prompt(17_000)
    shared.stored("a", tokens)
    shared.stored("b", tokens[:64])
    before = shared.controller.http.get("/events").json()["events"]
    answer = shared.controller.move("a", "b", [*tokens, 5, 6, 7], dry_run=True).json()
    # The last chunk of 8 would be one of 11 with the three tokens more, and that is not held.
    assert (answer["num_tokens"], answer["present_tokens"], answer["bytes"]) == (192, 64, 128 * 512)
    assert answer["event_id"] is None
    assert answer["fits"]
    assert answer["move_s"] > 0
    assert answer["recompute_s"] == pytest.approx(192 / 8000)
    assert answer["recompute_is_quicker"] is (answer["recompute_s"] < answer["move_s"])
    assert shared.controller.http.get("/events").json()["events"] == before
    assert shared.controller.move("a", "nobody", tokens, dry_run=True).status_code == 404
    assert shared.controller.move("two", "a", tokens, dry_run=True).status_code == 409


def test_empty_tokens_move_all_of_a_location(shared: Cluster) -> None:
    one, other = prompt(18_000), prompt(18_500, 100)
    for tokens in (one, other):
        assert shared.workers.store("a", tokens, "LocalDiskBackend") == len(tokens)
    place = "LocalDiskBackend"
    eventually(lambda: shared.controller.held(other).get("a") == 100)
    answer = shared.controller.post("/move", old_position=["a", place], new_position=["b", place])
    assert (answer.status_code, answer.json()["num_tokens"]) == (200, 300)
    event = shared.controller.ended(answer.json()["event_id"])
    assert (event["kind"], event["state"], event["num_tokens"]) == ("drain", "done", 300)
    assert len(event["children"]) == 2
    child = shared.controller.event(event["children"][0])
    assert child["parent"] == event["event_id"]
    empty = shared.controller.post("/move", old_position=["a", place], new_position=["b", place])
    assert (empty.status_code, empty.json()["num_tokens"]) == (200, 0)
    assert empty.headers["kvmove-reason"] == "nothing_held"


# ---- events
def test_an_unknown_event_is_404_and_names_known_ones(shared: Cluster) -> None:
    assert shared.controller.move("a", "b", prompt(18_500)).status_code == 200  # one that is known
    for name in ("9-9", "nonsense", "1-1.9-9", "١-1"):
        answer = shared.controller.http.get(f"/events/{name}")
        assert (answer.status_code, answer.json()["reason"]) == (404, "unknown_event")
        assert answer.json()["known"]
    assert shared.controller.http.delete("/events/9-9").status_code == 404
    assert shared.controller.post("/check_finish", event_id="9-9").status_code == 404


def test_check_finish_is_true(shared: Cluster) -> None:
    tokens = prompt(19_000)
    shared.stored("a", tokens)
    name = shared.controller.move("a", "b", tokens).json()["event_id"]
    shared.controller.ended(name)
    assert shared.controller.post("/check_finish", event_id=name).json() == {"status": "done", "reason": ""}
    late = shared.controller.http.delete(f"/events/{name}")
    assert (late.status_code, late.json()["state"]) == (409, "done")


def test_events_are_listed_newest_first(shared: Cluster) -> None:
    for _ in range(2):
        shared.controller.move("a", "b", prompt(19_500))
    events = shared.controller.http.get("/events", params={"limit": 2, "state": "failed"}).json()["events"]
    numbers = [int(event["event_id"].partition("-")[2]) for event in events]
    assert numbers == sorted(numbers, reverse=True)
    assert {event["reason"] for event in events} == {"nothing_held"}
    answer = shared.controller.http.get("/events", params={"limit": "many"})
    assert (answer.status_code, answer.json()["field"]) == (422, "limit")
    for field in ("state", "kind"):  # nothing is found of what cannot be
        answer = shared.controller.http.get("/events", params={field: "dnoe"})
        assert (answer.status_code, answer.json()["field"]) == (422, field)


def test_events_are_listed_by_their_kind(shared: Cluster) -> None:
    names = [shared.controller.move("a", "b", prompt(19_500), copy=copy).json()["event_id"] for copy in (True, False)]
    for name, kind in zip(names, ("copy", "move")):
        found = shared.controller.http.get("/events", params={"kind": kind}).json()["events"]
        assert {event["kind"] for event in found} == {kind}
        assert found[0]["event_id"] == name


def test_the_stream_tells_of_each_state(shared: Cluster) -> None:
    tokens = prompt(20_000)
    shared.stored("a", tokens)
    states: List[str] = []
    ready = threading.Event()

    def listen() -> None:
        with shared.controller.http.stream("GET", "/stream") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                ready.set()
                if line.startswith("data: ") and '"state"' in line:
                    event = json.loads(line[6:])
                    states.append(event["state"])
                    if event["state"] == "done":
                        return

    thread = threading.Thread(target=listen)
    thread.start()
    assert ready.wait(10)
    shared.controller.move("a", "b", tokens)
    thread.join(20)
    assert states == ["pinning", "reserving", "copying", "releasing", "done"]


# ---- pins, leases, clears
def test_a_lease_is_kept_renewed_and_ended(shared: Cluster) -> None:
    tokens = prompt(21_000)
    shared.stored("a", tokens)
    answer = shared.controller.post("/lease", instance_id="a", location=CPU, tokens=tokens, seconds=5).json()
    assert answer["num_tokens"] == 200
    assert 3 < answer["expires_in_s"] <= 5
    name = answer["event_id"]
    event = shared.controller.event(name)
    assert (event["kind"], event["state"]) == ("pin", "held")
    renewed = shared.controller.post("/lease", event_id=name, seconds=60).json()
    assert (renewed["event_id"], renewed["expires_in_s"] > 50) == (name, True)
    assert shared.controller.post("/unpin", event_id=name).status_code == 200
    event = shared.controller.event(name)
    assert (event["state"], event["reason"]) == ("done", "unpinned")
    assert shared.controller.post("/unpin", event_id="9-9").status_code == 404
    for path, more in (("/unpin", {}), ("/lease", {"seconds": 5})):
        again = shared.controller.post(path, event_id=name, **more)
        assert (again.status_code, again.json()["reason"], again.json()["state"]) == (409, "already_done", "done")
    assert shared.controller.post("/lease", event_id="9-9", seconds=1).status_code == 404
    assert shared.controller.post("/lease", seconds=1).status_code == 422


def test_a_lease_that_is_not_renewed_ends_by_itself(shared: Cluster) -> None:
    tokens = prompt(21_500)
    shared.stored("a", tokens)
    answer = shared.controller.post("/lease", instance_id="a", location=CPU, tokens=tokens, seconds=0.3)
    name = answer.json()["event_id"]
    event = shared.controller.ended(name)
    assert (event["state"], event["reason"]) == ("done", "lapsed")


def test_prior_art_26_pinned_chunks_are_not_removed_by_a_move(shared: Cluster) -> None:
    tokens = prompt(22_000)
    shared.stored("a", tokens)
    pin = shared.controller.post("/pin", instance_id="a", location=CPU, tokens=tokens).json()
    assert pin["num_tokens"] == 200
    event = shared.controller.ended(shared.controller.move("a", "b", tokens).json()["event_id"])
    assert event["state"] == "done"
    assert {chunk["source"] for chunk in event["chunks"]} == {"kept"}
    assert shared.workers.use("a", tokens) == 200
    assert shared.controller.post("/unpin", event_id=pin["event_id"]).status_code == 200
    nothing = shared.controller.post("/pin", instance_id="a", location=CPU, tokens=prompt(22_900))
    assert (nothing.status_code, nothing.json()["num_tokens"]) == (200, 0)


def test_clear_empties_a_location(shared: Cluster) -> None:
    tokens = prompt(23_000, 128)
    shared.stored("small", tokens)
    answer = shared.controller.post("/clear", instance_id="small", location=CPU)
    assert (answer.status_code, answer.json()["num_tokens"]) == (200, 128)
    assert shared.workers.use("small", tokens) == 0
    assert shared.controller.post("/clear", instance_id="small", location="L9").status_code == 404


# ---- who is there
def test_prior_art_22_the_same_tokens_of_another_model_are_not_found(shared: Cluster) -> None:
    tokens = prompt(24_000)
    shared.stored("other", tokens)
    shared.stored("a", tokens)
    assert shared.controller.held(tokens) == {"other": 200, "a": 200}
    answer = shared.controller.move("other", "a", tokens)
    assert (answer.status_code, answer.json()["reason"]) == (409, "mismatch")


def test_questions_of_the_reference(shared: Cluster) -> None:
    post = shared.controller.post
    assert post("/health", instance_id="two").json()["error_codes"] == {"0": 0, "1": 0}
    assert post("/health", instance_id="nobody").status_code == 404
    assert "a" in post("/query_instance", ip="127.0.0.1").json()["instance_ids"]
    assert post("/query_instance", ip="10.9.8.7").status_code == 404
    infos = post("/query_worker_info", instance_id="two").json()["worker_infos"]
    assert [(info["worker_id"], info["ip"]) for info in infos] == [(0, "127.0.0.1"), (1, "127.0.0.1")]
    assert len(post("/query_worker_info", instance_id="all").json()["worker_infos"]) == 6
    (one,) = post("/query_worker_info", instance_id="two", worker_ids=[1]).json()["worker_infos"]
    heard = one.pop("last_heartbeat_time")  # it may have been heard meanwhile
    assert heard >= infos[1].pop("last_heartbeat_time") and one == infos[1]


def test_instances_say_what_their_locations_hold(shared: Cluster) -> None:
    (found,) = [
        one for one in shared.controller.http.get("/instances").json()["instances"] if one["instance_id"] == "small"
    ]
    (rank,) = found["ranks"]
    assert rank["locations"][0]["slots"] == 2
    assert rank["locations"][0]["capacity_bytes"] == 2 * 64 * 512
    assert found["namespace"]["chunk_tokens"] == 64


# ---- the process
def test_bodies_are_bounded(shared: Cluster) -> None:
    answer = shared.controller.http.post("/lookup", content=b" " * (17 << 20))
    assert (answer.status_code, answer.json()["reason"]) == (413, "too_large")

    def endless() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * (1 << 20)

    with contextlib.suppress(httpx.WriteError):  # it may hang up before all of it was sent
        assert shared.controller.http.post("/lookup", content=endless()).status_code == 413
    assert shared.controller.http.get("/readyz").status_code == 200


def test_the_openapi_document_names_every_route(shared: Cluster) -> None:
    document = shared.controller.http.get("/openapi.json").json()
    wanted = [
        "/move",
        "/lookup",
        "/pin",
        "/unpin",
        "/lease",
        "/drain",
        "/clear",
        "/compress",
        "/decompress",
        "/health",
        "/query_instance",
        "/query_worker_info",
        "/check_finish",
        "/events",
        "/events/{event_id}",
        "/events/{event_id}/wait",
        "/instances",
        "/healthz",
        "/readyz",
        "/stream",
    ]
    assert set(wanted) <= set(document["paths"])
    assert document["paths"]["/move"]["post"]["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/MoveBody"
    }
    refs = set(_refs(document))
    assert refs <= {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert shared.controller.http.get("/docs").status_code == 200
    wrong = shared.controller.http.options("/events/1-1")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, DELETE")
    answer = shared.controller.http.get("/nowhere")
    assert (answer.status_code, answer.json()["reason"]) == (404, "unknown_path")


def _refs(part: object) -> Iterator[str]:
    if isinstance(part, dict):
        for name, value in part.items():
            if name == "$ref":
                yield value
            yield from _refs(value)
    elif isinstance(part, list):
        for value in part:
            yield from _refs(value)


def test_the_reply_socket_answers(shared: Cluster) -> None:
    with zmq.Context() as context, context.socket(zmq.REQ) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVTIMEO, 10_000)
        sock.connect(f"tcp://127.0.0.1:{shared.controller.reply}")
        sock.send(b"who are you?")
        answer = msgspec.msgpack.decode(sock.recv())
    assert answer["address"] == f"127.0.0.1:{shared.controller.pull}"


def test_prior_art_17_malformed_frames_change_nothing(shared: Cluster) -> None:
    tokens = prompt(25_000)
    with zmq.Context() as context, context.socket(zmq.PUSH) as sock:
        sock.setsockopt(zmq.LINGER, 1000)
        sock.connect(f"tcp://127.0.0.1:{shared.controller.pull}")
        header = msgspec.msgpack.encode(["kvmove", "127.0.0.1:1", f"127.0.0.1:{shared.controller.pull}"])
        bad = ([b""], [b"x", b"y", b"z"], [header, b"\x93"], [header, b"\x81\xa4type\xa7Unknown"], [b"\xc1", b"\xc1"])
        for frames in bad:
            sock.send_multipart(frames)
    shared.stored("a", tokens)
    errors = (shared.controller.folder / "controller.err").read_text()
    eventually(lambda: "malformed frame" in (shared.controller.folder / "controller.err").read_text(), 10, errors)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others could reach it"),
        (["--monitor-host", "0.0.0.0"], "--monitor-host 0.0.0.0: others could reach it"),
        (["--monitor-ports", '{"pul": 1}'], "unknown field 'pul'"),
        (["--monitor-ports", "8300"], "--monitor-ports 8300"),
        (["--set", "lease=1 ms"], "lease"),
        (["--set", "leese=1 s"], "--set leese: unknown field 'leese' (did you mean 'lease'?)"),
        (["--set", "scale=abc"], "--set scale: found 'abc', expected a number"),
        (["--set", "constants.scale=0"], "constants.scale is 0.0, expected a number above 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path: Path, args: List[str], line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvmove", "controller", "--port", "0", "--journal", str(tmp_path / "j"), *args],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("which", ["http", "pull", "reply"])
def test_a_taken_port_is_one_line_and_exit_2(tmp_path: Path, which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"pull": 0, "reply": 0, **({which: port} if which != "http" else {})}
        done = subprocess.run(
            [
                sys.executable, "-m", "kvmove", "controller", "--port", str(port if which == "http" else 0),
                "--monitor-ports", json.dumps(ports), "--journal", str(tmp_path / "j"),
            ],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr or f"localhost:{port}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_body_that_says_it_is_too_large_is_not_waited_for(shared: Cluster) -> None:
    with socket.create_connection(("127.0.0.1", shared.controller.port), timeout=20) as sock:
        sock.sendall(b"POST /move HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 413")
