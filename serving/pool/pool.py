"""The pool of engines behind one gateway: sends each request to one of them, and says how they are.

Requests go to the emptiest engine, but those whose prompts begin alike to the same one, whose prefix cache has the
beginning, while it is not much fuller than the emptiest. A request whose engine stops, or has no room, goes to another
engine, and on there after what was delivered of its answer. Where none is left it waits for one (strays.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import ParamSpec

import msgspec

from ...engine.client.client import Client
from ...engine.client.resume.delivered import Delivered
from ...engine.errors import CapacityExceeded, EngineFault, EngineStopped, InvalidRequest, PhalanxError, prompt_too_long
from ...engine.protocol.messages import Delta, Event, Failed, Finished, ModelInfo, Status, Submit
from ..gateway.engine_pool import OnEvent, PoolState, Question
from ..gateway.metrics import EngineSample, GatewayMetrics, RequestMetrics
from .config import PoolConfig
from .engine import PooledEngine
from .strays import LOOK_S, Strays

_MOVABLE = (EngineStopped.__name__, CapacityExceeded.__name__)
LEAST_SLACK = 2
"""Requests by which an engine with a request's beginning may always be fuller than the emptiest."""

P = ParamSpec("P")

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
        self._draining = self._closing = False
        self.strays = Strays(self.config.restart_wait_s, self._loop)
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
        self._draining = True
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
        self._draining = self._closing = True
        self.strays.give_up()
        await asyncio.gather(*(engine.stop() for engine in self.engines))

    async def refresh(self) -> None:
        """Have each engine say how it is now, as far as it does so soon: what is told together is of one time."""
        await asyncio.gather(*(engine.refresh() for engine in self.engines))

    @property
    def open_requests(self) -> int:
        """Requests that have been sent and have not ended."""
        return len(self.strays) + sum(engine.open_requests for engine in self.engines)

    @property
    def outlives_engines(self) -> bool:
        """Whether requests wait here for an engine; where there is one alone its connection has waited already."""
        return len(self.engines) > 1 and not self._closing

    # ---- EnginePool

    @property
    def state(self) -> PoolState:
        """The phase of all engines together."""
        if self._draining:
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
        return not self._draining and any(engine.phase == "ready" and not engine.trouble for engine in self.engines)

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

    def choose(self, affinity: bytes = b"", but: tuple[PooledEngine, ...] = (), *, moves: bool = False) -> PooledEngine:
        """Return the engine for a request. Raises EngineStopped, with the reason, if none takes any.

        One that `moves` was accepted before, and is taken also while the server drains.
        """
        takers = [engine for engine in self.engines if engine.phase == "ready" and engine not in but]
        # An engine that does not go on may be in a long step: better it than none.
        takers = [engine for engine in takers if not engine.trouble] or takers
        if self._closing or (self._draining and not moves) or not takers:
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
        self.strays.send_on()
        self._changed.set()

    def ended(self, engine: PooledEngine, failed: Failed | None) -> None:
        """Take in the end of a request."""
        engine.open_requests -= 1
        if failed is not None and failed.error == EngineStopped.__name__:
            engine.lost(failed.message)
        self._changed.set()

    def changed(self) -> None:
        """Take in that a request which had no engine has ended."""
        self._changed.set()

    def soon(self, action: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Bring what a ticket learns on another thread to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(partial(action, *args, **kwargs))

    def _samples(self) -> Iterator[EngineSample]:
        for engine in self.engines:
            yield EngineSample(engine.label, engine.phase, engine.open_requests, engine.status, engine.info)


class PoolTicket:
    """One request on its way; see gateway/engine_pool.py, and strays.py for what it is while it has no engine."""

    def __init__(self, pool: Engines, submit: Submit, on_event: OnEvent, affinity: bytes) -> None:
        self.deaths = 0
        self.aborted = False
        self.stranded_at: float | None = None
        self._pool = pool
        self._submit = submit
        self._on_event = on_event
        self._affinity = affinity
        self._tried: tuple[PooledEngine, ...] = ()
        self._left_at = 0.0
        self._client: Client | None = None
        self._epoch = ""
        self._ended_epochs: set[str] = set()
        """Those of engines that have ended with it since it last got on."""
        self._failed: Failed | None = None
        """What the first of them said."""
        self._metrics: RequestMetrics | None = None
        self._delivered = Delivered(submit)

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
        self._epoch = client.epoch
        self._metrics = metrics = self._pool.metrics.request(engine.label, self._submit)

        def on_event(event: Event) -> None:
            metrics.on_event(event)
            # What may still go to another engine is not handed on yet.
            if isinstance(event, Failed) and event.error in _MOVABLE:
                self._pool.soon(self.on_end, engine, event)
                return
            if not self._delivered.add(event):  # that it was accepted, by an engine before this one
                return
            last = isinstance(event, Finished | Failed)
            if self._failed is not None and isinstance(event, Delta) and event.token_ids:
                self._pool.soon(self._got_on)
            try:
                self._on_event(event)
            except BaseException:
                last = True  # the client aborts the request
                raise
            finally:
                if last:
                    self._pool.soon(self.on_end, engine, event)

        engine.open_requests += 1
        engine.sent += 1
        try:
            client.submit(submit, on_event, quick=True)
        except PhalanxError:
            engine.open_requests -= 1
            raise

    def abort(self) -> None:
        """End it early, from any thread, any number of times."""
        self.aborted = True
        if self._client is not None:
            self._client.abort(self._submit.id)

    def on_end(self, engine: PooledEngine, event: Event) -> None:
        """Take in its last event from an engine, on the event loop."""
        failed = event if isinstance(event, Failed) else None
        self._pool.ended(engine, failed)
        if failed is None or failed.error not in _MOVABLE:
            self._pool.strays.got_on(self)
            return
        self._left_at = asyncio.get_running_loop().time()
        ended = failed.error == EngineStopped.__name__
        if self._pool.outlives_engines and not self.aborted and (ended or self._failed is not None):
            if not ended:
                self.stranded_at = None  # that one lives, and has no room yet
            elif self._epoch not in self._ended_epochs:
                self._ended_epochs.add(self._epoch)
                self.deaths += 1
            self._failed = self._failed or failed
            self._pool.strays.add(self)
            return
        self._pool.strays.got_on(self)
        if self.aborted or not self._send_on(self._tried, failed):
            self._on_event(failed)

    # ---- as a Stray

    def go(self) -> bool:
        """Go on at another engine, or after a while at one that answers again where it was."""
        rested = asyncio.get_running_loop().time() - self._left_at >= LOOK_S
        assert self._failed is not None
        return self._send_on(self._tried[-1:], self._failed) or (rested and self._send_on((), self._failed))

    def give_up(self) -> None:
        """No engine came in time."""
        assert self._failed is not None
        self._on_event(self._failed)
        self._pool.changed()

    def blame(self) -> None:
        """Engines die of it."""
        assert self._failed is not None
        why = (
            f"{self.deaths} engines ended one after the other while they computed this request, and no more are given "
            f"it; other requests go on; of the first one was said: {self._failed.message}"
        )
        self._on_event(Failed(self._submit.id, EngineFault.__name__, why))
        self._pool.changed()

    def _send_on(self, but: tuple[PooledEngine, ...], failed: Failed) -> bool:
        """Whether there is another engine for it, to which it was sent."""
        try:
            self.send(self._pool.choose(self._affinity, but=but, moves=True))
        except PhalanxError:
            return False  # the first engine's failure says more
        _log.info("request %s goes on at %s: %s", self._submit.id, self._tried[-1].name, failed.message)
        return True

    def _got_on(self) -> None:
        self.deaths = 0
        self.stranded_at = self._failed = None
        self._ended_epochs.clear()
        self._pool.strays.got_on(self)


def served_names(model: str) -> tuple[str, ...]:
    """Return the names under which a model is served by itself: as the engine names it, and the last part of that."""
    return tuple(dict.fromkeys((model, _last_part(model))))


def _last_part(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2] or model
