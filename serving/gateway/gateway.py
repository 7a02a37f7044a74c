"""What the routes share: the engines, the bounds, the model's names."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Mapping

from ...engine.protocol.messages import Event, ModelInfo
from .config import GatewayConfig
from .durable.journaling import Journaling
from .engine_pool import EnginePool, Question, Submits
from .generation.admission import Admission
from .generation.bridge import EventBridge
from .generation.generation import Generation, Limits
from .generation.response_store import ResponseStore
from .http.errors import ApiError, invalid, unavailable
from .http.exchange import BodyBudget, Exchange
from .tracing import Tracing

_AFFINITY_CHARS = 2048


class Gateway:
    """One for each app; used on its event loop alone."""

    def __init__(self, pool: EnginePool, config: GatewayConfig) -> None:
        self.pool = pool
        self.config = config
        self.admission = Admission(config)
        self.bodies = BodyBudget(config.max_open_body_bytes)
        self.journaling = None if config.journal is None else Journaling(config.journal, pool, config, self.bodies)
        self.responses = ResponseStore(config) if self.journaling is None else self.journaling.responses
        self.created = int(time.time())
        self.tracing = None if config.otlp_endpoint is None else Tracing.to(config.otlp_endpoint)
        self._bridge: EventBridge | None = None
        # The engines' names of requests are the gateway's own: two callers may choose the same request_id.
        self._prefix, self._numbers = uuid.uuid4().hex[:12], itertools.count()

    def new_id(self) -> str:
        """A name for a request to an engine, which no other has."""
        return f"{self._prefix}-{next(self._numbers)}"

    def check_open(self) -> None:
        """Raise ApiError (503) unless requests are taken."""
        state = self.pool.state
        if state.phase != "ready":
            code = {"loading": "loading", "draining": "draining"}.get(state.phase, "stopped")
            reason = state.reason or {
                "loading": "the model is being loaded; try again soon",
                "draining": "the server is about to stop and takes no more requests",
                "stopped": "the engine has stopped",
            }.get(state.phase, state.phase)
            raise unavailable(reason, code)

    def model(self, name: str | None) -> tuple[str, ModelInfo]:
        """The name that answers give, and the model, for the name that a request has; an empty one is as good as none.

        Raises ApiError: 503 while it is loaded, 404 for another, 400 without a name where one is required.
        """
        models = self.known_models()
        if not name:
            if self.config.require_model:
                known = ", ".join(models)
                raise invalid(f"model is required: name one of {known}", "model", "missing_required_parameter")
            name = next(iter(models))
        return name, self.model_named(name)

    def known_models(self) -> Mapping[str, ModelInfo]:
        """The model under each of its names, at least one. Raises ApiError: 503 while it is loaded."""
        models = self.pool.models()
        if not models:
            self.check_open()
            raise unavailable("the model is being loaded; try again soon", "loading")
        return models

    def model_named(self, name: str) -> ModelInfo:
        """The model of this name. Raises ApiError: 503 while it is loaded, 404 for another."""
        models = self.known_models()
        if name not in models:
            known = ", ".join(models)
            raise ApiError(
                404,
                f"the model {name[:100]!r} does not exist; this server has {known}",
                type="not_found_error",
                param="model",
                code="model_not_found",
            )
        return models[name]

    async def ask(self, question: Question) -> Event:
        """An engine's answer. Raises ApiError (503) unless requests are taken, PhalanxError for a refusal."""
        self.check_open()
        return await self.pool.ask(question)

    @contextlib.asynccontextmanager
    async def generation(
        self, exchange: Exchange, stream: bool, timeout_s: float, *, detached: bool = False
    ) -> AsyncIterator[Generation]:
        """A generation that ends with the block, and, unless `detached`, when the client closes its connection."""
        self.check_open()
        if self._bridge is None:
            self._bridge = EventBridge(asyncio.get_running_loop())
        if stream:
            most = self.config.max_stream_bytes
            too_much = f"more than {most} bytes of the answer waited for their reader (max_stream_bytes); read faster"
        else:
            most = self.config.max_answer_bytes
            too_much = f"the answer takes more than {most} bytes (max_answer_bytes); set stream=true or ask for less"
        limits = Limits(most, too_much, timeout_s)
        durable = None if stream else exchange.durable
        generation = Generation(
            self._submits(exchange),
            self._bridge,
            self.admission,
            limits,
            exchange.request_id,
            None if durable is None else durable.accept,
        )

        watcher = None if detached else asyncio.create_task(_watch(exchange, generation))
        try:
            yield generation
        finally:
            if watcher is not None:
                watcher.cancel()
            generation.close()

    def _submits(self, exchange: Exchange) -> Submits:
        """Where the requests of an exchange are sent."""
        submits: Submits = self.pool
        if self.tracing is not None:
            model = next(iter(self.pool.models()), "")
            submits = self.tracing.around(submits, exchange.scope["headers"], exchange.request_id, model)
        if exchange.durable is not None:
            info = next(iter(self.pool.models().values()), None)
            made_by = "" if info is None else f"{info.model} {info.dtype} {info.chat_template}"
            submits = exchange.durable.around(submits, made_by)
        return submits

    def start(self) -> None:
        """Begin to compute what an earlier process has left, on the event loop."""
        if self.journaling is not None:
            self.journaling.start()

    def stop(self) -> None:
        """The process ends: what is not answered by now stays in the journal, for the next one."""
        if self.journaling is not None:
            self.journaling.stop()

    def close(self) -> None:
        """Write what is left to be written, once every request has ended, and send the spans that have not been sent
        yet. May block for some seconds."""
        if self.journaling is not None:
            self.journaling.close()
        if self.tracing is not None:
            self.tracing.close()


async def _watch(exchange: Exchange, generation: Generation) -> None:
    await exchange.wait_until_gone()
    generation.abandon()


def affinity_of(salt: str, beginning: str | list[int]) -> bytes:
    """What requests that may share a cached prefix have in common: a digest of how they begin."""
    text = beginning[:_AFFINITY_CHARS] if isinstance(beginning, str) else repr(beginning[: _AFFINITY_CHARS // 8])
    return hashlib.blake2b(f"{salt}\0{text}".encode(), digest_size=16).digest()


def tokens_in(text: str) -> int:
    """About the tokens of a text: one for four bytes."""
    return len(text) // 4 + 1
