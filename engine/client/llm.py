"""The Python API: LLM for programs that wait, AsyncLLM for programs that do not."""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any

import msgspec
import torch

from ...parallel.group import local_group
from ...parallel.loading.checkpoint import Progress
from ..config import EngineConfig
from ..engine import Engine, EngineThread, device_type
from ..errors import CapacityExceeded, EngineStopped, InvalidRequest
from ..protocol.logprobs import TokenLogprobs
from ..protocol.messages import Delta, Event, Failed, Finished, Status, Submit, Timings, Usage
from ..protocol.sampling_params import SamplingParams
from ..protocol.transport import InProcess
from .client import Client, OnEvent, RequestHandle, to_error

Prompt = str | list[int]
Messages = list[dict[str, Any]]
STATUS_TIMEOUT_S = 60.0
RETRY_S = 0.05
"""Until a request is sent again that the engine had no room for, if none of the same call ends before."""


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One of the n completions of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None


class RequestOutput(msgspec.Struct, kw_only=True):
    """A finished request."""

    id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    usage: Usage
    timings: Timings
    prompt_logprobs: list[TokenLogprobs] | None = None


class OutputBuilder:
    """Puts a request's events together; finished() gives the whole."""

    def __init__(self, n: int) -> None:
        self._outputs = [CompletionOutput(index=index) for index in range(n)]

    def add(self, event: Event) -> RequestOutput | None:
        """Take in an event; the output once it is the last one. A Failed is raised as its error."""
        if isinstance(event, Failed):
            raise to_error(event)
        if isinstance(event, Delta):
            output = self._outputs[event.index]
            output.text += event.text
            output.token_ids += event.token_ids
            if event.logprobs is not None:
                output.logprobs = (output.logprobs or []) + event.logprobs
        elif isinstance(event, Finished):
            for completion in event.completions:
                self._outputs[completion.index].finish_reason = completion.finish_reason
                self._outputs[completion.index].stop_reason = completion.stop_reason
            return RequestOutput(
                id=event.id,
                prompt_token_ids=event.prompt_token_ids,
                outputs=self._outputs,
                usage=event.usage,
                timings=event.timings,
                prompt_logprobs=event.prompt_logprobs,
            )
        return None


class LLM:
    """An engine and a client of it. ranks=1 runs inside this process; more start a group of their own.

    Keyword arguments are EngineConfig's fields. Raises ConfigError or CheckpointError if the engine cannot be built.
    """

    _client: Client
    _close_engine: Callable[[], None]

    def __init__(self, model: str, *, ranks: int = 1, on_progress: Progress | None = None, **config: Any) -> None:
        self._start(EngineConfig.from_dict({"model": model, "ranks": ranks, **config}), on_progress)

    @classmethod
    def from_config(cls, config: EngineConfig, on_progress: Progress | None = None) -> LLM:
        """The same from a configuration that is already made."""
        llm = cls.__new__(cls)
        llm._start(config, on_progress)
        return llm

    @classmethod
    def from_engine(cls, engine: Engine, link: InProcess) -> LLM:
        """A client of rank 0's engine in this process, made with link.transport; closing it stops the group."""
        llm = cls.__new__(cls)
        llm._attach(engine, link)
        return llm

    @classmethod
    def in_group(cls, process_group: Any, model: str, **config: Any) -> Any:
        """An engine on the ranks of somebody else's process group, called by all of these (client/in_group.py)."""
        from .in_group import GroupLLM

        return GroupLLM(process_group, model, **config)

    @classmethod
    def paused(cls, engine: Engine, link: InProcess) -> LLM:
        """A client of an engine whose step loop somebody else runs, call by call."""
        assert engine.coordinator is not None
        engine.coordinator.start()
        llm = cls.__new__(cls)
        llm._client = client = Client(link.connection)

        def close() -> None:
            engine.close()
            client.close()

        llm._close_engine = close
        return llm

    def _start(self, config: EngineConfig, on_progress: Progress | None) -> None:
        if config.ranks > 1:
            from .group_process import GroupProcess

            process = GroupProcess(config)
            self._client, self._close_engine = process.client, process.close
            return
        if config.threads:
            torch.set_num_threads(config.threads)
        link = InProcess()
        self._attach(Engine(config, local_group(choose_device(config)), link.transport, on_progress), link)

    def _attach(self, engine: Engine, link: InProcess) -> None:
        coordinator = engine.coordinator
        assert coordinator is not None
        coordinator.start()
        self._client = client = Client(link.connection)
        thread = EngineThread(
            engine, lambda error: client.fail_all(EngineStopped(f"rank 0 failed: {type(error).__name__}: {error}"))
        )

        def close() -> None:
            thread.stop()
            engine.close()
            client.close()

        self._close_engine = close

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt (text or token ids), in one continuous batch; outputs in the order of the prompts.

        They may be more than max_queue: what the engine has no room for waits here. If one is refused for another
        reason, the others of this call are aborted and its error is raised.
        """
        return self._run([_submit(self._client, prompt=prompt) for prompt in as_prompts(prompts)], sampling)

    def chat(self, messages: Messages, sampling: SamplingParams | None = None) -> RequestOutput:
        """Answer a conversation, rendered by the model's chat template."""
        return self._run([_submit(self._client, messages=messages)], sampling)[0]

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        sampling: SamplingParams | None = None,
    ) -> RequestHandle:
        """Iterate over the request's Delta events, then Finished. Closing the iterator early aborts the request."""
        submit = _submit(self._client, prompt=prompt, messages=messages, sampling=sampling or SamplingParams())
        return RequestHandle(self._client, submit)

    def submit(self, submit: Submit, on_event: OnEvent | None = None) -> RequestHandle | None:
        """Send one request of the protocol: to `on_event` (called on another thread), or else to an iterable handle."""
        if on_event is None:
            return RequestHandle(self._client, submit)
        self._client.submit(submit, on_event)
        return None

    def abort(self, request_id: str) -> None:
        """End a request early."""
        self._client.abort(request_id)

    def status(self, timeout_s: float = STATUS_TIMEOUT_S) -> Status:
        """The engine's state. Raises Timeout, or EngineStopped."""
        return self._client.status(timeout_s)

    def close(self) -> None:
        """Abort what runs and end the engine with all its ranks. Closing twice is harmless."""
        close, self._close_engine = self._close_engine, lambda: None
        close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self, submits: list[Submit], sampling: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[RequestOutput]:
        submits = _with_sampling(submits, sampling)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        builders = {submit.id: OutputBuilder(submit.sampling.n) for submit in submits}
        outputs: dict[str, RequestOutput] = {}
        by_id = {submit.id: submit for submit in submits}
        refused: deque[Submit] = deque()  # the queue was full; they are sent again as others end
        try:
            for submit in submits:
                self._client.submit(submit, events.put)
            while len(outputs) < len(submits):
                event = _next_event(events, wait=len(outputs) + len(refused) < len(submits))
                if isinstance(event, Failed) and event.error == CapacityExceeded.__name__:
                    refused.append(by_id[event.id])
                    continue
                assert not isinstance(event, Status)
                output = builders[event.id].add(event) if event is not None else None
                if output is not None:
                    outputs[output.id] = output
                if refused and (output is not None or event is None):
                    self._client.submit(refused.popleft(), events.put)
        finally:
            for submit in submits:
                if submit.id not in outputs:
                    self._client.abort(submit.id)
        return [outputs[submit.id] for submit in submits]


