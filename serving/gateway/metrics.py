"""Metrics for Prometheus: vLLM's names where the meaning is the same, names of phalanx's own for the rest.

Counters of an engine come from its Status and start again with it. Times of requests are taken where their events
arrive. Labels have few values: the model's name, the engine's number, and names from fixed lists.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...engine.errors import ERRORS_BY_NAME
from ...engine.protocol.messages import Delta, Event, Failed, Finished, ModelInfo, Status, Submit

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PHASES = ("loading", "ready", "draining", "stopped")
FINISH_REASONS = ("stop", "length", "abort", "error")
OTHER = "other"
"""What a label says in place of a value that is on no list."""
LABELS = ("model_name", "engine")

TOKEN_BUCKETS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))
STEP_TOKEN_BUCKETS = (1, *(2**power for power in range(3, 15)))
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
GAP_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
COUNT_BUCKETS = (1, 2, 5, 10, 20)
MOST_STEPS = 10_000
"""Most steps between two polls that are observed, so that a poll after a long silence blocks nobody."""


@dataclass(frozen=True)
class EngineSample:
    """One engine at the moment of a scrape."""

    engine: str
    """Its number, from 0, in the order of the configuration."""
    phase: str
    """One of PHASES."""
    open_requests: int
    """Requests that this gateway has sent and that have not ended."""
    status: Status | None = None
    info: ModelInfo | None = None


class GatewayMetrics:
    """All metrics of one gateway, in a registry of their own. Safe to use from any thread."""

    def __init__(self, engines: Callable[[], Iterable[EngineSample]] = tuple) -> None:
        """`engines` is called at each scrape."""
        self.model_name = ""
        """The label of every metric; set once it is known, before the first request."""
        self.refused: Callable[[], int] = int
        """Requests that the gateway has refused, since it was full."""
        self.tasks: Callable[[], int] = int
        """Tasks on the gateway's event loop; called at each scrape."""
        self.registry = registry = CollectorRegistry(auto_describe=False)
        registry.register(_Engines(self, engines))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", text, LABELS, buckets=buckets, registry=registry)

        self.ttft = histogram(
            "time_to_first_token_seconds", "From a request's sending to its first token.", TTFT_BUCKETS
        )
        self.gap = histogram(
            "inter_token_latency_seconds", "Between two arrivals of tokens of a completion.", GAP_BUCKETS
        )
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "A request's mean time between output tokens.", GAP_BUCKETS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "From a request's sending to its end.", REQUEST_BUCKETS)
        self.queued = histogram("request_queue_time_seconds", "From arrival to the first step.", REQUEST_BUCKETS)
        self.prefill = histogram("request_prefill_time_seconds", "First step to first token.", REQUEST_BUCKETS)
        self.decode = histogram("request_decode_time_seconds", "First token to the end.", REQUEST_BUCKETS)
        self.inference = histogram("request_inference_time_seconds", "First step to the end.", REQUEST_BUCKETS)

        self.prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS)
        self.generation = histogram("request_generation_tokens", "Output tokens of a request.", TOKEN_BUCKETS)
        self.param_n = histogram("request_params_n", "The parameter n.", COUNT_BUCKETS)
        self.param_max_tokens = histogram("request_params_max_tokens", "The parameter max_tokens.", TOKEN_BUCKETS)
        self.step_tokens = histogram(
            "iteration_tokens_total",
            "Tokens of a step, as the mean of the steps between two polls.",
            STEP_TOKEN_BUCKETS,
        )

        self.success = Counter(
            "vllm:request_success", "Completions that ended.", (*LABELS, "finished_reason"), registry=registry
        )
        self.failures = Counter(
            "phalanx:request_failure", "Requests that failed, by error.", (*LABELS, "error"), registry=registry
        )

    def request(self, engine: str, submit: Submit) -> RequestMetrics:
        """Begin to observe a request that is sent to an engine now."""
        return RequestMetrics(self, (self.model_name, engine), submit)

    def polled(self, engine: str, before: Status | None, status: Status) -> None:
        """Take in a Status, and the one before it of the same engine."""
        if before is None or status.steps <= before.steps:
            return
        steps = min(status.steps - before.steps, MOST_STEPS)
        tokens = _computed(status) - _computed(before)
        if tokens < 0:  # another engine answers at the address now
            return
        step_tokens = self.step_tokens.labels(self.model_name, engine)
        for _ in range(steps):
            step_tokens.observe(tokens / (status.steps - before.steps))

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text format (CONTENT_TYPE)."""
        return generate_latest(self.registry)


class RequestMetrics:
    """Observes one request, from its sending to its last event. Its events come one after the other, on any thread."""

    __slots__ = ("_arrivals", "_gap", "_labels", "_metrics", "_sampling", "_sent", "_started")

    def __init__(self, metrics: GatewayMetrics, labels: tuple[str, str], submit: Submit) -> None:
        self._metrics = metrics
        self._labels = labels
        self._sent = time.monotonic()
        self._started = False
        self._arrivals: dict[int, float] = {}
        self._gap = metrics.gap.labels(*labels)  # looked up once: there is one for each token
        self._sampling = submit.sampling

    def on_event(self, event: Event) -> None:
        """Take in an event of the request, at the moment at which it arrives."""
        if isinstance(event, Delta):
            if event.token_ids:
                self._tokens(event.index)
        elif isinstance(event, Finished):
            self._finished(event)
        elif isinstance(event, Failed):
            error = event.error if event.error in ERRORS_BY_NAME else OTHER
            self._metrics.failures.labels(*self._labels, error).inc()

    def _tokens(self, index: int) -> None:
        now = time.monotonic()
        if not self._started:
            self._started = True
            self._metrics.ttft.labels(*self._labels).observe(now - self._sent)
        before = self._arrivals.get(index)
        if before is not None:
            self._gap.observe(now - before)
        self._arrivals[index] = now

    def _finished(self, event: Finished) -> None:
        metrics = self._metrics
        labels = self._labels
        metrics.e2e.labels(*labels).observe(time.monotonic() - self._sent)
        for completion in event.completions:
            reason = completion.finish_reason if completion.finish_reason in FINISH_REASONS else OTHER
            metrics.success.labels(*labels, reason).inc()

        metrics.prompt.labels(*labels).observe(event.usage.prompt_tokens)
        metrics.generation.labels(*labels).observe(event.usage.completion_tokens)
        metrics.param_n.labels(*labels).observe(self._sampling.n)
        if self._sampling.max_tokens is not None:
            metrics.param_max_tokens.labels(*labels).observe(self._sampling.max_tokens)

        # A request that was aborted while it waited was never computed.
        times = event.timings
        metrics.queued.labels(*labels).observe(times.queued_s)
        if self._started:
            metrics.prefill.labels(*labels).observe(max(0.0, times.ttft_s - times.queued_s))
            metrics.decode.labels(*labels).observe(max(0.0, times.total_s - times.ttft_s))
            metrics.inference.labels(*labels).observe(max(0.0, times.total_s - times.queued_s))
        if times.tpot_ms:
            metrics.per_token.labels(*labels).observe(times.tpot_ms / 1000)


class _Engines(Collector):
    """Gauges and counters of the engines, made at each scrape from what each engine said last."""

    def __init__(self, metrics: GatewayMetrics, engines: Callable[[], Iterable[EngineSample]]) -> None:
        self._metrics = metrics
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        """Yield one family after the other."""
        samples = list(self._engines())
        name = self._metrics.model_name

        phases = GaugeMetricFamily(
            "phalanx:engine_phase", "1 for the phase that an engine is in.", labels=(*LABELS, "phase")
        )
        requests = GaugeMetricFamily("phalanx:open_requests", "Requests of this gateway.", labels=LABELS)
        for sample in samples:
            requests.add_metric((name, sample.engine), sample.open_requests)
            for phase in PHASES:
                phases.add_metric((name, sample.engine, phase), float(phase == sample.phase))
        refused = CounterMetricFamily(
            "phalanx:requests_refused", "Requests answered 429, since the gateway was full.", labels=("model_name",)
        )
        refused.add_metric((name,), self._metrics.refused())
        tasks = GaugeMetricFamily("phalanx:gateway_tasks", "Tasks on the gateway's event loop.", labels=("model_name",))
        tasks.add_metric((name,), self._metrics.tasks())
        yield from (phases, requests, refused, tasks)

        yield _cache_config(name, samples)
        said = [(sample.engine, sample.phase, sample.status) for sample in samples if sample.status is not None]
        # What has stopped computes nothing: what it said last is no state of it.
        yield from _gauges(name, [(engine, status) for engine, phase, status in said if phase != "stopped"])
        yield from _from_status(name, [(engine, status) for engine, _, status in said])


def _computed(status: Status) -> int:
    """Tokens computed since the engine's start."""
    return status.prompt_tokens + status.generation_tokens


