"""What /metrics tells of the journal."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .journaling import Journaling


class JournalMetrics(Collector):
    """Made at each scrape; it reads no file."""

    def __init__(self, journaling: Journaling) -> None:
        self._journaling = journaling

    def collect(self) -> Iterator[Metric]:
        """Yield one family after the other."""
        size = self._journaling.journal.size
        used = GaugeMetricFamily("phalanx:journal_bytes", "Bytes that the journal holds.")
        used.add_metric((), size.bytes)
        requests = GaugeMetricFamily("phalanx:journal_requests", "Requests in the journal.", labels=("state",))
        requests.add_metric(("unfinished",), size.unfinished)
        requests.add_metric(("finished",), size.finished)
        recovered = CounterMetricFamily(
            "phalanx:journal_requests_recovered", "Requests answered, of batches and of earlier processes."
        )
        recovered.add_metric((), self._journaling.recovery.recovered)
        yield from (used, requests, recovered)
