"""The live page in a real Chromium: a topology is started, something moves, and the page shows it by itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Dict, Iterator, List

import httpx
import pytest

pytest.importorskip("zmq")

from tests.real.http.browser import DESKTOP, PHONE, Page, chromium, programs
from tests.real.http.cluster import CPU, Cluster, cluster, eventually
from tests.real.http.processes import commands

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

TOPOLOGY = """\
name: watched
kv: {bytes_per_token: 4 KiB, chunk: 16 tokens}
constants: {beat: 200 ms, dead: 20 s}
instances:
  a: {locations: {LocalCPUBackend: 1 MiB, LocalDiskBackend: 1 MiB}}
  b: {locations: {LocalCPUBackend: 1 MiB}}
"""
PROMPT = list(range(100))  # seven chunks of sixteen
#: contrast of an element's text and what is behind it, as WCAG reckons it
CONTRAST = """
const rgb = c => c.match(/[\\d.]+/g).map(Number);
const lum = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                   return .2126 * r + .7152 * g + .0722 * b; };
const behind = e => {
  for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] !== 0) return c; }
};
const worst = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || !e.offsetParent) continue;
  const [a, b] = [lum(rgb(getComputedStyle(e).color)), lum(behind(e))].sort((x, y) => y - x);
  const px = parseFloat(getComputedStyle(e).fontSize);
  worst.push([(a + .05) / (b + .05), px, e.tagName + "." + e.className + ": " + e.textContent.slice(0, 30)]);
}
return worst;
"""


class Shown:
    """A topology, and the page of its controller."""

    def __init__(self, page: Page, url: str, ports: Dict[str, int], pids: Dict[str, int]) -> None:
        self.page: Page = page
        self.url: str = url
        self.ports: Dict[str, int] = ports
        self.pids: Dict[str, int] = pids

    def store(self, instance: str, prompt: List[int]) -> None:
        url = f"http://localhost:{self.ports[instance]}/v1/completions"
        answer = httpx.post(url, json={"prompt": prompt}, timeout=60)
        assert answer.status_code == 200, answer.text

    def move(self, src: str, dst: str, prompt: List[int]) -> str:
        body = {"old_position": [src, CPU], "new_position": [dst, CPU], "tokens": prompt}
        event: str = httpx.post(f"{self.url}/move", json=body, timeout=60).json()["event_id"]
        return event

    def says(self, selector: str, *words: str) -> str:
        """What an element says, once it says all these words."""

        def found() -> str:
            text = self.page.text(selector)
            return text if all(word in text for word in words) else ""

        return eventually(found, 15, f"{selector} says {words}: {self.page.text(selector)}")


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    programs()
    with chromium(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module")
def shown(window: Page, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "t.yaml").write_text(TOPOLOGY)
    argv = ["up", "t.yaml", "--port", "0", "--instance-port", "0", "--pull-port", "0", "--reply-port", "0"]
    with commands(folder) as start:
        up = start("up", [*argv, "--transport", "tcp"])
        said = up.until_says("up: http://")
        ports = {who: int(port) for who, port in re.findall(r"^(\w+): http://localhost:(\d+)", said, re.M)}
        url = f"http://localhost:{ports['controller']}"
        children = Path(f"/proc/{up.process.pid}/task/{up.process.pid}/children").read_text().split()
        pids = {name: pid for pid in map(int, children) if (name := _instance(pid))}
        window.open(f"{url}/")
        try:
            yield Shown(window, url, ports, pids)
        finally:
            for pid in pids.values():
                os.kill(pid, signal.SIGCONT)
            assert up.stop(signal.SIGINT) == 0


def _instance(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return Path(words[words.index("--config") + 1]).stem if "--config" in words else ""


def test_instances_with_their_pools_appear_and_fill(shown: Shown) -> None:
    text = shown.says("#instances", "a", "b", "LocalDiskBackend")
    assert "0 of 16 chunks" in text
    shown.says("#live", "live")
    shown.store("a", PROMPT)
    shown.says("#instances", "7 of 16 chunks")  # by itself: nothing is reloaded


def test_a_move_is_seen_in_flight_and_done(shown: Shown) -> None:
    """The destination stands still for a moment, so that the move is in flight for as long as it takes to look."""
    prompt = [7000 + token for token in PROMPT]
    shown.store("a", prompt)
    os.kill(shown.pids["b"], signal.SIGSTOP)
    try:
        mover = subprocess.Popen(
            ["curl", "-s", f"{shown.url}/move", "-H", "Content-Type: application/json", "-d",
             f'{{"old_position": ["a", "{CPU}"], "new_position": ["b", "{CPU}"], "tokens": {prompt}}}'],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        shown.says("#moves", "a → b", "reserving")
        shown.says("#t-flight", "1")
        assert shown.page.run("return document.querySelectorAll('#moves .steps i.past').length") == 1
        assert shown.page.run("return document.querySelectorAll('#moves .steps i.now').length") == 1
    finally:
        os.kill(shown.pids["b"], signal.SIGCONT)
    answer, _ = mover.communicate(timeout=30)
    assert '"num_tokens":100' in answer
    shown.says("#moves", "a → b", "done", "100 tokens")
    shown.says("#t-flight", "0")
    shown.says("#t-done", "1")
    row = shown.says("#events .event:first-child", "a → b", "done", "100 tokens", "tcp")
    assert "ago" in row
    assert "/s while copying" in shown.says("#links", "a → b", "400 KiB in 1 move")
    pool = "#instances > [data-key=b] .pool"
    shown.says(pool, "7 of 16 chunks")
    eventually(
        lambda: shown.page.run("return document.querySelector(arguments[0] + ' .bar i').style.width", pool) == "43.75%",
        what="the bar of b",
    )


def test_an_event_says_why_and_opens(shown: Shown) -> None:
    event = shown.move("b", "a", [9999] * 40)
    shown.says("#events .event:first-child", event, "failed", "nothing_held")
    shown.page.run("document.querySelector('#events .event:first-child').click()")
    text = shown.says("#about", event, "nothing_held", "untouched")
    assert "at the source" in text
    shown.page.run("document.querySelector('#about-close').click()")
    shown.page.run("document.querySelector('#filters [data-show=done]').click()")
    eventually(lambda: "failed" not in shown.page.text("#events"), what="only what is done")
    shown.page.run("document.querySelector('#filters [data-show=\"\"]').click()")


def test_leases_and_drains_are_shown(shown: Shown) -> None:
    prompts = [[first + token for token in range(32)] for first in (20_000, 30_000, 40_000)]
    for prompt in prompts:
        shown.store("b", prompt)
    lease = {"instance_id": "b", "location": CPU, "tokens": prompts[0], "seconds": 60}

    def leased() -> str:
        answer = httpx.post(f"{shown.url}/lease", json=lease, timeout=60).json()
        return str(answer["event_id"]) if answer["num_tokens"] == 32 else ""

    event = eventually(leased, what="the controller knows what b holds")
    shown.says("#events", event, "held", "s left")
    assert httpx.post(f"{shown.url}/unpin", json={"event_id": event}, timeout=60).status_code == 200
    shown.says("#events", "unpinned")
    body = {"instance_id": "b", "to": ["a"]}
    drain = httpx.post(f"{shown.url}/drain", json=body, timeout=60).json()
    assert httpx.get(f"{shown.url}/events/{drain['event_id']}/wait", timeout=60).json()["state"] == "done"
    shown.says("#moves", "drain b → a", "done", f"{drain['num_tokens']} of {drain['num_tokens']} tokens")
    shown.says("#instances > [data-key=b] .pool", "0 of 16 chunks")


def test_it_is_readable_on_a_desk_on_a_phone_and_in_the_dark(shown: Shown, tmp_path: Path) -> None:
    """Nothing is wider than the screen, nothing is smaller than 12 px, and text stands out from what is behind it."""
    page = shown.page
    shown.move("a", "b", [8888] * 40)
    shown.says("#events", "nothing_held")
    try:
        for phone in (False, True):
            for dark in (False, True):
                width, height = PHONE if phone else DESKTOP
                page.size(width, height, phone=phone, dark=dark)
                eventually(lambda wide=width: page.run("return innerWidth") == wide, what="it has its size")
                assert page.run("return document.documentElement.scrollWidth <= innerWidth")
                found = page.run(CONTRAST)
                assert len(found) > 20
                low = [what for contrast, px, what in found if contrast < 4.5 or px < 12]
                assert not low, (phone, dark)
                page.shoot(tmp_path / f"page-{width}{'-dark' if dark else ''}.png")
    finally:
        page.size(*DESKTOP)


def test_nothing_comes_from_elsewhere(shown: Shown) -> None:
    names = shown.page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert names and all(name.startswith(f"{shown.url}/") for name in names), names
    assert httpx.get(f"{shown.url}/").headers["content-security-policy"].startswith("default-src 'none'")
    assert not [line for line in shown.page.complaints() if "Failed to load" in line["message"]]


# ---- with workers in this process
@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "tokens").write_text("read readreadreadread\nmove movemovemovemove\n")
    (tmp_path / "tokens").chmod(0o600)
    found = cluster(tmp_path, "--tokens", str(tmp_path / "tokens"))
    try:
        yield found
    finally:
        found.close()


def test_it_asks_for_a_token_and_outlives_the_controller(window: Page, alone: Cluster) -> None:
    """A name that looks like HTML is shown as what it is; a restart is survived without a reload."""
    name = "<img src=x onerror=alert(1)>"
    alone.workers.add(name)
    window.open(f"http://127.0.0.1:{alone.controller.port}/")
    eventually(lambda: window.run("return document.querySelector('#ask').open"), what="it asks for a token")
    window.run("document.querySelector('#token').value = arguments[0]", "readreadreadread")
    window.run("document.querySelector('#token-go').click()")
    eventually(lambda: name in window.text("#instances"), what="the instance is shown")
    assert window.run("return document.querySelectorAll('img').length") == 0
    eventually(lambda: "incarnation 1" in window.text("#sum"), what="the controller's life is shown")
    alone.controller.kill()
    eventually(lambda: "not connected" in window.text("#live"), what="it says that nobody answers")
    alone.controller.start()
    eventually(lambda: window.text("#live") == "live" and "incarnation 2" in window.text("#sum"), what="it is back")
    eventually(lambda: "1 rank" in window.text("#instances"), what="the instance is back")
