"""LLM inside somebody else's torchrun job (training, RL): on the process group they pass, without global state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from ...parallel.collectives.base import CollectiveError, CollectivesUnavailable
from ...parallel.collectives.shared_memory import SharedMemoryControl
from ...parallel.control import ControlChannel
from ...parallel.group import adopt_group, has_nccl
from ..config import EngineConfig
from ..engine import Engine, EngineThread
from ..errors import CheckpointError, ConfigError, EngineStopped, PhalanxError
from ..protocol.messages import Failed
from ..protocol.sampling_params import SamplingParams
from ..protocol.structured import StructuredOutput
from ..protocol.transport import InProcess
from ..scheduling.step_plan import Stop, decode, encode
from .client import to_error
from .llm import LLM
from .requests import Messages, Prompt, RequestOutput, as_prompts

_Outcome = list[RequestOutput] | Failed
_LAST = "last"
"""The id of a Failed after which its engine answers nothing any more."""


class GroupLLM:
    """Every rank of the process group makes one and calls the same methods in the same order; all get the same result.

    Rank 0's arguments count. Between calls the ranks are the caller's: nothing runs, and nothing global was touched
    (no signal handlers, no global random state, no environment). KV cache and prefix cache live until close().
    """

    def __init__(self, process_group: dist.ProcessGroup, model: str, **config: Any) -> None:
        """`config` are EngineConfig's fields; ranks is the group's size.

        Raises ConfigError or CheckpointError if the engine cannot be built, on all ranks what one of them met.
        """
        size = dist.get_world_size(process_group)
        self._config = _agreed_config(process_group, {"model": model, "ranks": size, **config})

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

        self._stopped: str | None = None
        self._closed = False
        link = InProcess() if self._group.rank == 0 else None
        try:
            self._engine = Engine(self._config, self._group, link.transport if link else None)
            self._llm = LLM.paused(self._engine, link) if link else None
        except CollectiveError as error:
            raise to_error(self._give_up(error)) from error
        except BaseException as error:
            self._give_up(error)
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        structured: StructuredOutput | Sequence[StructuredOutput | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt, on all ranks together. Raises on every rank what LLM.generate raises."""
        return self._together(lambda llm: llm.generate(as_prompts(prompts), sampling, structured))

    def chat(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        structured: StructuredOutput | None = None,
    ) -> RequestOutput:
        """Answer a conversation, on all ranks together."""
        return self._together(lambda llm: [llm.chat(messages, sampling, structured)])[0]

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
            if outcome.id == _LAST:
                self._stopped = outcome.message
            raise to_error(outcome)
        return outcome

    def _follow(self) -> _Outcome:
        try:
            outcome: _Outcome = msgspec.msgpack.decode(self._engine.run(), type=_Outcome)
        except Exception as error:
            raise EngineStopped(self._give_up(error).message) from error
        except BaseException as error:
            self._give_up(error)
            raise
        return outcome

    def _lead(self, llm: LLM, call: Callable[[LLM], list[RequestOutput]]) -> _Outcome:
        outcome: _Outcome = Failed("", EngineStopped.__name__, "the engine stopped before it answered")
        failures: list[BaseException] = []
        thread = EngineThread(self._engine, failures.append, lambda: msgspec.msgpack.encode(outcome))
        try:
            outcome = call(llm)
        except PhalanxError as error:
            outcome = Failed("", type(error).__name__, str(error))
        except BaseException as error:
            # The caller's own, such as KeyboardInterrupt: the engine is whole, but this call has no result anywhere.
            outcome = Failed("", EngineStopped.__name__, f"rank 0 was interrupted by {type(error).__name__}: {error}")
            raise
        finally:
            if not thread.stop():
                failures.append(EngineStopped("a step has not ended within timeout_s"))
        if failures:
            raise EngineStopped(self._give_up(failures[0]).message) from failures[0]
        return outcome

    def _give_up(self, error: BaseException) -> Failed:
        """Leave the group for good, so that no other rank waits for this one. Returns why, for the caller.

        What rank 0 met, the others raise too, where control messages do not take part in the ranks' collectives.
        """
        group = self._group
        name = type(error).__name__ if isinstance(error, ConfigError | CheckpointError) else EngineStopped.__name__
        failed = Failed(_LAST, name, f"rank {group.rank} failed: {type(error).__name__}: {error}")
        if isinstance(group.control, SharedMemoryControl):
            with contextlib.suppress(RuntimeError):  # rank 0 has gone, or all others have
                if group.rank == 0:
                    group.control.send(encode(Stop(msgspec.msgpack.encode(failed))))
                elif isinstance(error, CollectiveError):
                    failed = _last_word(group.control) or failed

        self._stopped = failed.message
        group.close()
        return failed


def _last_word(control: ControlChannel) -> Failed | None:
    """Why rank 0 left the group, if it said so. Raises CollectiveError if it left without a word."""
    while not isinstance(message := decode(control.receive()), Stop):
        pass
    outcome = msgspec.msgpack.decode(message.payload, type=_Outcome)
    return outcome if isinstance(outcome, Failed) else None


def _agreed_config(process_group: dist.ProcessGroup, values: dict[str, Any]) -> EngineConfig:
    """Return the configuration, if every rank can make its own. Otherwise all raise the first rank's error."""
    config = None
    problem = b""
    try:
        config = EngineConfig.from_dict(values)
    except Exception as error:
        name = type(error).__name__ if isinstance(error, PhalanxError) else ConfigError.__name__
        problem = msgspec.msgpack.encode(Failed("", name, str(error)))

    # Tensors, for which the group has a device: torch's own way of sending objects unpickles.
    cpu = torch.device("cpu")
    device = cpu if cpu in process_group._device_types else torch.device("cuda", torch.cuda.current_device())
    size = dist.get_world_size(process_group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(problem)], device=device), group=process_group)
    for rank, length in enumerate(lengths):
        if length:
            text = torch.zeros(int(length), dtype=torch.uint8, device=device)
            if rank == dist.get_rank(process_group):
                text = torch.tensor(list(problem), dtype=torch.uint8, device=device)
            dist.broadcast(text, group_src=rank, group=process_group)
            raise to_error(msgspec.msgpack.decode(bytes(text.tolist()), type=Failed))
    assert config is not None
    return config