def _next_event(events: queue.SimpleQueue[Event], wait: bool) -> Event | None:
    """The next event; None if there is none for a while and there is nothing to `wait` for."""
    try:
        return events.get(timeout=None if wait else RETRY_S)
    except queue.Empty:
        return None


class AsyncLLM:
    """The same engine for asyncio: many requests at once on one event loop. Construction blocks until it is ready."""

    def __init__(self, model: str, *, ranks: int = 1, **config: Any) -> None:
        self._llm = LLM(model, ranks=ranks, **config)

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
    ) -> AsyncIterator[Delta | Finished]:
        """Yield Delta events, then Finished. Leaving the iteration, or cancelling the task, aborts the request."""
        client = self._llm._client
        submit = _submit(client, prompt=prompt, messages=messages, sampling=sampling or SamplingParams())
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def on_event(event: Event) -> None:
            # A loop that is closed by then raises, and the client aborts the request.
            loop.call_soon_threadsafe(events.put_nowait, event)

        client.submit(submit, on_event)
        ended = False
        try:
            while not ended:
                event = await events.get()
                ended = isinstance(event, Finished | Failed)
                if isinstance(event, Failed):
                    raise to_error(event)
                assert isinstance(event, Delta | Finished)
                yield event
        finally:
            if not ended:
                client.abort(submit.id)

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        sampling: SamplingParams | None = None,
    ) -> RequestOutput:
        """Complete one prompt or conversation; gather several calls to batch them."""
        builder = OutputBuilder((sampling or SamplingParams()).n)
        output = None
        async for event in self.stream(prompt, messages=messages, sampling=sampling):
            output = builder.add(event)
        assert output is not None
        return output

    async def status(self) -> Status:
        """The engine's state."""
        return await asyncio.to_thread(self._llm.status)

    async def close(self) -> None:
        """End the engine with all its ranks."""
        await asyncio.to_thread(self._llm.close)


def choose_device(config: EngineConfig) -> torch.device:
    """The device of a rank that is alone in its process. Raises ConfigError if this machine lacks it."""
    kind = device_type(config)
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list: a list of integers is one prompt of token ids."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    for prompt in prompts:
        if not isinstance(prompt, str | list):
            raise InvalidRequest(f"prompt={prompt!r} must be text or a list of token ids")
    return list(prompts)  # type: ignore[arg-type]


def _submit(
    client: Client,
    *,
    prompt: Prompt | None = None,
    messages: Messages | None = None,
    sampling: SamplingParams | None = None,
) -> Submit:
    return Submit(
        id=client.new_id(),
        prompt=prompt if isinstance(prompt, str) else None,
        token_ids=None if isinstance(prompt, str) else prompt,
        messages=messages,
        sampling=sampling or SamplingParams(),
    )


def _with_sampling(submits: list[Submit], sampling: SamplingParams | Sequence[SamplingParams] | None) -> list[Submit]:
    if sampling is None:
        return submits
    each = [sampling] * len(submits) if isinstance(sampling, SamplingParams) else list(sampling)
    if len(each) != len(submits):
        raise InvalidRequest(
            f"{len(each)} sampling parameters were given for {len(submits)} prompts: give one for all, or one for each"
        )
    return [msgspec.structs.replace(submit, sampling=params) for submit, params in zip(submits, each, strict=True)]
