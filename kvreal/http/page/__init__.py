"""The live page at ``/``: one file, no library, nothing from elsewhere. It reads /instances, /events and /stream."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

PAGE: Final = Path(__file__).with_name("index.html")
_POLICY: Final = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


def router() -> APIRouter:
    """GET /. The page holds no data: what it shows it asks for, with the token that it asks its reader for."""
    routes = APIRouter()
    text = PAGE.read_text()

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"})

    return routes
