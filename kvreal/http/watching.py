"""Those who watch a controller: its page, its metrics, its log, its spans. None of them changes what it does."""

from __future__ import annotations

from typing import Any, List, Optional

from fastapi import APIRouter, Depends

from kvreal.http import metrics, page
from kvreal.http.auth import AuthDependency
from kvreal.http.face import Face
from kvreal.logs import StepLog
from kvreal.tracing import tracing


def watching(face: Face, auth: Optional[AuthDependency]) -> List[APIRouter]:
    """Begin to watch; returns the routes that show it. To be called before the service starts."""
    node = face.service.network.address
    face.service.onlookers.append(StepLog(node, lambda address: _who(face, address)).step)
    tracing(node, face.log)
    allowed: List[Any] = [Depends(auth("read"))] if auth is not None else []
    return [page.router(), metrics.router(metrics.Metrics(face.service, face.log), allowed)]


def _who(face: Face, address: str) -> str:
    rank = face.machine.registry.by_address.get(address)
    return f"{rank.register.instance} rank {rank.register.rank}" if rank is not None else ""