def _cache_config(name: str, samples: list[EngineSample]) -> Metric:
    labels = (*LABELS, "block_size", "num_gpu_blocks", "enable_prefix_caching")
    family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache's configuration.", labels=labels)
    for sample in samples:
        info = sample.info
        if info is not None:
            values = (str(info.block_size), str(info.total_blocks), str(info.prefix_cache))
            family.add_metric((name, sample.engine, *values), 1.0)
    return family


_Reading = Callable[[Status], float]

_GAUGES: tuple[tuple[str, str, _Reading], ...] = (
    ("vllm:num_requests_running", "Requests being computed.", lambda s: s.running),
    ("vllm:num_requests_waiting", "Requests that wait.", lambda s: s.waiting),
    (
        "vllm:kv_cache_usage_perc",
        "Share of the KV blocks in use; 1 is all.",
        lambda s: 1 - s.free_blocks / s.total_blocks if s.total_blocks else 0.0,
    ),
    ("phalanx:waiting_tokens", "Prompt tokens of the requests that wait.", lambda s: s.waiting_tokens),
    ("phalanx:stalled_seconds", "Since the step loop last went on although it has work.", lambda s: s.stalled_s),
)
_COUNTERS: tuple[tuple[str, str, _Reading], ...] = (
    ("vllm:num_preemptions", "Preemptions.", lambda s: s.preemptions),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens served from the prefix cache.", lambda s: s.prefix_hits),
    (
        "vllm:prompt_tokens",
        "Prompt tokens, those from the prefix cache included.",
        lambda s: s.prompt_tokens + s.prefix_hits,
    ),
    ("vllm:generation_tokens", "Tokens sampled.", lambda s: s.generation_tokens),
    ("phalanx:steps", "Steps of the engine.", lambda s: s.steps),
)


