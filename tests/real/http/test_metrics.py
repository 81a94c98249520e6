"""/metrics: after known operations the figures are what they must be; the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
from typing import Dict, Iterator, List, Tuple

import msgspec
import pytest
import zmq
from prometheus_client.parser import text_string_to_metric_families

from kvcore.protocol.messages import Beat, Delta, Wire
from kvreal.endpoints import CLUSTER, Header
from tests.real.http.cluster import CPU, NAMESPACE, ROOT, Cluster, cluster, eventually

pytestmark = pytest.mark.real
SLOT = NAMESPACE.chunk_tokens * NAMESPACE.bytes_per_token
Figures = Dict[Tuple[str, Tuple[Tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = cluster(tmp_path_factory.mktemp("metrics"))
    try:
        found.workers.add("a")
        found.workers.add("b")
        found.workers.add("small", slots=2)
        found.known("a", "b", "small")
        yield found
    finally:
        found.close()


def figures(one: Cluster) -> Figures:
    answer = one.controller.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


class Since:
    """How much a figure has grown since this was made."""

    def __init__(self, one: Cluster) -> None:
        self.one: Cluster = one
        self.before: Figures = figures(one)

    def __call__(self, name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return figures(self.one).get(key, 0.0) - self.before.get(key, 0.0)


def now(one: Cluster, name: str, **labels: str) -> float:
    return figures(one)[(name, tuple(sorted(labels.items())))]


def prompt(first: int, count: int = 200) -> List[int]:
    """Three chunks of 64 tokens and one of 8."""
    return list(range(first, first + count))


def test_a_move_by_state_bytes_phases_and_chunks(shared: Cluster) -> None:
    since = Since(shared)
    tokens = prompt(10_000)
    shared.stored("a", tokens)
    assert since("kvmove_chunks_added_total", instance_id="a", location=CPU) == 4
    event = shared.controller.ended(shared.controller.move("a", "b", tokens).json()["event_id"])
    assert since("kvmove_moves_total", kind="move", state="done", reason="") == 1
    assert since("kvmove_moved_tokens_total", kind="move") == 200
    assert since("kvmove_moved_bytes_total", transport="tcp") == event["bytes"] == 200 * 512
    assert since("kvmove_chunks_deleted_total") == 4
    assert since("kvmove_chunks_added_total", instance_id="b", location=CPU) == 4
    assert since("kvmove_chunks_evicted_total", instance_id="a", location=CPU) == 0
    for phase in ("pinning", "reserving", "copying", "releasing"):
        assert since("kvmove_move_phase_seconds_count", phase=phase) == 1
        assert since("kvmove_move_phase_seconds_sum", phase=phase) == pytest.approx(event["phases_s"][phase])
        assert since("kvmove_move_phase_seconds_bucket", phase=phase, le="+Inf") == 1
    assert since("kvmove_move_seconds_sum", state="done") == pytest.approx(event["duration_s"])
    assert now(shared, "kvmove_pool_chunks", instance_id="b", rank="0", location=CPU) == 4
    assert now(shared, "kvmove_pool_used_bytes", instance_id="b", rank="0", location=CPU) == 4 * SLOT


def test_copies_failures_and_what_was_there_already(shared: Cluster) -> None:
    since = Since(shared)
    tokens = prompt(20_000)
    shared.stored("a", tokens)
    for _ in range(2):  # the second finds all of it there: no byte is copied, and none is counted
        answer = shared.controller.move("a", "b", tokens, copy=True).json()
        shared.controller.ended(answer["event_id"])
    absent = shared.controller.move("b", "a", prompt(30_000)).json()
    assert shared.controller.ended(absent["event_id"])["reason"] == "nothing_held"
    assert since("kvmove_moves_total", kind="copy", state="done", reason="") == 2
    assert since("kvmove_moved_bytes_total", transport="tcp") == 200 * 512
    assert since("kvmove_chunks_deleted_total") == 0
    assert since("kvmove_moves_total", kind="move", state="failed", reason="nothing_held") == 1
    assert since("kvmove_moves_total", kind="move", state="done", reason="") == 0


def test_evictions_are_not_what_moves_deleted(shared: Cluster) -> None:
    since = Since(shared)
    shared.stored("small", prompt(40_000, 128))
    shared.stored("small", prompt(41_000, 128))
    eventually(lambda: since("kvmove_chunks_evicted_total", instance_id="small", location=CPU) == 2, what="two evicted")
    assert since("kvmove_chunks_added_total", instance_id="small", location=CPU) == 4
    assert now(shared, "kvmove_pool_slots", instance_id="small", rank="0", location=CPU) == 2
    assert now(shared, "kvmove_pool_capacity_bytes", instance_id="small", rank="0", location=CPU) == 2 * SLOT


def test_leases_and_clears(shared: Cluster) -> None:
    since = Since(shared)
    tokens = prompt(50_000)
    shared.stored("a", tokens)
    answer = shared.controller.post("/lease", instance_id="a", location=CPU, tokens=tokens, seconds=60)
    assert answer.status_code == 200, answer.text
    assert now(shared, "kvmove_user_pins") == 1
    assert now(shared, "kvmove_user_pinned_chunks") == 4
    assert 50 < now(shared, "kvmove_user_pin_next_end_seconds") <= 60
    event = answer.json()["event_id"]
    assert shared.controller.post("/lease", event_id=event, seconds=90).status_code == 200
    assert 80 < now(shared, "kvmove_user_pin_next_end_seconds") <= 90
    assert shared.controller.post("/unpin", event_id=event).status_code == 200
    assert now(shared, "kvmove_user_pins") == now(shared, "kvmove_user_pin_next_end_seconds") == 0
    assert since("kvmove_pin_requests_total", what="begin") == since("kvmove_pin_requests_total", what="renew") == 1
    assert since("kvmove_moves_total", kind="pin", state="done", reason="unpinned") == 1
    assert shared.controller.post("/clear", instance_id="a", location=CPU).status_code == 200
    assert since("kvmove_locations_cleared_total") == 1
    assert now(shared, "kvmove_pool_chunks", instance_id="a", rank="0", location=CPU) == 0
    assert since("kvmove_chunks_evicted_total", instance_id="a", location=CPU) == 0


def test_frames_of_processes_that_are_not_believed(shared: Cluster) -> None:
    """An old epoch's messages, and an inventory with a gap, as if from a worker."""
    since = Since(shared)
    network = shared.workers.ranks["b"][0].network
    with zmq.Context() as context, context.socket(zmq.PUSH) as sock:
        sock.setsockopt(zmq.LINGER, 1000)
        sock.connect(f"tcp://127.0.0.1:{shared.controller.pull}")
        machine = shared.workers.ranks["b"][0].machine
        inc = machine.pools[CPU].inc  # type: ignore[attr-defined]
        messages: List[Wire] = [Beat(1, ()), Delta(CPU, (1, 0), 1), Delta(CPU, inc, 1_000_000)]
        for message in messages:
            header = msgspec.msgpack.encode(Header(CLUSTER, network.address, f"127.0.0.1:{shared.controller.pull}"))
            sock.send_multipart([header, msgspec.msgpack.encode(message)])
        eventually(lambda: since("kvmove_stale_epoch_drops_total", message="Beat") == 1, what="a stale beat")
        eventually(lambda: since("kvmove_stale_epoch_drops_total", message="Delta") == 1, what="a stale change")
        eventually(lambda: since("kvmove_resyncs_total") == 1, what="an inventory was asked for anew")
    assert now(shared, "kvmove_instances") == 3
    eventually(lambda: now(shared, "kvmove_registry_lag_seconds", instance_id="b", rank="0") < 0.5, what="b is heard")


