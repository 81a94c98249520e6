"""/docs: whole without internet. The page names no other host, may load from none, and what it loads is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator, List
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kvreal.http import docs
from tests.real.http.browser import chromium
from tests.real.http.cluster import Cluster, cluster, eventually

HERE = "http://testserver/docs"


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = FastAPI(title="a title", docs_url=None, redoc_url=None)
    app.include_router(docs.router(app.title))
    with TestClient(app) as found:
        yield found


def loads(page: str) -> List[str]:
    """What the page makes a browser fetch, and the document that its script asks for."""
    return [*re.findall(r'(?:src|href)="(?!data:)([^"]*)"', page), "openapi.json"]


def test_everything_that_the_page_loads_is_here(client: TestClient) -> None:
    pytest.importorskip(docs.PACKAGE)
    answer = client.get("/docs")
    assert answer.status_code == 200
    assert "a title" in answer.text
    found = loads(answer.text)
    assert len(found) == 4
    for reference in found:
        url = urljoin(HERE, reference)
        assert urlsplit(url).netloc == "testserver", f"{reference} is somebody else's"
        assert client.get(url).status_code == 200, reference
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http:" not in policy and "https:" not in policy and "*" not in policy
    assert "validatorUrl: null" in client.get("/docs/start.js").text, "else the page asks a validator on the internet"
    # 3.1 is what FastAPI writes; Swagger UI reads it since 5.
    version = re.search(r'PACKAGE_VERSION:"(\d+)\.', client.get("/docs/swagger-ui-bundle.js").text)
    assert version is not None
    assert int(version.group(1)) >= 5


def test_without_the_package_the_page_says_so(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "PACKAGE", "a_package_that_is_not_there")
    app = FastAPI(docs_url=None, redoc_url=None)
    app.include_router(docs.router("t"))
    page = TestClient(app).get("/docs")
    assert page.status_code == 200
    assert "<script" not in page.text
    assert "pip install 'kvmove[service]'" in page.text


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = cluster(tmp_path_factory.mktemp("docs"))
    try:
        yield found
    finally:
        found.close()


@pytest.mark.real
def test_a_browser_shows_every_route_and_asks_nobody_else(shared: Cluster, tmp_path: Path) -> None:
    pytest.importorskip(docs.PACKAGE)
    url = f"http://127.0.0.1:{shared.controller.port}"
    with chromium(tmp_path) as page:
        page.open(f"{url}/docs")
        shown = eventually(lambda: page.run("return document.querySelectorAll('.opblock').length"))
        document = httpx.get(f"{url}/openapi.json").json()
        assert shown == sum(len(routes) for routes in document["paths"].values())
        asked = page.run("return performance.getEntriesByType('resource').map(one => one.name)")
        assert {urlsplit(one).netloc for one in asked if not one.startswith("data:")} == {urlsplit(url).netloc}
