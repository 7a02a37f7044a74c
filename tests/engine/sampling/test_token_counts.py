"""Penalties by the tokens counted on the device are those by the tokens a host knows, on every shard."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx.engine.sampling.penalties import SampleRow, edit_rows
from phalanx.engine.sampling.token_counts import TokenCounts
from phalanx.engine.scheduling.step_plan import SlotSampling, SlotStart

VOCABULARY = 40
SLOTS = 5
CPU = torch.device("cpu")

samplings = st.builds(
    SlotSampling,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25]),
    min_tokens=st.sampled_from([0, 6]),
    end_token_ids=st.sampled_from([(), (3, 30)]),
    bias_token_ids=st.sampled_from([(), (1, 39, 20)]),
    bias_values=st.just((5.0, -5.0, 2.0)),
    logprobs=st.sampled_from([-1, 2]),
)
tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)


def _row(sampling: SlotSampling, prompt: list[int], output: list[int], slot: int) -> SampleRow:
    token_ids = np.array(prompt + output, dtype=np.int32)
    return SampleRow(sampling, token_ids, len(prompt), len(token_ids), slot)


@settings(max_examples=150, deadline=None)
@given(
    sequences=st.lists(st.tuples(samplings, tokens, tokens), min_size=1, max_size=SLOTS),
    sampled=st.lists(st.lists(st.integers(-1, VOCABULARY - 1), min_size=SLOTS, max_size=SLOTS), max_size=4),
    shard=st.sampled_from([(0, VOCABULARY), (0, 13), (13, VOCABULARY), (20, 20)]),
    earlier=samplings,
)
def test_counted_tokens_give_the_same_logits(
    sequences: list[tuple[SlotSampling, list[int], list[int]]],
    sampled: list[list[int]],
    shard: tuple[int, int],
    earlier: SlotSampling,
) -> None:
    vocab = range(*shard)
    token_counts = TokenCounts(SLOTS, vocab, CPU)
    # Whoever had the slots before is forgotten.
    for slot in range(SLOTS):
        token_counts.start(SlotStart(slot, 1, [7, 8, 9], earlier))
    token_counts.add(torch.arange(SLOTS), torch.full((SLOTS,), 11))
    for slot, (sampling, prompt, output) in enumerate(sequences):
        token_counts.start(SlotStart(slot, len(prompt), prompt + output, sampling))
    outputs = [list(output) for _, _, output in sequences]
    for step in sampled:
        rows = list(range(len(sequences)))[::-1]  # in any order
        token_counts.add(torch.tensor(rows), torch.tensor([step[row] for row in rows]))
        for row in rows:
            if step[row] >= 0:
                outputs[row].append(step[row])
    rows = [_row(sampling, prompt, outputs[slot], slot) for slot, (sampling, prompt, _) in enumerate(sequences)]
    logits = torch.randn(len(rows), len(vocab), generator=torch.Generator().manual_seed(1)) * 3
    by_host, by_device = logits.clone(), logits.clone()
    kept_by_host = edit_rows(by_host, vocab, rows, None)
    told_nothing = [SampleRow(r.sampling, np.zeros(0, np.int32), r.prompt_length, r.position, r.slot) for r in rows]
    kept_by_device = edit_rows(by_device, vocab, told_nothing, token_counts)
    torch.testing.assert_close(by_device, by_host, atol=1e-5, rtol=1e-6)
    assert kept_by_host.keys() == kept_by_device.keys()
    for row, kept in kept_by_device.items():
        assert torch.equal(kept, logits[row])


def test_without_a_penalty_nothing_is_kept_or_counted() -> None:
    token_counts = TokenCounts(SLOTS, range(VOCABULARY), CPU)
    token_counts.start(SlotStart(0, 1, [1, 2], SlotSampling(bias_token_ids=(1,), bias_values=(1.0,))))
    token_counts.add(torch.tensor([0]), torch.tensor([3]))
    assert token_counts._tables is None
    token_counts.start(SlotStart(1, 1, [1, 2], SlotSampling(presence_penalty=1.0)))
    token_counts.add(torch.tensor([1]), torch.tensor([3]))
    logits = torch.zeros(1, VOCABULARY)
    token_counts.penalize(logits, [0], [1], [SlotSampling(presence_penalty=1.0)])
    assert logits[0].nonzero().flatten().tolist() == [2, 3]
    assert logits.min() == pytest.approx(-1.0)


word = st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)
word_samplings = st.builds(
    SlotSampling,
    bad_words=st.lists(word, max_size=6).map(tuple),
    allowed_token_ids=st.sampled_from([(), (0, 1, 3), (2, 39)]),
)
few_tokens = st.lists(st.integers(0, 5), min_size=1, max_size=8)


def _allowed(sampling: SlotSampling, output: list[int]) -> set[int]:
    """The tokens that may follow an output, by definition."""
    allowed = set(sampling.allowed_token_ids or range(VOCABULARY))
    return {t for t in allowed if not any(tuple([*output, t][-len(w) :]) == w for w in sampling.bad_words)}


@settings(max_examples=200, deadline=None)
@given(
    sequences=st.lists(st.tuples(word_samplings, few_tokens, few_tokens), min_size=1, max_size=SLOTS),
    generated=st.integers(0, 3),
    shard=st.sampled_from([(0, VOCABULARY), (0, 3), (3, VOCABULARY), (20, 20)]),
)
def test_bad_words_and_all_but_the_allowed_tokens_are_masked_whoever_knows_the_last_token(
    sequences: list[tuple[SlotSampling, list[int], list[int]]], generated: int, shard: tuple[int, int]
) -> None:
    vocab = range(*shard)
    token_counts = TokenCounts(SLOTS, vocab, CPU)
    for slot, (sampling, prompt, output) in enumerate(sequences):
        known = output[: len(output) - generated] if generated < len(output) else []
        token_counts.start(SlotStart(slot, len(prompt), prompt + known, sampling))
    for place in range(generated, 0, -1):
        slots = [slot for slot, (_, _, output) in enumerate(sequences) if place <= len(output)]
        token_ids = [sequences[slot][2][-place] for slot in slots]
        token_counts.add(torch.tensor(slots, dtype=torch.int64), torch.tensor(token_ids, dtype=torch.int64))
        token_counts.add(torch.tensor(slots, dtype=torch.int64), torch.full((len(slots),), -1))  # gave them no token

    rows = [_row(sampling, prompt, output, slot) for slot, (sampling, prompt, output) in enumerate(sequences)]
    late = [SampleRow(r.sampling, r.token_ids[:-1], r.prompt_length, r.position, r.slot) for r in rows]
    expected = [[token in _allowed(sampling, output) for token in vocab] for sampling, _, output in sequences]
    for told, counts in ((rows, None), (rows, token_counts), (late if generated else rows, token_counts)):
        logits = torch.randn(len(rows), len(vocab), generator=torch.Generator().manual_seed(1))
        before = logits.clone()
        edit_rows(logits, vocab, told, counts)
        kept = torch.tensor(expected).view(len(rows), len(vocab))
        assert torch.equal(logits, before.masked_fill(~kept.bool(), -torch.inf))
