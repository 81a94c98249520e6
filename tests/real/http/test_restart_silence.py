"""A worker that is not heard: out after its time, and back, with all that it holds, once it is heard again."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from kvreal.endpoints import Endpoints
from tests.real.http.cluster import CPU, eventually
from tests.real.http.hostile import Inside

pytestmark = pytest.mark.real


def test_a_silent_worker_is_out_and_comes_back_by_registering_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = Inside(tmp_path, "a", "b")
    tokens = list(range(300))
    try:
        assert inside.workers.store("a", tokens) == 300
        with httpx.Client(base_url=inside.url, timeout=20) as http:

            def held() -> dict[str, int]:
                found = http.post("/lookup", json={"tokens": tokens}).json()["layout_info"]
                return {name: place[1] for name, place in found.items()}

            eventually(lambda: held() == {"a": 300})
            (service,) = inside.workers.ranks["a"]
            first = service.machine.epoch  # type: ignore[attr-defined]
            monkeypatch.setattr(service.network, "send", lambda dst, message: False)
            eventually(lambda: held() == {}, 20, "what it holds is not offered any more")
            body = {"old_position": ["a", CPU], "new_position": ["b", CPU], "tokens": tokens}
            answer = http.post("/move", json=body)
            assert (answer.status_code, answer.json()["reason"]) == (404, "unknown_instance")
            assert [one["instance_id"] for one in http.get("/instances").json()["instances"]] == ["b"]
            monkeypatch.setattr(service.network, "send", lambda *args: Endpoints.send(service.network, *args))
            eventually(lambda: held() == {"a": 300}, 20, "it is back, with its whole inventory")
            assert service.machine.epoch > first  # type: ignore[attr-defined]
            done = http.post("/move", json=body).json()
            event = http.get(f"/events/{done['event_id']}/wait", params={"timeout": 20}).json()
            assert event["state"] == "done"
        assert (inside.workers.use("a", tokens), inside.workers.use("b", tokens)) == (0, 300)
    finally:
        inside.close()
