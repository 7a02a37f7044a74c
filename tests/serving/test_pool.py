"""The pool of engines: where requests go, which engines take some, and what happens when one stops."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from phalanx import EngineStopped, InvalidRequest, SamplingParams
from phalanx.engine.client.client import Client
from phalanx.engine.errors import CapacityExceeded, ConfigError, PhalanxError, Timeout
from phalanx.engine.protocol.messages import (
    Accepted,
    Delta,
    Detokenize,
    Detokenized,
    Event,
    Failed,
    Finished,
    ModelInfo,
    ModelInfoRequest,
    Status,
    StatusRequest,
    Submit,
    Tokenize,
    Tokenized,
)
from phalanx.engine.protocol.transport import ZmqConnection
from phalanx.serving.gateway.auth import AuthConfig
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.engine_pool import PoolState
from phalanx.serving.pool.config import PoolConfig
from phalanx.serving.pool.engine import FRESH_S
from phalanx.serving.pool.pool import Engines, PoolTicket
from phalanx.serving.server import ServerConfig, Settings, make_app
from phalanx.tests.serving.fake_engine import FakeEngine, address, finished, model_info, status, two_tokens

PATIENCE_S = 60.0
CONFIG = PoolConfig(poll_interval_s=0.05, answer_timeout_s=PATIENCE_S, stall_timeout_s=5.0)
HASTY = dataclasses.replace(CONFIG, answer_timeout_s=0.4)
"""An engine that does not answer is soon out."""


class Caller:
    """Who waits for the events of one request."""

    def __init__(self, pool: Engines, request_id: str, affinity: bytes = b"") -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        submit = Submit(id=request_id, token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=2))
        self.ticket: PoolTicket = pool.submit(submit, self._on_event, affinity=affinity)

    def _on_event(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self) -> Event:
        """The next event."""
        return await asyncio.wait_for(self._queue.get(), PATIENCE_S)

    async def end(self) -> Finished | Failed:
        """The last event."""
        while True:
            event = await self.next()
            if isinstance(event, Finished | Failed):
                return event


@contextlib.asynccontextmanager
async def open_pool(*addresses: str, config: PoolConfig = CONFIG, ready: bool = True) -> AsyncIterator[Engines]:
    pool = Engines(config)
    for each in addresses:
        pool.add(each, Client(ZmqConnection(each)))
    try:
        if ready:
            await until(lambda: all(engine.phase == "ready" for engine in pool.engines))
        yield pool
    finally:
        await pool.close()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE_S / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about in time")


def endless(submit: Submit) -> list[Event]:
    """The first token, and no more."""
    return [Delta(submit.id, 0, "one", [1])]


def silent(submit: Submit) -> list[Event]:
    """Nothing: the request waits."""
    return []


@pytest.fixture
def engines(tmp_path: Path) -> object:
    with contextlib.ExitStack() as stack:
        made = [FakeEngine(address(tmp_path, number)) for number in range(2)]
        for engine in made:
            stack.callback(engine.close)
        yield made


def test_a_request_gets_its_events_in_order_and_questions_their_answers(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        async with open_pool(engines[0].address) as pool:
            caller = Caller(pool, "a")
            events = [await caller.next() for _ in range(4)]
            assert events == two_tokens(engines[0].requests[0])
            await until(lambda: pool.open_requests == 0)

            assert isinstance(await pool.ask(Tokenize(id="t", prompt="a")), Tokenized)
            assert await pool.ask(Detokenize(id="d", token_ids=[1])) == Detokenized(id="d", text="a")
            assert isinstance(await pool.ask(StatusRequest()), Status)
            assert isinstance(await pool.ask(ModelInfoRequest()), ModelInfo)
            with pytest.raises(InvalidRequest, match="token_ids is empty"):
                await pool.ask(Detokenize(id="d", token_ids=[]))

    asyncio.run(main())


def test_an_engine_is_loading_until_it_answers_and_its_model_is_known_by_its_names(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_pool(address(tmp_path), ready=False) as pool:
            assert (pool.state.phase, pool.ready(), pool.models()) == ("loading", False, {})
            with pytest.raises(EngineStopped, match="loading"):
                Caller(pool, "a")
            with contextlib.closing(FakeEngine(address(tmp_path))):
                await asyncio.wait_for(pool.wait_until_ready(), PATIENCE_S)
                assert pool.ready()
                assert list(pool.models()) == ["organisation/fake", "fake"]

    asyncio.run(main())


def test_load_goes_to_the_less_loaded(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        for engine in engines:
            engine.answer = endless
        async with open_pool(*(engine.address for engine in engines)) as pool:
            for number in range(10):
                await Caller(pool, str(number)).next()
            assert [len(engine.requests) for engine in engines] == [5, 5]

    asyncio.run(main())


def test_requests_of_other_clients_count_as_load_too(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        engines[0].status = status(running=8, waiting=40)
        async with open_pool(*(engine.address for engine in engines)) as pool:
            for number in range(6):
                await Caller(pool, str(number)).end()
            assert [len(engine.requests) for engine in engines] == [0, 6]

    asyncio.run(main())


def test_a_shared_beginning_stays_with_its_engine_unless_that_is_much_fuller(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        async with open_pool(*(engine.address for engine in engines)) as pool:
            for number in range(6):  # one at a time: loads are equal, and would alternate without affinity
                await Caller(pool, str(number), b"same").end()
                await until(lambda: pool.open_requests == 0)
            assert sorted(len(engine.requests) for engine in engines) == [0, 6]

            home = max(engines, key=lambda engine: len(engine.requests))
            for engine in engines:
                engine.answer = endless
            for number in range(12):
                await Caller(pool, f"more {number}", b"same").next()
            other = next(engine for engine in engines if engine is not home)
            assert len(other.requests) >= 4

    asyncio.run(main())


def test_a_drained_engine_gets_nothing_new_and_finishes_what_it_has(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        first, second = engines
        first.answer = endless
        async with open_pool(first.address, second.address) as pool:
            pool.drain("1")
            caller = Caller(pool, "a", b"same")
            await caller.next()
            pool.resume("1")
            pool.drain(first.address)
            assert pool.engines[0].phase == "draining"
            for number in range(5):
                assert isinstance(await Caller(pool, str(number), b"same").end(), Finished)
            assert (len(first.requests), len(second.requests)) == (1, 5)

            first.send(finished("a"))
            assert await caller.end() == finished("a")
            pool.drain("1")
            assert (pool.state.phase, pool.ready()) == ("draining", False)
            with pytest.raises(EngineStopped, match="drained"):
                Caller(pool, "b")
            with pytest.raises(InvalidRequest, match="2"):
                pool.drain("2")

    asyncio.run(main())


def test_a_question_about_text_waits_for_an_engine_that_is_started_again(tmp_path: Path) -> None:
    config = PoolConfig(poll_interval_s=0.05, answer_timeout_s=0.2, restart_wait_s=0.2)
    outlook = "rank 0 was killed"

    async def main() -> None:
        nonlocal outlook
        pool = Engines(config)
        engine = pool.add("own group")
        engine.start(Client(ZmqConnection(address(tmp_path), supervised=True)), pool.on_change, lambda: outlook)
        asked = asyncio.create_task(engine.ask(Tokenize(id="t", prompt="a"), config.answer_timeout_s))
        await asyncio.sleep(1.0)
        assert not asked.done()
        with pytest.raises(Timeout):
            await engine.ask(StatusRequest(), config.answer_timeout_s)

        started = FakeEngine(address(tmp_path))
        assert isinstance(await asyncio.wait_for(asked, PATIENCE_S), Tokenized)
        started.close()
        outlook = ""
        with pytest.raises(Timeout):  # nobody says that it comes back
            await engine.ask(Tokenize(id="u", prompt="a"), config.answer_timeout_s)
        await pool.close()

    asyncio.run(main())


def test_a_question_to_an_engine_that_stops_is_answered_by_another(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        async with open_pool(*(engine.address for engine in engines)) as pool:
            first = pool.choose()

            async def stops(question: object, timeout_s: float) -> Event:
                raise EngineStopped("it has gone")

            first.ask = stops  # type: ignore[method-assign, assignment]
            assert isinstance(await pool.ask(Tokenize(id="t", prompt="a")), Tokenized)
            next(engine for engine in pool.engines if engine is not first).draining = True
            with pytest.raises(EngineStopped, match="it has gone"):
                await pool.ask(Tokenize(id="t", prompt="a"))

    asyncio.run(main())


def test_an_engine_that_is_silent_is_out_until_it_answers_again(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        async with open_pool(*(engine.address for engine in engines), config=HASTY) as pool:
            engines[0].status = None
            await until(lambda: pool.engines[0].phase == "stopped")
            assert "has not answered" in pool.engines[0].trouble
            assert pool.ready()
            for number in range(4):
                await Caller(pool, str(number)).end()
            assert [len(engine.requests) for engine in engines] == [0, 4]
            with pytest.raises(Timeout):
                await pool.engines[0].ask(StatusRequest(), 0.05)

            engines[1].status = None
            await until(lambda: pool.state.phase == "stopped")
            assert not pool.ready()
            engines[0].status = status()
            await until(pool.ready)

    asyncio.run(main())


def test_an_engine_that_is_started_again_is_not_ready_and_takes_requests_still(engines: list[FakeEngine]) -> None:
    outlook = ""

    async def main() -> None:
        nonlocal outlook
        async with open_pool(config=HASTY) as pool:
            engine = pool.add("own group")
            engine.start(Client(ZmqConnection(engines[0].address, supervised=True)), pool.on_change, lambda: outlook)
            await until(pool.ready)
            engines[0].status = None
            outlook = "rank 1 failed: SIGKILL"
            assert not pool.ready()
            await asyncio.sleep(3 * HASTY.answer_timeout_s)
            assert pool.state == PoolState("ready", "engine own group: rank 1 failed: SIGKILL")
            assert isinstance(await Caller(pool, "a").end(), Finished)
            outlook = ""
            engines[0].status = status()
            await until(pool.ready)

    asyncio.run(main())


def test_where_a_supervisor_watches_it_says_when_steps_take_too_long(engines: list[FakeEngine]) -> None:
    outlook = ""

    async def main() -> None:
        nonlocal outlook
        pool = Engines(CONFIG)
        engine = pool.add("own group")
        engine.start(Client(ZmqConnection(engines[0].address, supervised=True)), pool.on_change, lambda: outlook)
        await until(pool.ready)
        engines[0].status = status(stalled_s=600.0)
        await until(lambda: engine.status is not None and engine.status.stalled_s == 600.0)
        assert pool.ready()  # a step may take long on a busy machine
        outlook = "rank 1 hangs"
        assert (pool.ready(), engine.trouble) == (False, "engine own group: rank 1 hangs")
        await pool.close()

    asyncio.run(main())


def test_metrics_tell_how_an_engine_is_now_and_do_not_wait_for_one_that_is_silent(engines: list[FakeEngine]) -> None:
    config = PoolConfig(poll_interval_s=60.0, answer_timeout_s=60.0)
    settings = Settings(ServerConfig(), GatewayConfig(), AuthConfig(), config)

    async def running(http: httpx.AsyncClient) -> list[str]:
        text = (await asyncio.wait_for(http.get("http://a/metrics"), PATIENCE_S)).text
        return re.findall(r"^vllm:num_requests_running{.*} (.*)$", text, re.MULTILINE)

    async def main() -> None:
        for engine in engines:
            engine.status = status(running=51)
        async with open_pool(*(engine.address for engine in engines), config=config) as pool:
            transport = httpx.ASGITransport(make_app(pool, settings))
            async with httpx.AsyncClient(transport=transport) as http:
                for count in (1, 0):
                    engines[0].status = status(running=count)
                    while await running(http) != [f"{count}.0", "51.0"]:
                        await asyncio.sleep(FRESH_S)
                engines[0].status = None
                await asyncio.sleep(2 * FRESH_S)
                assert await running(http) == ["0.0", "51.0"]

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_readiness_is_progress_not_a_living_process(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        async with open_pool(engines[0].address) as pool:
            engines[0].status = status(stalled_s=1.0)
            await asyncio.sleep(0.3)
            assert pool.ready()
            engines[0].status = status(stalled_s=6.0)
            await until(lambda: not pool.ready())
            assert pool.state.phase == "ready"
            assert "no step for 6 s" in pool.state.reason
            engines[0].status = status()
            await until(pool.ready)
            assert pool.state.reason == ""

    asyncio.run(main())


@pytest.mark.parametrize("error", [EngineStopped, CapacityExceeded])
def test_a_request_that_got_nothing_goes_on_at_another_engine(
    engines: list[FakeEngine], error: type[PhalanxError]
) -> None:
    async def main() -> None:
        engines[0].answer = lambda submit: [Failed(submit.id, error.__name__, "not here")]
        config = dataclasses.replace(CONFIG, restart_wait_s=0.2)
        async with open_pool(*(engine.address for engine in engines), config=config) as pool:
            for number in range(4):
                assert isinstance(await Caller(pool, str(number), b"same").end(), Finished)
            engines[1].answer = engines[0].answer
            assert await Caller(pool, "last").end() == Failed("last", error.__name__, "not here")
            await until(lambda: pool.open_requests == 0)

    asyncio.run(main())


def test_a_request_that_waits_at_an_engine_that_stops_goes_on_at_another(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        engines[0].answer = lambda submit: [
            Accepted(id=submit.id, prompt_tokens=3, seed=1, max_tokens=2),
            Failed(submit.id, EngineStopped.__name__, "rank 1 failed"),
        ]
        async with open_pool(*(engine.address for engine in engines)) as pool:
            for number in range(2):
                caller = Caller(pool, str(number))
                events = [await caller.next() for _ in range(4)]
                assert [type(event) for event in events] == [Accepted, Delta, Delta, Finished]
            assert len(engines[1].requests) == 2

    asyncio.run(main())


def test_a_request_whose_answer_has_begun_goes_on_at_another_engine(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        begun: list[Event] = [
            Accepted(id="a", prompt_tokens=3, seed=1, max_tokens=2),
            Delta("a", 0, "one", [1]),
            Failed("a", EngineStopped.__name__, "rank 1 failed"),
        ]
        engines[0].answer = lambda submit: begun
        async with open_pool(*(engine.address for engine in engines)) as pool:
            caller = Caller(pool, "a")
            events = [await caller.next() for _ in range(4)]
            assert [type(event) for event in events] == [Accepted, Delta, Delta, Finished]
            assert [event.token_ids for event in events if isinstance(event, Delta)] == [[1], [2]]
            [resumed] = engines[1].requests
            assert resumed.resume is not None
            assert [each.token_ids for each in resumed.resume.completions] == [[1]]
            assert resumed.sampling.seed == 1

    asyncio.run(main())


def test_requests_wait_until_one_of_several_engines_that_have_all_ended_is_back(tmp_path: Path) -> None:
    async def main() -> None:
        addresses = [address(tmp_path, number) for number in range(2)]
        engines = [FakeEngine(each, endless) for each in addresses]
        try:
            async with open_pool(*addresses) as pool:
                callers = [Caller(pool, str(number)) for number in range(4)]
                for caller in callers:
                    assert isinstance(await caller.next(), Delta)
                # The moved ones have got nothing from the second engine when that ends too.
                engines[1].answer = silent
                engines[0].close()
                await until(lambda: len(engines[1].requests) == 4)
                engines[1].close()
                await until(lambda: pool.open_requests == len(pool.strays) == 4)
                engines[0] = FakeEngine(addresses[0], lambda submit: two_tokens(submit)[2:])
                for caller in callers:
                    assert isinstance(await caller.end(), Finished)
                await until(lambda: pool.open_requests == 0)
        finally:
            for engine in engines:
                engine.close()

    asyncio.run(main())


def test_what_no_engine_takes_again_in_time_fails_with_what_the_last_one_said(tmp_path: Path) -> None:
    async def main() -> None:
        addresses = [address(tmp_path, number) for number in range(2)]
        engines = [FakeEngine(each, endless) for each in addresses]
        config = dataclasses.replace(CONFIG, restart_wait_s=0.2)
        async with open_pool(*addresses, config=config) as pool:
            caller, aborted = Caller(pool, "a"), Caller(pool, "b")
            await caller.next()
            await aborted.next()
            for engine in engines:
                engine.close()
            aborted.ticket.abort()
            for each in (caller, aborted):
                end = await each.end()
                assert isinstance(end, Failed)
                assert (end.error, "was closed" in end.message) == (EngineStopped.__name__, True)
            assert pool.open_requests == 0
            assert not pool.ready()

    asyncio.run(main())


@contextlib.asynccontextmanager
async def two_under_way(engines: list[FakeEngine]) -> AsyncIterator[tuple[Engines, list[Caller]]]:
    """A pool of the engines, and two requests of which the first tokens are there and no end comes."""
    for engine in engines:
        engine.answer = endless
    async with open_pool(*(engine.address for engine in engines)) as pool:
        callers = [Caller(pool, str(number)) for number in range(2)]
        for caller in callers:
            await caller.next()
        yield pool, callers


def test_a_request_that_moves_waits_for_room_at_the_other_engine(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        async with two_under_way(engines) as (pool, callers):
            full = Failed(engines[0].requests[0].id, CapacityExceeded.__name__, "no room")
            engines[1].answer = lambda submit: [full]
            engines[0].status = None  # it does not come back
            engines[0].send(Failed(full.id, EngineStopped.__name__, "rank 1 failed"))
            await until(lambda: len(engines[1].requests) == 2 and len(pool.strays) == 1)
            engines[1].answer = lambda submit: two_tokens(submit)[2:]
            assert isinstance(await callers[int(full.id)].end(), Finished)

    asyncio.run(main())


def test_a_request_moves_also_while_the_server_drains(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        async with two_under_way(engines) as (pool, callers):
            for engine in engines:
                engine.answer = lambda submit: two_tokens(submit)[2:]
            drained = asyncio.ensure_future(pool.drain_all(PATIENCE_S))
            await asyncio.sleep(0.05)
            [moved] = engines[0].requests
            engines[0].send(Failed(moved.id, EngineStopped.__name__, "rank 1 failed"))
            assert isinstance(await callers[int(moved.id)].end(), Finished)
            assert not drained.done()
            engines[1].send(finished(engines[1].requests[0].id))
            assert await drained

    asyncio.run(main())


def test_a_request_that_no_other_engine_takes_fails_with_its_own(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        engines[0].answer = endless
        async with open_pool(engines[0].address) as pool:
            caller = Caller(pool, "a")
            await caller.next()
            engines[0].send(Failed("a", EngineStopped.__name__, "rank 1 failed"))
            assert await caller.end() == Failed("a", EngineStopped.__name__, "rank 1 failed")

    asyncio.run(main())


def test_an_aborted_request_ends_and_is_no_load_any_more(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        engines[0].answer = silent
        async with open_pool(engines[0].address) as pool:
            caller = Caller(pool, "a")
            assert pool.open_requests == 1
            for _ in range(3):
                caller.ticket.abort()
            end = await caller.end()
            assert isinstance(end, Finished)
            assert end.completions[0].finish_reason == "abort"
            await until(lambda: pool.open_requests == 0)
            caller.ticket.abort()

    asyncio.run(main())


def test_token_ids_beyond_the_models_length_are_not_sent(engines: list[FakeEngine]) -> None:
    async def check() -> None:
        async with open_pool(engines[0].address) as pool:
            for count, sent in ((127, True), (128, False), (1_000_000, False)):
                submit = Submit(id=str(count), token_ids=[1] * count, sampling=SamplingParams(max_tokens=1))
                if sent:
                    pool.submit(submit, lambda event: None)
                    continue
                with pytest.raises(InvalidRequest, match=f"the prompt has {count} tokens; with max_model_len=128"):
                    pool.submit(submit, lambda event: None)
            await until(lambda: pool.open_requests == 0)
        assert [len(request.token_ids or ()) for request in engines[0].requests] == [127]

    asyncio.run(check())


def test_an_engine_of_another_model_is_refused(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        engines[1].info = model_info(model="organisation/other")
        async with open_pool(*(engine.address for engine in engines), ready=False) as pool:
            await until(lambda: sorted(engine.phase for engine in pool.engines) == ["ready", "stopped"])
            refused = next(engine for engine in pool.engines if engine.phase == "stopped")
            assert "one gateway has engines of one model" in refused.trouble

    asyncio.run(main())


def test_draining_waits_for_what_runs_and_takes_nothing_new(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        engines[0].answer = endless
        async with open_pool(engines[0].address) as pool:
            caller = Caller(pool, "a")
            await caller.next()
            assert not await pool.drain_all(0.1)
            with pytest.raises(EngineStopped, match="shutting down"):
                Caller(pool, "b")
            drained = asyncio.ensure_future(pool.drain_all(PATIENCE_S))
            await asyncio.sleep(0.05)
            engines[0].send(finished("a"))
            assert await drained
            assert await caller.end() == finished("a")

    asyncio.run(main())


def test_a_receiver_that_raises_leaves_no_request_behind(engines: list[FakeEngine]) -> None:
    async def main() -> None:
        async with open_pool(engines[0].address) as pool:

            def broken(event: Event) -> None:
                raise ValueError("broken")

            pool.submit(Submit(id="a", token_ids=[1]), broken)
            await until(lambda: pool.open_requests == 0)

    asyncio.run(main())


@pytest.mark.parametrize(("name", "value"), [("poll_interval_s", 0), ("affinity_slack", -1), ("stall_timeout_s", -0.5)])
def test_a_setting_that_cannot_be_is_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        PoolConfig(**{name: value})  # type: ignore[arg-type]
