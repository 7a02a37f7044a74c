"""OpenTelemetry: a span for each request that an engine gets, with the attributes that vLLM's server gives to its own.

Spans hold names, counts and times; nothing of a prompt or of an answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from ...engine.errors import ConfigError, PhalanxError
from ...engine.protocol.messages import Event, Failed, Finished, Submit
from .config import VERSION
from .engine_pool import OnEvent, Submits, Ticket

SPAN = "llm_request"
TRACES_PATH = "/v1/traces"
_CONTEXT_HEADERS = (b"traceparent", b"tracestate")


class Tracing:
    """Makes spans, and hands each to a provider once its request has ended. Any thread may use it."""

    def __init__(self, provider: Any) -> None:
        """`provider` is a TracerProvider of OpenTelemetry's SDK, which is shut down with this."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._propagator = TraceContextTextMapPropagator()
        self._provider = provider
        self._tracer = provider.get_tracer("phalanx", VERSION)

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """Send spans to a collector by OTLP over HTTP, in batches, from a thread of its own.

        What else there is to say, OpenTelemetry's own variables say: OTEL_SERVICE_NAME, OTEL_EXPORTER_OTLP_HEADERS.
        Raises ConfigError without the packages.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"otlp_endpoint={endpoint!r} needs the package {error.name}: install the extra otel "
                f"(pip install phalanx[otel]), or leave otlp_endpoint unset"
            ) from error
        url = endpoint.rstrip("/") + ("" if urlsplit(endpoint).path.strip("/") else TRACES_PATH)
        name = OTELResourceDetector().detect().attributes.get("service.name", "phalanx")
        provider = TracerProvider(resource=Resource.create({"service.name": name, "service.version": VERSION}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        return cls(provider)

    def around(
        self, pool: Submits, headers: Iterable[tuple[bytes, bytes]], request_id: str, model: str
    ) -> TracedSubmits:
        """The pool for the requests of one HTTP request; `headers` may hold the caller's traceparent."""
        carrier = {name.decode(): value.decode("latin-1") for name, value in headers if name in _CONTEXT_HEADERS}
        return TracedSubmits(self, pool, self._propagator.extract(carrier), request_id, model)

    def begin(self, context: Any, submit: Submit, request_id: str, model: str) -> RequestSpan:
        """Begin the span of a request that is sent now."""
        from opentelemetry.trace import SpanKind

        sampling = submit.sampling
        attributes = {
            "gen_ai.request.id": request_id,
            "gen_ai.request.n": sampling.n,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.response.model": model,
        }
        span = self._tracer.start_span(
            SPAN,
            context=context,
            kind=SpanKind.SERVER,
            attributes={name: value for name, value in attributes.items() if value is not None},
        )
        return RequestSpan(span)

    def close(self) -> None:
        """Send what has not been sent yet, for some seconds at most."""
        self._provider.shutdown()


class RequestSpan:
    """The span of one request; its events come one after the other, on any thread."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def on_event(self, event: Event) -> None:
        """Take in an event; the last one ends the span."""
        if isinstance(event, Failed):
            self.fail(event.error)
        elif isinstance(event, Finished):
            self._span.set_attributes(_attributes(event))
            self._span.end()

    def fail(self, error: str) -> None:
        """End the span of a request that was refused or failed; `error` names a type of engine/errors.py."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("error.type", error)
        self._span.set_status(StatusCode.ERROR)
        self._span.end()


class TracedSubmits:
    """A pool, as Generation uses it, that makes a span of each request."""

    def __init__(self, tracing: Tracing, pool: Submits, context: Any, request_id: str, model: str) -> None:
        self._tracing = tracing
        self._pool = pool
        self._context = context
        self._request_id = request_id
        self._model = model

    def submit(self, submit: Submit, on_event: OnEvent, *, affinity: bytes = b"") -> Ticket:
        """As EnginePool.submit."""
        span = self._tracing.begin(self._context, submit, self._request_id, self._model)

        def traced(event: Event) -> None:
            span.on_event(event)
            on_event(event)

        try:
            return self._pool.submit(submit, traced, affinity=affinity)
        except PhalanxError as error:
            span.fail(type(error).__name__)
            raise


def _attributes(event: Finished) -> dict[str, Any]:
    times = event.timings
    usage = event.usage
    attributes: dict[str, Any] = {
        "gen_ai.usage.prompt_tokens": usage.prompt_tokens,
        "gen_ai.usage.completion_tokens": usage.completion_tokens,
        "gen_ai.usage.num_sequences": len(event.completions),
        "gen_ai.response.finish_reasons": [completion.finish_reason for completion in event.completions],
        "gen_ai.latency.time_in_queue": times.queued_s,
        "gen_ai.latency.e2e": times.total_s,
    }
    if usage.completion_tokens:  # otherwise there was no first token
        attributes |= {
            "gen_ai.latency.time_to_first_token": times.ttft_s,
            "gen_ai.latency.time_in_model_prefill": max(0.0, times.ttft_s - times.queued_s),
            "gen_ai.latency.time_in_model_decode": max(0.0, times.total_s - times.ttft_s),
            "gen_ai.latency.time_in_model_inference": max(0.0, times.total_s - times.queued_s),
        }
    return attributes
