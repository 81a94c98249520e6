"""The interface's documentation at ``/docs``: Swagger UI from an installed package, so that it works without internet.

Nothing in the page names another host, and its policy lets the browser load from this one only.
"""

from __future__ import annotations

import html
from importlib import resources
from typing import Dict, Final, Tuple

from fastapi import APIRouter
from fastapi.responses import Response

PACKAGE: Final = "fastapi_offline"
"""Where Swagger UI's files lie, beside much else; only the files are used."""
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
# validatorUrl: by default the page would send the document's address to a validator on the internet.
START: Final = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#docs", deepLinking: true, validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis], layout: "BaseLayout",
});
"""
PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="docs">{without}</div>
{scripts}
</body>
</html>
"""
SCRIPTS: Final = '<script src="docs/swagger-ui-bundle.js"></script>\n<script src="docs/start.js"></script>'
WITHOUT: Final = """<p>The interface is described in <a href="openapi.json">openapi.json</a>.
To read it here: <code>pip install 'kvmove[service]'</code>, and start this again.</p>"""
ASSETS: Final[Dict[str, Tuple[str, str]]] = {
    "/docs/swagger-ui-bundle.js": ("swagger-ui-bundle.js", "text/javascript"),
    "/docs/swagger-ui.css": ("swagger-ui.css", "text/css"),
}


def router(title: str) -> APIRouter:
    """``/docs`` and what it loads. Without the package the page says so, and names the document itself."""
    routes = APIRouter()
    try:
        static = resources.files(PACKAGE) / "static"
        found = {path: ((static / name).read_bytes(), kind) for path, (name, kind) in ASSETS.items()}
    except (ImportError, OSError):
        found = {}
    if found:
        found["/docs/start.js"] = (START.encode(), "text/javascript")
    page = PAGE.format(title=html.escape(title), scripts=SCRIPTS if found else "", without="" if found else WITHOUT)
    _add(routes, "/docs", page.encode(), "text/html", "no-store")
    for path, (text, kind) in found.items():
        _add(routes, path, text, kind, "max-age=3600")
    return routes


def _add(routes: APIRouter, path: str, text: bytes, kind: str, cache: str) -> None:
    @routes.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(text, headers={**HEADERS, "Cache-Control": cache}, media_type=f"{kind}; charset=utf-8")
