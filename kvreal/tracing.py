"""OpenTelemetry spans of events and their phases, where the SDK is installed; nothing where it is not.

A span is made when its event has ended, from the event's own times, so nothing is done on a move's way. Where spans go
is said by OpenTelemetry's own variables: ``OTEL_TRACES_EXPORTER=console``, or ``OTEL_EXPORTER_OTLP_ENDPOINT=URL``.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Dict, Optional

from kvreal.http.events import EventLog
from kvreal.http.models import EventView

log = logging.getLogger("kvmove.tracing")


class Spans:
    """Listens to the log's ended events."""

    def __init__(self, provider: Any, events: EventLog) -> None:
        self.tracer: Any = provider.get_tracer("kvmove")
        events.on_ended.append(self.ended)

    def ended(self, view: EventView) -> None:
        if not isinstance(view.begun, float) or not isinstance(view.ended, float):
            return  # begun in an earlier life of the controller: its beginning is not known
        from opentelemetry import trace

        begun_ns, ended_ns = round(view.begun * 1e9), round(view.ended * 1e9)
        span = self.tracer.start_span(f"kvmove.{view.kind}", start_time=begun_ns, attributes=attributes(view))
        inside = trace.set_span_in_context(span)
        at = begun_ns
        # A drain's are its children's, which have spans of their own.
        phases = view.phases_s if isinstance(view.phases_s, dict) and view.kind != "drain" else {}
        for name, seconds in phases.items():
            phase = self.tracer.start_span(f"kvmove.{name}", context=inside, start_time=at)
            at += round(seconds * 1e9)
            phase.end(end_time=at)
        if view.state == "failed":
            span.set_status(trace.Status(trace.StatusCode.ERROR, view.reason if isinstance(view.reason, str) else ""))
        span.end(end_time=ended_ns)


def attributes(view: EventView) -> Dict[str, Any]:
    found: Dict[str, Any] = {
        "kvmove.event": view.event_id,
        "kvmove.state": view.state,
        "kvmove.num_tokens": view.num_tokens,
    }
    for name in ("reason", "detail", "transport", "bytes", "parent"):
        value = getattr(view, name)
        if isinstance(value, (str, int)) and value:
            found[f"kvmove.{name}"] = value
    if isinstance(view.old_position, (list, tuple)):
        found["kvmove.source"] = "/".join(view.old_position)
    if isinstance(view.new_positions, list):
        found["kvmove.destinations"] = ["/".join(place) for place in view.new_positions]
    return found


def provider_of(node: str) -> Optional[Any]:
    """Where spans go; None: there is no SDK, or nobody has said where to."""
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
    except ImportError:
        return None
    already = trace.get_tracer_provider()
    if isinstance(already, TracerProvider):  # by opentelemetry-instrument
        return already
    wanted = os.environ.get("OTEL_TRACES_EXPORTER", "")
    url = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    exporter: Any
    if wanted == "console":
        exporter = ConsoleSpanExporter(out=sys.stderr, formatter=lambda span: str(span.to_json(indent=None)) + "\n")
    elif wanted in ("", "otlp") and (url or wanted):
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            log.warning("no spans are sent: pip install opentelemetry-exporter-otlp-proto-http")
            return None
        exporter = OTLPSpanExporter()
    else:
        return None
    resource = Resource.create({"service.name": "kvmove-controller", "service.instance.id": node})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def tracing(node: str, events: EventLog) -> Optional[Spans]:
    """Begin to make spans of ``events``, if somebody wants them."""
    provider = provider_of(node)
    return Spans(provider, events) if provider is not None else None
