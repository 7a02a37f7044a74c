"""The settings of the pool of engines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...engine.errors import ConfigError


@dataclass(frozen=True)
class PoolConfig:
    """How engines are watched, and how requests are spread over them. Raises ConfigError for a value that cannot be."""

    poll_interval_s: float = 1.0
    """Seconds between two looks at an engine, for health and metrics."""
    answer_timeout_s: float = 10.0
    """Seconds within which an engine must say how it is; one that does not gets no requests until it does."""
    stall_timeout_s: float = 60.0
    """With engines elsewhere: seconds without a finished step, although there is work, after which one counts as not
    ready; above the longest step. For its own group a server asks the supervisor instead (step_timeout_s)."""
    restart_wait_s: float = 60.0
    """With engines elsewhere: seconds for which requests wait, once none is left for them, for one to answer at any of
    their addresses, where they go on. After that they fail."""
    affinity_slack: float = 0.25
    """With several engines: how much fuller an engine that has a request's beginning may be than the emptiest one, as a
    share of the requests that it computes at once."""
    affinity_entries: int = 16384
    """With several engines: beginnings of prompts whose engine is remembered."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0 and field.name != "affinity_slack":
                raise ConfigError(f"{field.name}={value!r} is out of range: it must be above 0")
        if not self.affinity_slack >= 0:
            raise ConfigError(f"affinity_slack={self.affinity_slack!r} is out of range: it must be at least 0")
