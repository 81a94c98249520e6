"""The live page at ``/``: three files, no library, nothing from elsewhere. It reads /instances, /events and /stream."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Final, Tuple

from fastapi import APIRouter
from fastapi.responses import Response

HERE: Final = Path(__file__).parent
FILES: Final[Dict[str, Tuple[str, str]]] = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def router() -> APIRouter:
    """The page's files. They hold no data: what it shows it asks for, with the token that it asks its reader for."""
    routes = APIRouter()
    for path, (name, kind) in FILES.items():
        _add(routes, path, (HERE / name).read_bytes(), f"{kind}; charset=utf-8")
    return routes


def _add(routes: APIRouter, path: str, text: bytes, kind: str) -> None:
    @routes.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(text, headers=HEADERS, media_type=kind)
