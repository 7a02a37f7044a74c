"""The tokens that a grammar allows, as bits of the whole vocabulary, on a rank's shard of the logits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ...kernels.sampling import mask_rows


def apply_masks(logits: torch.Tensor, vocab: range, masks: Mapping[int, bytes]) -> None:
    """Set what the masks do not allow to -inf in rows of the float32 logits (R, len(vocab)), in place.

    A mask has a bit for each token of the whole vocabulary, the lowest first in each byte, and maybe some more: its
    size is a multiple of 4 bytes. An empty one allows everything. Nothing waits for the device.
    """
    rows = [row for row, mask in masks.items() if mask]
    if not rows or not vocab:
        return

    words = np.stack([np.frombuffer(masks[row], dtype=np.int32) for row in rows])
    mask_rows(logits, rows, words[:, vocab.start // 32 : -(-vocab.stop // 32)], vocab.start % 32)
