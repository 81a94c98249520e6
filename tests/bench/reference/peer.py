"""The reference with a crowd of instances that only hold chunks, and with httpx, as the controller's benchmarks ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from kvreal.reference import peer
from kvreal.reference.peer import Script, found

__all__ = ["Reference", "found"]


class Reference(peer.Reference):
    def __init__(self, python: Path, folder: Path) -> None:
        super().__init__(python, folder)
        self.client: httpx.Client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def registry(self) -> Script:
        return self.script("registry", Path(__file__).with_name("registry.py"), self.pull, self.reply)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def close(self) -> None:
        super().close()
        client = getattr(self, "client", None)
        if client is not None:
            client.close()