def _gauges(name: str, statuses: list[tuple[str, Status]]) -> Iterator[Metric]:
    for title, text, read in _GAUGES:
        gauge = GaugeMetricFamily(title, text, labels=LABELS)
        for engine, status in statuses:
            gauge.add_metric((name, engine), read(status))
        yield gauge


def _from_status(name: str, statuses: list[tuple[str, Status]]) -> Iterator[Metric]:
    for title, text, read in _COUNTERS:
        counter = CounterMetricFamily(title, text, labels=LABELS)
        for engine, status in statuses:
            counter.add_metric((name, engine), read(status))
        yield counter

    phases = CounterMetricFamily(
        "phalanx:step_phase_seconds", "Seconds that the step loop spent in each phase.", labels=(*LABELS, "phase")
    )
    memory = GaugeMetricFamily(
        "phalanx:peak_memory_bytes", "Memory of a rank when the engine became ready.", labels=(*LABELS, "rank")
    )
    waits = CounterMetricFamily(
        "phalanx:rank_wait_seconds",
        "Seconds that a rank has waited for the others in sums and gathers: the slowest rank has least.",
        labels=(*LABELS, "rank"),
    )
    for engine, status in statuses:
        for phase, seconds in status.phase_seconds.items():
            phases.add_metric((name, engine, phase), seconds)
        for rank, size in enumerate(status.peak_memory):
            memory.add_metric((name, engine, str(rank)), size)
        for rank, seconds in enumerate(status.rank_wait_seconds):
            waits.add_metric((name, engine, str(rank)), seconds)
    yield from (phases, memory, waits)
