"""The Python API for asyncio: AsyncLLM, for programs that do not wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ..protocol.messages import Delta, Event, Failed, Finished, Status
from ..protocol.sampling_params import SamplingParams
from ..protocol.structured import StructuredOutput
from .client import ReceiverGone, to_error
from .llm import CONNECT_TIMEOUT_S, LLM, RESTART_WAIT_S
from .requests import Messages, OutputBuilder, Prompt, RequestOutput, make_submit, spread_sampling


class AsyncLLM:
    """The same engine for asyncio: many requests at once on one event loop. Construction blocks until it is ready."""

    def __init__(self, model: str, *, ranks: int = 1, **config: Any) -> None:
        self._llm = LLM(model, ranks=ranks, **config)

    @classmethod
    def connect(
        cls,
        address: str,
        *,
        secret_file: str | Path | None = None,
        timeout_s: float | None = CONNECT_TIMEOUT_S,
        restart_wait_s: float = RESTART_WAIT_S,
    ) -> AsyncLLM:
        """A client of a group that runs elsewhere; see LLM.connect. It blocks until the engine answers."""
        return cls.from_llm(
            LLM.connect(address, secret_file=secret_file, timeout_s=timeout_s, restart_wait_s=restart_wait_s)
        )

    @classmethod
    def from_llm(cls, llm: LLM) -> AsyncLLM:
        """An asyncio face on an LLM that is already there; close() closes it."""
        wrapper = cls.__new__(cls)
        wrapper._llm = llm
        return wrapper

    async def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        sampling: SamplingParams | None = None,
        structured: StructuredOutput | None = None,
    ) -> AsyncIterator[Delta | Finished]:
        """Yield Delta events, then Finished. Leaving the iteration, or cancelling the task, aborts the request."""
        client = self._llm.client
        submit = make_submit(
            client.new_id(), prompt=prompt, messages=messages, sampling=sampling, structured=structured
        )
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def on_event(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop was closed before the answer's end: the client aborts the request
                raise ReceiverGone from None

        client.submit(submit, on_event, quick=True)

        ended = False
        try:
            while not ended:
                event = await events.get()
                ended = isinstance(event, Finished | Failed)
                if isinstance(event, Failed):
                    raise to_error(event)
                if isinstance(event, Delta | Finished):  # that it was accepted is nothing to see
                    yield event
        finally:
            if not ended:
                client.abort(submit.id)

    async def generate(
        self,
        prompt: Prompt | None = None,
        sampling: SamplingParams | None = None,
        *,
        messages: Messages | None = None,
        structured: StructuredOutput | None = None,
    ) -> RequestOutput:
        """Complete one prompt or conversation, by an answer that matches `structured`; gather calls to batch them."""
        [params] = spread_sampling(sampling, 1)
        builder = OutputBuilder((params or SamplingParams()).n)
        output = None
        async for event in self.stream(prompt, messages=messages, sampling=sampling, structured=structured):
            output = builder.add(event)
        assert output is not None
        return output

    async def status(self) -> Status:
        """The engine's state."""
        return await asyncio.to_thread(self._llm.status)

    async def close(self) -> None:
        """End the engine with all its ranks."""
        await asyncio.to_thread(self._llm.close)
