"""Those who watch a controller: its page, its metrics, its log, its spans. None of them changes what it does."""

from __future__ import annotations

from typing import Any, List, Optional

from fastapi import APIRouter, Depends

from kvreal.http import metrics, page
from kvreal.http.app import AuthDependency
from kvreal.http.face import Face
from kvreal.logs import StepLog


def watching(face: Face, auth: Optional[AuthDependency]) -> List[APIRouter]:
    """Begin to watch; returns the routes that show it. To be called before the service starts."""
    face.service.listeners.append(StepLog(face.service.network.address).step)
    allowed: List[Any] = [Depends(auth("read"))] if auth is not None else []
    return [page.router(), metrics.router(metrics.Metrics(face.service, face.log), allowed)]
