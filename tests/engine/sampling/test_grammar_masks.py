"""The tokens that a grammar allows, applied to shards of the vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from phalanx.engine.sampling.grammar_masks import apply_masks


@pytest.mark.parametrize("shard", [range(100), range(37), range(37, 69), range(64, 100), range(99, 100), range(50, 50)])
def test_a_shard_is_masked_as_the_whole_would_be(shard: range) -> None:
    rng = np.random.default_rng(0)
    allowed = rng.random((2, 100)) < 0.5
    padded = np.pad(allowed, ((0, 0), (0, 28)))
    masks = [np.packbits(row, bitorder="little").tobytes() for row in padded]
    logits = torch.randn(4, 100)
    expected = logits.clone()
    expected[[0, 2]] = expected[[0, 2]].masked_fill(~torch.from_numpy(allowed), -torch.inf)

    mine = logits[:, shard.start : shard.stop].clone()
    apply_masks(mine, shard, {0: masks[0], 1: b"", 2: masks[1]})
    assert torch.equal(mine, expected[:, shard.start : shard.stop])