def test_retries_and_a_rank_that_goes(shared: Cluster) -> None:
    shared.workers.add("gone")
    shared.known("gone")
    since = Since(shared)
    tokens = prompt(60_000)
    shared.stored("gone", tokens)
    shared.workers.remove("gone")
    answer = shared.controller.move("gone", "b", tokens)
    assert answer.status_code == 409, answer.text
    assert since("kvmove_retries_total", message="Pin") >= 2
    assert since("kvmove_ranks_total", what="dead") == 1
    assert sum(now(shared, "kvmove_events_in_flight", state=phase) for phase in ("pinning", "copying")) == 0
    assert now(shared, "kvmove_move_pins") == 0


def test_the_dashboard_asks_for_what_there_is(shared: Cluster) -> None:
    dashboard = json.loads((ROOT / "dashboards" / "kvmove.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"\bkvmove_\w+", query)}
    text = shared.controller.http.get("/metrics").text
    there = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    histograms = {line.split()[2] for line in text.splitlines() if re.match(r"# TYPE \S+ histogram", line)}
    there |= {f"{name}{end}" for name in histograms for end in ("_bucket", "_sum", "_count")}
    assert asked - there == set()
    shown = {name for name in there if not name.endswith(("_created", "_bucket", "_sum", "_count"))}
    unshown = {name for name in shown if name not in asked and f"{name}_bucket" not in asked}
    assert unshown == set(), "figures that no panel shows"


def test_no_label_is_one_that_prometheus_gives(shared: Cluster) -> None:
    """A label named instance or job would be renamed by the scrape."""
    names = {name for _, labels in figures(shared) for name, _ in labels}
    assert not names & {"instance", "job"}


def test_units_are_in_the_names(shared: Cluster) -> None:
    for line in shared.controller.http.get("/metrics").text.splitlines():
        if line.startswith("# HELP"):
            _, _, name, about = line.split(" ", 3)
            assert about.endswith("."), name
            for word, unit in (("bytes", "bytes"), ("memory", "bytes"), ("how long", "seconds"), ("until", "seconds")):
                assert word not in about.lower() or unit in name, f"{name}: {about}"


