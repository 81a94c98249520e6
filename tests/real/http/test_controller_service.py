"""The service under the faces: who is answered, who is told of the end, and what a journal that fails does to it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import List, Optional

import pytest

from kvcore.protocol import machine as m
from kvcore.protocol.config import ControllerSpec
from kvcore.protocol.messages import CancelRequest, LookupRequest, MoveRequest
from kvreal.endpoints import EndpointError, Endpoints, endpoint_of
from kvreal.journal import JournalError
from kvreal.service import Service, ServiceStopped
from tests.real.http.cluster import CPU, QUICK, Cluster, cluster, eventually

pytestmark = pytest.mark.real


class Listed:
    """A journal in memory, which may fail."""

    def __init__(self) -> None:
        self.records: List[m.JournalRecord] = []
        self.full: bool = False

    def append(self, record: m.JournalRecord) -> None:
        if self.full:
            raise JournalError("no space left")
        self.records.append(record)

    def close(self) -> None:
        pass


async def started(journal: Optional[Listed] = None) -> Service:
    network = Endpoints("127.0.0.1:0")
    service = Service(ControllerSpec(network.address, QUICK), network, journal=journal)
    await service.start()
    return service


def test_answers_find_whoever_asked_and_nothing_is_left_over() -> None:
    async def whole() -> None:
        service = await started()
        asks = [service.ask(LookupRequest("", (bytes([n]),), (1,))) for n in range(20)]
        assert {answer.state for answer in await asyncio.gather(*asks)} == {"ok"}
        answer = await service.ask(MoveRequest("", ("a", CPU), ("b", CPU), (b"k",), (1,)))
        assert (answer.state, answer.reason) == ("refused", "unknown_instance")
        assert (await service.ask(CancelRequest("", 77))).reason == "unknown_event"
        assert not service.asked
        assert await service.peek(lambda machine: machine.incarnation) == 1
        await service.stop()
        with pytest.raises(ServiceStopped):
            await service.ask(LookupRequest("", (), ()))

    asyncio.run(whole())


def test_a_watcher_sees_each_step_and_ends_with_the_service() -> None:
    async def whole() -> List[str]:
        service = await started()
        seen: List[str] = []

        async def watch() -> None:
            async for _, item, _ in service.watch():
                seen.append(type(item).__name__)

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0)
        await service.ask(LookupRequest("", (b"k",), (1,)))
        await service.stop()
        await asyncio.wait_for(watching, 5)
        return seen

    assert "Received" in asyncio.run(whole())


def test_a_listener_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def whole() -> None:
        service = await started()

        def broken(now: int, item: m.Input, effects: List[m.Effect]) -> None:
            raise ValueError("a bug in the metrics")

        service.listeners.append(broken)
        assert (await service.ask(LookupRequest("", (b"k",), (1,)))).state == "ok"
        await service.stop()

    asyncio.run(whole())
    assert "a listener failed" in caplog.text


def test_a_journal_that_cannot_be_written_ends_the_service_before_anything_is_said() -> None:
    async def whole() -> None:
        journal = Listed()
        service = await started(journal)
        assert [type(record).__name__ for record in journal.records] == ["Incarnation"]
        asked = service.begin(LookupRequest("", (b"k",), (1,)))
        assert (await asked.end).state == "ok"
        journal.full = True
        machine = service.machine
        effect = m.Journal(m.Outcome(1, "done"))
        machine.handle = lambda now, item: [effect, m.Send("http/3", (await_none()))]  # type: ignore[method-assign]
        with pytest.raises((ServiceStopped, TimeoutError)):
            await service.ask(LookupRequest("", (b"k",), (1,)), 1)
        assert service.failed is not None
        assert isinstance(service.failed.result(), JournalError)
        assert not service.running
        await service.stop()

    def await_none() -> LookupRequest:
        return LookupRequest("never sent", (), ())

    asyncio.run(whole())


@pytest.mark.parametrize("text", ["8300", "localhost", "localhost:port", ":1", "localhost:99999", ""])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(EndpointError):
        endpoint_of(text)


def test_addresses_have_one_form() -> None:
    assert endpoint_of("localhost:8300") == endpoint_of("tcp://127.0.0.1:08300") == "127.0.0.1:8300"


@pytest.fixture
def alone(tmp_path: Path) -> Cluster:
    return cluster(tmp_path)


def test_sigterm_ends_it_cleanly_also_while_somebody_watches(alone: Cluster) -> None:
    controller = alone.controller
    lines: List[str] = []

    def listen() -> None:
        with controller.http.stream("GET", "/stream") as answer:
            lines.extend(answer.iter_lines())

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        eventually(lambda: controller.http.get("/metrics").status_code == 200)
        eventually(lambda: any("hello" in line for line in lines) or thread.is_alive())
        assert controller.stop() == 0
        thread.join(10)
        assert not thread.is_alive()
        assert lines[0] == "event: hello"
    finally:
        alone.close()
