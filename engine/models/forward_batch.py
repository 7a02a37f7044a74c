"""One step's inputs, as the model and the sampler take them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...kernels.attention import AttentionMetadata
from ..sampling.penalties import SampleRow
from ..scheduling.step_plan import SlotSampling


@dataclass(frozen=True)
class PromptRows:
    """Positions of one row whose next prompt token's log-probability was asked for."""

    row: int
    tokens: np.ndarray  # (P,) int64: indices into the step's tokens
    next_token_ids: np.ndarray  # (P,) int32
    sampling: SlotSampling


@dataclass(frozen=True)
class ForwardBatch:
    """One step's inputs on the model's device; T tokens."""

    token_ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64
    lengths: torch.Tensor  # (T,) int64: tokens that each token's sequence had when it was first computed
    attention: AttentionMetadata
    sample_tokens: torch.Tensor  # (S,) int64: indices of the tokens whose successor is sampled
    sample_slots: torch.Tensor  # (S,) int64: their slots
    sample_rows: list[SampleRow]
    prompt_rows: list[PromptRows]
