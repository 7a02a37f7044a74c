"""The pool of engines behind one gateway: sends each request to one of them, and says how they are.

Requests go to the emptiest engine, but those whose prompts begin alike to the same one, whose prefix cache has the
beginning, while it is not much fuller than the emptiest. A request whose engine stops, or has no room, goes to another
engine, and on there after what was delivered of its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import msgspec

from ...engine.client.client import Client
from ...engine.client.resume.delivered import Delivered
from ...engine.errors import CapacityExceeded, EngineStopped, InvalidRequest, PhalanxError, prompt_too_long
from ...engine.protocol.messages import Event, Failed, Finished, ModelInfo, Status, Submit
from ..gateway.engine_pool import OnEvent, PoolState, Question
from ..gateway.metrics import EngineSample, GatewayMetrics, RequestMetrics
from .config import PoolConfig
from .engine import PooledEngine

_MOVABLE = (EngineStopped.__name__, CapacityExceeded.__name__)
LEAST_SLACK = 2
"""Requests by which an engine with a request's beginning may always be fuller than the emptiest."""

_log = logging.getLogger(__name__)


class Engines:
    """An EnginePool (gateway/engine_pool.py) of one engine or several, each at the other end of a Client."""

    def __init__(self, config: PoolConfig | None = None, served_model_names: tuple[str, ...] = ()) -> None:
        """Make it on the event loop that uses it, then add() engines."""
        self.config = config or PoolConfig()
        self.engines: list[PooledEngine] = []
        self.metrics = GatewayMetrics(self._samples)
        self._names = served_model_names
        self._loop = asyncio.get_running_loop()
        self._affinity: OrderedDict[bytes, PooledEngine] = OrderedDict()
        self._changed = asyncio.Event()
        self._closing = False
        self._seen: dict[str, Status] = {}  # the last one of each engine that the metrics know

    # ---- engines

    def add(self, name: str, client: Client | None = None) -> PooledEngine:
        """Add an engine, and begin to watch it if its client is there already; else engine.start() comes later."""
        engine = PooledEngine(str(len(self.engines)), name, self.config)
        self.engines.append(engine)
        if client is not None:
            engine.start(client, self.on_change)
        return engine

    def find(self, name: str) -> PooledEngine:
        """Return the engine that has this name or number. Raises InvalidRequest."""
        for engine in self.engines:
            if name in (engine.name, engine.label):
                return engine
        known = ", ".join(f"{engine.label} ({engine.name})" for engine in self.engines)
        raise InvalidRequest(f"engine={name!r} is not one of {known}")

    def drain(self, name: str) -> PooledEngine:
        """Send nothing more to an engine; what it has goes on. Raises InvalidRequest for an unknown name."""
        engine = self.find(name)
        engine.draining = True
        return engine

    def resume(self, name: str) -> PooledEngine:
        """Send requests to a drained engine again. Raises InvalidRequest for an unknown name."""
        engine = self.find(name)
        engine.draining = False
        return engine

    async def wait_until_ready(self) -> None:
        """Return once an engine takes requests. Raises why, if none ever will."""
        while self.state.phase != "ready":
            failures = [engine.failure for engine in self.engines if engine.failure is not None]
            if failures and len(failures) == len(self.engines):
                raise failures[0]
            self._changed.clear()
            await self._changed.wait()

    async def drain_all(self, timeout_s: float) -> bool:
        """Take no more requests, and wait until all have ended; False if some have not within `timeout_s`."""
        self._closing = True
        deadline = self._loop.time() + timeout_s
        while self.open_requests:
            left = deadline - self._loop.time()
            if left <= 0:
                return False
            self._changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        return True

    async def close(self) -> None:
        """End every request and every connection. The engines go on, if they are not of this process."""
        self._closing = True
        await asyncio.gather(*(engine.stop() for engine in self.engines))

    async def refresh(self) -> None:
        """Have each engine say how it is now, as far as it does so soon: what is told together is of one time."""
        await asyncio.gather(*(engine.refresh() for engine in self.engines))

    @property
    def open_requests(self) -> int:
        """Requests that have been sent and have not ended."""
        return sum(engine.open_requests for engine in self.engines)

    # ---- EnginePool

    @property
    def state(self) -> PoolState:
        """The phase of all engines together."""
        if self._closing:
            return PoolState("draining", "the server is shutting down")
        phases = [engine.phase for engine in self.engines]
        troubles = "; ".join(engine.trouble for engine in self.engines if engine.trouble)
        if "ready" in phases:
            return PoolState("ready", "" if self.ready() else troubles)
        if "loading" in phases or not phases:
            return PoolState("loading", troubles or "the engine is loading")
        if "draining" in phases:
            return PoolState("draining", "every engine is drained")
        return PoolState("stopped", troubles)

    def ready(self) -> bool:
        """Whether a request sent now would be computed."""
        return not self._closing and any(engine.phase == "ready" and not engine.trouble for engine in self.engines)

    def models(self) -> Mapping[str, ModelInfo]:
        """The model by each name; its max_model_len is the least of all engines."""
        infos = [engine.info for engine in self.engines if engine.info is not None]
        if not infos:
            return {}
        info = msgspec.structs.replace(infos[0], max_model_len=min(info.max_model_len for info in infos))
        return dict.fromkeys(self._names or served_names(info.model), info)

    def submit(self, submit: Submit, on_event: OnEvent, *, affinity: bytes = b"") -> PoolTicket:
        """Send a request to an engine. Raises EngineStopped if none takes it, InvalidRequest if none can."""
        ticket = PoolTicket(self, submit, on_event, affinity)
        ticket.send(self.choose(affinity))
        return ticket

    async def ask(self, command: Question) -> Event:
        """Ask the emptiest engine, and another one if that stops."""
        tried: tuple[PooledEngine, ...] = ()
        while True:
            engine = self.choose(but=tried)
            try:
                return await engine.ask(command, self.config.answer_timeout_s)
            except EngineStopped:
                tried = (*tried, engine)
                if not any(other.phase == "ready" and other not in tried for other in self.engines):
                    raise

    # ---- where requests go

    def choose(self, affinity: bytes = b"", but: tuple[PooledEngine, ...] = ()) -> PooledEngine:
        """Return the engine for a request. Raises EngineStopped, with the reason, if none takes any."""
        takers = [engine for engine in self.engines if engine.phase == "ready" and engine not in but]
        # An engine that does not go on may be in a long step: better it than none.
        takers = [engine for engine in takers if not engine.trouble] or takers
        if self._closing or not takers:
            state = self.state
            raise EngineStopped(state.reason or f"no engine takes requests: the server is {state.phase}")

        emptiest = min(takers, key=lambda engine: (engine.load, engine.sent))
        if not affinity or len(self.engines) == 1:
            return emptiest
        known = self._affinity.get(affinity)
        chosen = known if known in takers and self._has_room(known, emptiest) else emptiest
        assert chosen is not None
        self._remember(affinity, chosen)
        return chosen

    def _has_room(self, engine: PooledEngine | None, emptiest: PooledEngine) -> bool:
        if engine is None:
            return False
        rows = engine.status.max_num_seqs if engine.status is not None else 1
        return engine.load - emptiest.load <= max(self.config.affinity_slack, LEAST_SLACK / rows)

    def _remember(self, affinity: bytes, engine: PooledEngine) -> None:
        self._affinity[affinity] = engine
        self._affinity.move_to_end(affinity)
        if len(self._affinity) > self.config.affinity_entries:
            self._affinity.popitem(last=False)

    # ---- what engines and tickets report, on the event loop

    def on_change(self, engine: PooledEngine) -> None:
        """Take in what an engine has said, or that it has not."""
        if engine.status is not None and engine.status is not self._seen.get(engine.label):
            self.metrics.polled(engine.label, self._seen.get(engine.label), engine.status)
            self._seen[engine.label] = engine.status

        info = engine.info
        if info is not None and engine.phase == "ready":
            first = next(each.info for each in self.engines if each.info is not None)
            if (_last_part(first.model), first.vocab_size) != (_last_part(info.model), info.vocab_size):
                engine.refuse(
                    f"engine {engine.name} has the model {info.model!r}, and the gateway serves {first.model!r}: one "
                    f"gateway has engines of one model"
                )
            elif not self.metrics.model_name:
                self.metrics.model_name = next(iter(self.models()))
        self._changed.set()

    def ended(self, engine: PooledEngine, failed: Failed | None) -> None:
        """Take in the end of a request."""
        engine.open_requests -= 1
        if failed is not None and failed.error == EngineStopped.__name__:
            engine.lost(failed.message)
        self._changed.set()

    def soon(self, ticket: PoolTicket, engine: PooledEngine, event: Event) -> None:
        """Bring the end of a request from another thread to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(ticket.on_end, engine, event)

    def _samples(self) -> Iterator[EngineSample]:
        for engine in self.engines:
            yield EngineSample(engine.label, engine.phase, engine.open_requests, engine.status, engine.info)


class PoolTicket:
    """One request on its way; see gateway/engine_pool.py."""

    def __init__(self, pool: Engines, submit: Submit, on_event: OnEvent, affinity: bytes) -> None:
        self._pool = pool
        self._submit = submit
        self._on_event = on_event
        self._affinity = affinity
        self._tried: tuple[PooledEngine, ...] = ()
        self._client: Client | None = None
        self._metrics: RequestMetrics | None = None
        self._delivered = Delivered(submit)
        self._aborted = False

    def send(self, engine: PooledEngine) -> None:
        """Send it to an engine, on the event loop. Raises EngineStopped or InvalidRequest."""
        token_ids = self._submit.token_ids
        info = engine.info
        if token_ids is not None and info is not None and len(token_ids) >= info.max_model_len:
            # Megabytes would be sent, and read beside the engine's steps, only to be refused.
            raise prompt_too_long(len(token_ids), info.max_model_len)

        submit = self._delivered.resubmit(self._submit.id) if self._tried else self._submit
        self._tried = (*self._tried, engine)
        self._client = client = engine.client
        self._metrics = metrics = self._pool.metrics.request(engine.label, self._submit)

        def on_event(event: Event) -> None:
            metrics.on_event(event)
            # What may still go to another engine is not handed on yet.
            if isinstance(event, Failed) and event.error in _MOVABLE:
                self._pool.soon(self, engine, event)
                return
            if not self._delivered.add(event):  # that it was accepted, by an engine before this one
                return
            last = isinstance(event, Finished | Failed)
            try:
                self._on_event(event)
            except BaseException:
                last = True  # the client aborts the request
                raise
            finally:
                if last:
                    self._pool.soon(self, engine, event)

        engine.open_requests += 1
        engine.sent += 1
        try:
            client.submit(submit, on_event, quick=True)
        except PhalanxError:
            engine.open_requests -= 1
            raise

    def abort(self) -> None:
        """End it early, from any thread, any number of times."""
        self._aborted = True
        if self._client is not None:
            self._client.abort(self._submit.id)

    def on_end(self, engine: PooledEngine, event: Event) -> None:
        """Take in its last event from an engine, on the event loop."""
        failed = event if isinstance(event, Failed) else None
        self._pool.ended(engine, failed)
        if failed is None or failed.error not in _MOVABLE:
            return
        if not self._aborted:
            try:
                self.send(self._pool.choose(self._affinity, but=self._tried))
            except PhalanxError:
                pass  # the first engine's failure says more
            else:
                _log.info("request %s goes on at %s: %s", self._submit.id, self._tried[-1].name, failed.message)
                return
        self._on_event(failed)


def served_names(model: str) -> tuple[str, ...]:
    """Return the names under which a model is served by itself: as the engine names it, and the last part of that."""
    return tuple(dict.fromkeys((model, _last_part(model))))


def _last_part(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2] or model
