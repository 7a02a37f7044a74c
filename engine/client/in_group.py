"""LLM inside somebody else's torchrun job (training, RL): on the process group they pass, without global state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from ...parallel.collectives.base import CollectivesUnavailable
from ...parallel.group import adopt_group, has_nccl
from ..config import EngineConfig
from ..engine import Engine, EngineThread
from ..errors import ConfigError, EngineStopped, PhalanxError
from ..protocol.messages import Failed
from ..protocol.sampling_params import SamplingParams
from ..protocol.transport import InProcess
from .client import to_error
from .llm import LLM
from .requests import Messages, Prompt, RequestOutput, as_prompts

_Outcome = list[RequestOutput] | Failed


class GroupLLM:
    """Every rank of the process group makes one and calls the same methods in the same order; all get the same result.

    Rank 0's arguments count. Between calls the ranks are the caller's: nothing runs, and nothing global was touched
    (no signal handlers, no global random state, no environment). KV cache and prefix cache live until close().
    """

    def __init__(self, process_group: dist.ProcessGroup, model: str, **config: Any) -> None:
        """`config` are EngineConfig's fields; ranks is the group's size."""
        size = dist.get_world_size(process_group)
        self._config = EngineConfig.from_dict({"model": model, "ranks": size, **config})

        on_cuda = self._config.device == "cuda" or (self._config.device == "auto" and has_nccl(process_group))
        device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        try:
            self._group = adopt_group(
                process_group,
                device=device,
                local_size=size,
                collectives=self._config.collectives,
                timeout_s=self._config.timeout_s,
            )
        except CollectivesUnavailable as error:
            raise ConfigError(f"collectives={self._config.collectives}: {error}; set collectives=auto") from error

        link = InProcess() if self._group.rank == 0 else None
        self._engine = Engine(self._config, self._group, link.transport if link else None)
        self._llm = LLM.paused(self._engine, link) if link else None
        self._stopped: str | None = None
        self._closed = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt, on all ranks together. Raises on every rank what LLM.generate raises."""
        return self._together(lambda llm: llm.generate(as_prompts(prompts), sampling))

    def chat(self, messages: Messages, sampling: SamplingParams | None = None) -> RequestOutput:
        """Answer a conversation, on all ranks together."""
        return self._together(lambda llm: [llm.chat(messages, sampling)])[0]

    def close(self) -> None:
        """Free the engine, on all ranks together. The caller's process group stays. Closing twice is harmless."""
        if self._closed:
            return
        self._closed, self._stopped = True, self._stopped or "the engine was closed"
        if self._llm is not None:
            self._llm.close()
        else:
            self._engine.close()
        self._group.close()

    def _together(self, call: Callable[[LLM], list[RequestOutput]]) -> list[RequestOutput]:
        if self._stopped is not None:
            raise EngineStopped(self._stopped)
        outcome = self._follow() if self._llm is None else self._lead(self._llm, call)
        if isinstance(outcome, Failed):
            raise to_error(outcome)
        return outcome

    def _follow(self) -> _Outcome:
        try:
            outcome: _Outcome = msgspec.msgpack.decode(self._engine.run(), type=_Outcome)
        except Exception as error:
            raise self._failed(error) from error
        return outcome

    def _lead(self, llm: LLM, call: Callable[[LLM], list[RequestOutput]]) -> _Outcome:
        outcome: _Outcome = Failed("", EngineStopped.__name__, "the engine stopped before it answered")
        failures: list[Exception] = []
        thread = EngineThread(self._engine, failures.append, lambda: msgspec.msgpack.encode(outcome))
        try:
            outcome = call(llm)
        except PhalanxError as error:
            outcome = Failed("", type(error).__name__, str(error))
        finally:
            thread.stop()
        if failures:
            raise self._failed(failures[0]) from failures[0]
        return outcome

    def _failed(self, error: Exception) -> EngineStopped:
        self._stopped = f"rank {self._group.rank} failed: {type(error).__name__}: {error}"
        return EngineStopped(self._stopped)
