"""A step that a rank has handed to its device, and what comes of it."""

from __future__ import annotations

import torch

from ..protocol.logprobs import TokenLogprobs
from ..scheduling.step_plan import StepResult


class LaunchedStep:
    """Rank 0 asks it for the result, once it needs it; the other ranks leave it alone."""

    def __init__(
        self,
        token_ids: torch.Tensor,
        logprobs: list[TokenLogprobs | None],
        prompt_logprobs: dict[int, list[TokenLogprobs]],
    ) -> None:
        """`token_ids` are int64 (S,), maybe on a GPU that has yet to compute them: they are on their way already."""
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs
        self._token_ids = token_ids
        self._arrived: torch.cuda.Event | None = None
        if token_ids.device.type == "cuda":
            self._token_ids = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
            self._token_ids.copy_(token_ids, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def result(self) -> StepResult:
        """Waits for the device: the one time in a step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return StepResult(self._token_ids.tolist(), self._logprobs, self._prompt_logprobs)
