"""A real Chromium for tests, asked by the WebDriver protocol. Skips by name where there is none.

    apt-get install -y chromium chromium-driver
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import httpx
import pytest

from kvreal.ports import free_port
from tests.real.http.cluster import eventually

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-default-apps", "--no-proxy-server", "--hide-scrollbars",
)  # fmt: skip
DESKTOP = (1280, 900)
PHONE = (390, 844)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def programs() -> Tuple[str, str]:
    """(browser, driver), or a skip that says what is missing."""
    browser = os.environ.get("KVMOVE_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), "")
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no Chromium here: apt-get install -y chromium chromium-driver")
    return browser, driver


class Page:
    """One window."""

    def __init__(self, session: httpx.Client) -> None:
        self.session: httpx.Client = session

    def _ask(self, method: str, path: str, **body: Any) -> Any:
        answer = self.session.request(method, path, json=body if method == "POST" else None)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def open(self, url: str) -> None:
        self._ask("POST", "/url", url=url)

    def run(self, script: str, *args: Any) -> Any:
        """The value of a function's body, run in the page."""
        return self._ask("POST", "/execute/sync", script=script, args=list(args))

    def text(self, selector: str) -> str:
        """What a reader sees of an element."""
        found: str = self.run("return (document.querySelector(arguments[0])||{}).innerText||''", selector)
        return found

    def complaints(self) -> Any:
        """What the browser's console has said since this was last asked."""
        return self._ask("POST", "/se/log", type="browser")

    def cdp(self, command: str, **params: Any) -> Any:
        return self._ask("POST", "/goog/cdp/execute", cmd=command, params=params)

    def size(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1,
                 mobile=phone)  # fmt: skip
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.cdp("Emulation.setEmulatedMedia", features=scheme)

    def shoot(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page."""
        found = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    browser, driver = programs()
    port = free_port()
    with (folder / "chromedriver.log").open("w") as log:
        process = subprocess.Popen(
            [driver, f"--port={port}", "--allowed-ips=127.0.0.1"],
            stdout=log, stderr=log, start_new_session=True, env={**os.environ, "HOME": str(folder)},
        )  # fmt: skip
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
    try:
        eventually(lambda: _ready(http), 20, "chromedriver is ready")
        options: Dict[str, Any] = {"binary": browser, "args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = http.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
        assert answer.status_code == 200, answer.text
        session = answer.json()["value"]["sessionId"]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/session/{session}", timeout=60, trust_env=False) as one:
            page = Page(one)
            page.size(*DESKTOP)
            try:
                yield page
            finally:
                one.delete("")
    finally:
        http.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with whatever of the browser is left
        process.wait()


def _ready(http: httpx.Client) -> bool:
    try:
        return bool(http.get("/status").json()["value"]["ready"])
    except httpx.TransportError:
        return False
