"""What the gateway needs of the engines behind it: where requests go and their events come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from ...engine.protocol.messages import Detokenize, Event, ModelInfo, ModelInfoRequest, StatusRequest, Submit, Tokenize

OnEvent = Callable[[Event], None]
Question = Tokenize | Detokenize | ModelInfoRequest | StatusRequest


@dataclass(frozen=True)
class PoolState:
    """Whether requests are taken, and if not, why."""

    phase: Literal["loading", "ready", "draining", "stopped"]
    reason: str = ""
    """A sentence for the caller; empty while all is well. Also says why ready() is False in the phase "ready"."""


class Ticket(Protocol):
    """One submitted request."""

    def abort(self) -> None:
        """End the request early, from any thread, any number of times; its Finished still comes."""


class Submits(Protocol):
    """Where requests are sent."""

    def submit(self, submit: Submit, on_event: OnEvent, *, affinity: bytes = b"") -> Ticket:
        """As EnginePool.submit."""


class EnginePool(Submits, Protocol):
    """One engine or several of the same model. Every method returns at once; all are called on the event loop."""

    @property
    def state(self) -> PoolState:
        """The phase of all engines together: "ready" while at least one takes requests."""

    def ready(self) -> bool:
        """Whether a request sent now would be computed: an engine takes requests and its step loop goes on."""

    def models(self) -> Mapping[str, ModelInfo]:
        """The model by each name it is served under, the main one first; empty until an engine has answered."""

    def submit(self, submit: Submit, on_event: OnEvent, *, affinity: bytes = b"") -> Ticket:
        """Send a request to one of the engines.

        `on_event` gets its events on any thread, in order (Accepted, Delta..., Finished, or Failed at any point); the
        last one is a Finished or Failed. It returns at once and never raises. Requests with the same `affinity` (a
        digest of how their prompt begins) go to the same engine while its load allows. Raises CapacityExceeded,
        EngineStopped or InvalidRequest for what is refused at once; `on_event` is not called then.
        """

    async def ask(self, command: Question) -> Event:
        """Send a question to one of the engines and return its answer: Tokenized, Detokenized, ModelInfo or Status.

        A Failed is raised as its error; EngineStopped without an engine, Timeout without an answer in time.
        """
