"""The Python API: LLM, for programs that wait. For asyncio see async_llm.py.

What computes (torch, the engine) is imported where an engine is made in this process: the client of a group in other
processes needs none of it.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig, seconds
from ..errors import CapacityExceeded, EngineFault, EngineStopped, Timeout
from ..protocol.messages import Accepted, Delta, Event, Failed, ModelInfo, Status, Submit
from ..protocol.sampling_params import SamplingParams
from ..protocol.secret import read_secret
from ..protocol.structured import StructuredOutput
from ..protocol.transport import InProcess, ZmqConnection
from .callbacks import OnEvent
from .client import Client, RequestHandle
from .lifetime import Lifetime, is_forked
from .requests import (
    Messages,
    OutputBuilder,
    Prompt,
    RequestOutput,
    as_prompts,
    make_submit,
    spread_sampling,
    spread_structured,
)
from .resume.connection import ResumingConnection
from .thread_room import check_thread_room

if TYPE_CHECKING:
    import torch

    from ...parallel.loading.checkpoint import Progress
    from ..engine import Engine

STATUS_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 60.0
"""Seconds that a client of a group elsewhere waits for its first answer."""
RESTART_WAIT_S = 60.0
"""Seconds for which it waits for another engine at the address of one that has fallen silent."""
RETRY_S = 0.05
"""Seconds until a request that the engine had no room for is sent again, if none of the same call ends before."""


class LLM:
    """An engine and a client of it. ranks=1 runs inside this process; more start a group of their own.

    It ends with close(), when it is dropped, or with the interpreter. A process forked from this one cannot use it.

    Keyword arguments are EngineConfig's fields. Raises ConfigError or CheckpointError if the engine cannot be built.
    """

    client: Client
    """Sends the requests; other faces of the engine, such as AsyncLLM, use it too."""
    _lifetime: Lifetime

    def __init__(self, model: str, *, ranks: int = 1, on_progress: Progress | None = None, **config: Any) -> None:
        self._start(EngineConfig.from_dict({"model": model, "ranks": ranks, **config}), on_progress)

    @classmethod
    def from_config(cls, config: EngineConfig, on_progress: Progress | None = None) -> LLM:
        """The same from a configuration that is already made."""
        llm = cls.__new__(cls)
        llm._start(config, on_progress)
        return llm

    @classmethod
    def connect(
        cls,
        address: str,
        *,
        secret_file: str | Path | None = None,
        timeout_s: float | None = CONNECT_TIMEOUT_S,
        restart_wait_s: float = RESTART_WAIT_S,
    ) -> LLM:
        """A client of a group that runs elsewhere (`launch.worker`): at ipc://PATH, or tcp://HOST:PORT with its secret.

        Waits until the engine answers. close() ends this client's requests, not the group. When the group is started
        again at the address, as torchrun does, requests go on where they were; they fail with EngineStopped once it has
        been silent for `restart_wait_s` seconds more than it takes to notice. Raises ConfigError for an address, a
        secret or a time that cannot be used, and Timeout if no engine answers within `timeout_s` seconds (None waits).
        """
        llm = cls.__new__(cls)
        secret = None if secret_file is None else read_secret(secret_file)
        timeout_s = None if timeout_s is None else seconds("timeout_s", timeout_s)
        restart_wait_s = seconds("restart_wait_s", restart_wait_s)
        llm.client = client = Client(ResumingConnection(ZmqConnection(address, secret), restart_wait_s))
        llm._lifetime = Lifetime(llm, partial(client.leave, EngineStopped("the connection was closed")))
        try:
            client.status(timeout_s)
        except Timeout:
            llm.close()
            raise Timeout(f"no engine answered at {address} within {timeout_s:g} s: see whether it runs") from None
        except BaseException:
            llm.close()
            raise
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
        llm.client = client = Client(link.connection)

        def close() -> None:
            engine.close()
            client.close()

        llm._lifetime = Lifetime(llm, close)
        return llm

    def _start(self, config: EngineConfig, on_progress: Progress | None) -> None:
        if config.ranks > 1:
            from .group_process import GroupProcess

            process = GroupProcess(config)
            self.client = process.client
            self._lifetime = Lifetime(self, process.close)
            return

        check_thread_room(config)
        import torch

        from ...parallel.group import local_group
        from ..engine import Engine

        if config.threads:
            torch.set_num_threads(config.threads)
        link = InProcess()

        def make() -> Engine:
            return Engine(config, local_group(choose_device(config)), link.transport, on_progress)

        if not is_forked():
            self._attach(make(), link)
            return
        # OpenMP waits for ever for the threads that a thread of the parent had; a new thread has none yet.
        with ThreadPoolExecutor(1, "phalanx-make") as thread:
            engine = thread.submit(make).result()
        self._attach(engine, link)

    def _attach(self, engine: Engine, link: InProcess) -> None:
        from ..engine import EngineThread

        coordinator = engine.coordinator
        assert coordinator is not None
        coordinator.start()
        self.client = client = Client(link.connection)
        thread = EngineThread(
            engine, lambda error: client.fail_all(EngineStopped(f"rank 0 failed: {type(error).__name__}: {error}"))
        )

        def close() -> None:
            if thread.stop():
                engine.close()
            client.close()

        self._lifetime = Lifetime(self, close)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        structured: StructuredOutput | Sequence[StructuredOutput | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt (text or token ids, in any iterable), in one continuous batch; outputs in their order.

        `structured` says what the answers must match, one for all or one for each.
        They may be more than max_queue: what the engine has no room for waits here. If one is refused for another
        reason, the others of this call are aborted and its error is raised. Where abort() or close() ends them early,
        answers have what there was of them, with the finish_reason "abort"; after close() it raises EngineStopped
        if the engine had not taken in all of them.
        """
        each = as_prompts(prompts)
        samplings = spread_sampling(sampling, len(each))
        forms = spread_structured(structured, len(each))
        submits = [
            make_submit(self.client.new_id(), prompt=prompt, sampling=params, structured=form)
            for prompt, params, form in zip(each, samplings, forms, strict=True)
        ]
        return self._run(submits)

    def chat(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        structured: StructuredOutput | None = None,
    ) -> RequestOutput:
        """Answer a conversation, rendered by the model's chat template; the answer matches `structured`."""
        submit = make_submit(self.client.new_id(), messages=messages, sampling=sampling, structured=structured)
        return self._run([submit])[0]

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        sampling: SamplingParams | None = None,
        structured: StructuredOutput | None = None,
    ) -> RequestHandle:
        """Iterate over the request's Delta events, then Finished. Closing the iterator early aborts the request."""
        submit = make_submit(
            self.client.new_id(), prompt=prompt, messages=messages, sampling=sampling, structured=structured
        )
        return RequestHandle(self.client, submit, owner=self)

    def submit(self, submit: Submit, on_event: OnEvent | None = None, *, quick: bool = False) -> RequestHandle | None:
        """Send one request of the protocol: to `on_event` (called on another thread), or else to an iterable handle.

        `on_event` may take long, raise or close this LLM; for a `quick` one see Client.submit().
        """
        if on_event is None:
            return RequestHandle(self.client, submit, owner=self)
        self.client.submit(submit, on_event, quick=quick)
        return None

    def abort(self, request_id: str) -> None:
        """End a request early."""
        self.client.abort(request_id)

    def status(self, timeout_s: float = STATUS_TIMEOUT_S) -> Status:
        """The engine's state. Raises Timeout, or EngineStopped."""
        return self.client.status(timeout_s)

    def close(self) -> None:
        """Abort what runs and end the engine with all its ranks. Closing twice is harmless."""
        self._lifetime.end()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, submits: list[Submit]) -> list[RequestOutput]:
        """Answer several requests in one batch; outputs in their order. Raises the error of the first that fails."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        builders = {submit.id: OutputBuilder(submit.sampling.n) for submit in submits}
        outputs: dict[str, RequestOutput] = {}
        by_id = {submit.id: submit for submit in submits}
        refused: deque[Submit] = deque()  # the queue was full; they are sent again as others end

        def on_event(event: Event) -> None:
            # A token wakes nobody: the thread that brings it adds it, and the caller's waits for ends alone.
            if isinstance(event, Delta):
                try:
                    builders[event.id].add(event)
                except Exception as error:  # for the caller to hear of
                    why = f"a piece of the answer could not be taken in: {error!r}"
                    events.put(Failed(event.id, EngineFault.__name__, why))
            elif not isinstance(event, Accepted):
                events.put(event)

        try:
            for submit in submits:
                self.client.submit(submit, on_event, quick=True)

            while len(outputs) < len(submits):
                event = _next_event(events, wait=len(outputs) + len(refused) < len(submits))
                if isinstance(event, Failed) and event.error == CapacityExceeded.__name__:
                    refused.append(by_id[event.id])
                    continue

                assert not isinstance(event, Status | ModelInfo)
                output = builders[event.id].add(event) if event is not None else None
                if output is not None:
                    outputs[output.id] = output
                if refused and (output is not None or event is None):
                    self.client.submit(refused.popleft(), on_event, quick=True)
        finally:
            for submit in submits:
                if submit.id not in outputs:
                    self.client.abort(submit.id)

        return [outputs[submit.id] for submit in submits]


def _next_event(events: queue.SimpleQueue[Event], wait: bool) -> Event | None:
    """The next event; None if there is none for a while and there is nothing to `wait` for."""
    try:
        return events.get(timeout=None if wait else RETRY_S)
    except queue.Empty:
        return None


def choose_device(config: EngineConfig) -> torch.device:
    """The device of a rank that is alone in its process. Raises ConfigError if this machine lacks it."""
    import torch

    from ..engine import device_type

    kind = device_type(config)
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
