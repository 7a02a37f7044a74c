"""The choice of the next token from logits cut along the vocabulary over the ranks; exact at any number of them.

A row's draw is the argmax of logit / temperature + Gumbel noise (the Gumbel-max trick, arXiv:1411.0030), and the noise
depends on (seed, position, global token id) alone: neither the batch nor the number of ranks changes it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from ...kernels.sampling import argmax, gumbel_argmax
from ...parallel.collectives.base import Collectives
from ..errors import ConfigError
from ..protocol.logprobs import TokenLogprobs
from ..scheduling.step_plan import SlotSampling
from .logprobs import (
    gather_logprobs,
    kept_logprobs,
    key_token_ids,
    key_values,
    log_sum_exp,
    token_keys,
    top_keys,
)
from .penalties import SampleRow, edit_rows
from .token_counts import TokenCounts
from .truncation import RowSettings, draw, kept_counts, put_rows, take_rows

INVALID_TOKEN = -1
"""Stands for a token where the row's logits hold NaN or +inf, or allow no token. No other row is affected."""

_NEEDS_FULL_GATHER = -2
_CANDIDATES = 64
_GROWTH = 64  # of the candidates, until they hold all that an undecided row keeps: few rows need more than once

_log = logging.getLogger(__name__)


class Sampler:
    """Chooses tokens together with the other ranks' samplers: every call is made by all ranks, for the same rows."""

    def __init__(
        self,
        collectives: Collectives,
        vocab: range,
        vocab_size: int,
        candidates: int = _CANDIDATES,
        token_counts: TokenCounts | None = None,
    ) -> None:
        """`vocab` is the shard whose logits this rank has; the shards are contiguous in rank order.

        For top-k, top-p and min-p each rank sends its `candidates` likeliest tokens; a row that keeps more than those
        surely hold is decided over the whole vocabulary instead. Penalties use `token_counts`, if there are any,
        instead of the rows' token ids. Calls one collective.

        Raises ConfigError if the shards do not add up to `vocab_size`.
        """
        if candidates < 1:
            raise ConfigError(f"candidates={candidates} must be at least 1")
        self._collectives = collectives
        self._token_counts = token_counts
        self._vocab = vocab
        self._vocab_size = vocab_size
        self._width = min(candidates, vocab_size)
        self._failures: dict[int, Exception] = {}

        # Every rank learns all shards' sizes.
        sizes = torch.zeros(collectives.size, device=collectives.device)
        sizes[collectives.rank] = len(vocab)
        self._shard_sizes = [int(size) for size in collectives.all_reduce(sizes).tolist()]
        start = sum(self._shard_sizes[: collectives.rank])
        if sum(self._shard_sizes) != vocab_size or vocab.start != start:
            raise ConfigError(
                f"rank {collectives.rank} has the vocabulary rows {vocab} of shards of {self._shard_sizes} rows: "
                f"it must start at {start}, and the shards must add up to vocab_size={vocab_size}"
            )

    def take_failures(self) -> dict[int, Exception]:
        """Return why rows of the last call of sample() or choose() could not be sampled, as far as this rank knows.

        Such a row has INVALID_TOKEN. What is raised between two collectives, for one row, ends nothing else.
        """
        failures, self._failures = self._failures, {}
        return failures

    @torch.inference_mode()
    def sample(
        self, logits: torch.Tensor, rows: Sequence[SampleRow], masks: Mapping[int, bytes] | None = None
    ) -> tuple[list[int], list[TokenLogprobs | None]] | None:
        """A token for each row, with log-probabilities where the row asks for them, on rank 0; None on the others.

        `logits` is float32 (len(rows), len(vocab)) and is overwritten. `masks` has, by row, the tokens that a grammar
        allows: a bit for each token of the whole vocabulary, the lowest first in each byte. A row that cannot be
        sampled gets INVALID_TOKEN and no log-probabilities; the others are not affected.
        One gather. Rows of top-p, min-p or a top-k above the candidates add one broadcast, and one gather of the few
        that the candidates do not decide; log-probabilities add one or two broadcasts, one all_reduce and one gather.
        """
        if not rows:
            return ([], []) if self._collectives.rank == 0 else None
        originals = self._edit(logits, rows, masks or {})
        if all(_is_plain_greedy(row.sampling) for row in rows):
            tokens = self._argmax(logits)
            return None if tokens is None else (tokens, [None] * len(rows))

        step = self._run(logits, rows, originals, share=False)
        if self._collectives.rank != 0:
            return None
        return step.tokens.tolist(), step.entries

    @torch.inference_mode()
    def choose(
        self, logits: torch.Tensor, rows: Sequence[SampleRow], masks: Mapping[int, bytes] | None = None
    ) -> tuple[torch.Tensor, list[TokenLogprobs | None]]:
        """As sample(), but the tokens stay on the device, int64 (len(rows),), equal on every rank: one broadcast more.

        Nothing waits for the device, unless log-probabilities are asked for, or top-p or min-p without a top-k that the
        candidates hold. The log-probabilities are None but on rank 0.
        """
        originals = self._edit(logits, rows, masks or {})
        if self._collectives.size == 1 and all(_is_plain_greedy(row.sampling) for row in rows):
            most, indices = argmax(logits)
            return torch.where(most.isfinite(), indices, INVALID_TOKEN), [None] * len(rows)

        step = self._run(logits, rows, originals, share=True)
        return step.tokens, step.entries

    def _run(
        self, logits: torch.Tensor, rows: Sequence[SampleRow], originals: dict[int, torch.Tensor], *, share: bool
    ) -> _Step:
        """Choose the tokens: they are right on rank 0, and with `share` on every rank."""
        step = _Step(logits, rows, self._vocab_size)
        parts = self._collectives.gather(self._summary(step))
        if parts is not None:
            self._choose(step, torch.stack(parts))

        # A row of no more tokens than were gathered is always decided.
        may_need_full_gather = any(not 0 < rows[i].sampling.top_k <= self._width for i in step.truncated)
        if share or step.needs_full_logprobs or may_need_full_gather:
            step.tokens = self._collectives.broadcast(step.tokens)

        if may_need_full_gather:
            needs_full_gather = [i for i, token in enumerate(step.tokens.tolist()) if token == _NEEDS_FULL_GATHER]
            if needs_full_gather:
                self._choose_from_full_gather(step, needs_full_gather)
            if needs_full_gather and (share or not set(needs_full_gather).isdisjoint(step.needs_full_logprobs)):
                step.tokens = self._collectives.broadcast(step.tokens)

        if step.needs_full_logprobs:
            self._score(step, originals)
        return step

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits: torch.Tensor, token_ids: npt.NDArray[np.integer], count: int
    ) -> list[TokenLogprobs] | None:
        """Log-probabilities, under the model's distribution, of the tokens that follow P positions; None but on rank 0.

        `logits` is float32 (P, len(vocab)), `token_ids` the P tokens that follow, and `count` how many of the likeliest
        to return at each position, from 0. One all_reduce and one gather.
        """
        if not len(token_ids):
            return [] if self._collectives.rank == 0 else None
        chosen = torch.from_numpy(token_ids.astype(np.int64)).to(logits.device)
        counts = [count] * len(token_ids)
        temperature = logits.new_ones(len(token_ids), 1)
        return gather_logprobs(self._collectives, self._vocab, logits, chosen, counts, temperature=temperature)

    def _edit(
        self, logits: torch.Tensor, rows: Sequence[SampleRow], masks: Mapping[int, bytes]
    ) -> dict[int, torch.Tensor]:
        """As edit_rows(): most steps have no row that asks for it."""
        if not masks and not any(row.sampling.changes_logits(row.position - row.prompt_length) for row in rows):
            return {}
        return edit_rows(logits, self._vocab, rows, self._token_counts, masks, self._failures)

    def _argmax(self, logits: torch.Tensor) -> list[int] | None:
        """Return each row's token of the largest logit, on rank 0, in few operations. One gather."""
        most, indices = argmax(logits)
        # A double holds a token id as it is.
        parts = self._collectives.gather(torch.stack((most.double(), (indices + self._vocab.start).double())))
        if parts is None:
            return None
        values, tokens = np.stack([part.cpu().numpy() for part in parts], axis=1)
        best = values.argmax(axis=0)  # the first of equals, so the lowest id; a NaN before all others
        rows = np.arange(len(best))
        found = np.where(np.isfinite(values[best, rows]), tokens[best, rows], INVALID_TOKEN)
        return [int(token) for token in found]

    def _summary(self, step: _Step) -> torch.Tensor:
        """What rank 0 needs to know of this shard, int64 in one dimension; `_choose` takes it apart."""
        first = self._vocab.start
        parts = []
        if step.greedy:
            parts.append(top_keys(take_rows(step.logits, step.greedy), first, 1))
        if step.sampled:
            settings = step.settings.take(step.sampled)
            counter = (settings.position << 32) | first
            logits = take_rows(step.logits, step.sampled)
            most, indices = gumbel_argmax(logits, settings.temperature, settings.seed, counter)
            parts.append(token_keys(most, indices + first).unsqueeze(1))
        if step.truncated:
            parts.append(top_keys(take_rows(step.logits, step.truncated), first, self._width))
        if step.needs_full_logsumexp:
            temperature = take_rows(step.settings.temperature, step.needs_full_logsumexp)
            parts.append(log_sum_exp(take_rows(step.logits, step.needs_full_logsumexp), temperature).view(torch.int64))
        return torch.cat([part.flatten() for part in parts])

    def _choose(self, step: _Step, summaries: torch.Tensor) -> None:
        """Set the tokens, on rank 0, from the ranks' summaries, int64 (ranks, L).

        Rows for which these do not suffice get _NEEDS_FULL_GATHER.
        """
        plain = step.greedy + step.sampled
        end = len(plain) + len(step.truncated) * self._width
        keys = summaries[:, len(plain) : end]
        totals = summaries[:, end:]

        if plain:
            best = summaries[:, : len(plain)].amax(dim=0)
            put_rows(step.tokens, plain, torch.where(key_values(best).isfinite(), key_token_ids(best), INVALID_TOKEN))

        if step.needs_full_logsumexp:
            full = totals.contiguous().view(torch.float64).logsumexp(dim=0)
            put_rows(step.totals[:, 0], step.needs_full_logsumexp, full)

        if step.truncated:
            keys = keys.reshape(len(summaries), -1, self._width).transpose(0, 1)
            merged = keys.flatten(1).sort(dim=1, descending=True).values
            exact = torch.full((len(step.truncated), 1), self._vocab_size, device=keys.device)
            # What a rank did not send comes after the last of what it sent.
            partial = [rank for rank, size in enumerate(self._shard_sizes) if size > self._width]
            if partial:
                last = take_rows(keys[:, :, -1].T, partial).amax(dim=0).unsqueeze(1)
                exact = (merged >= last).sum(dim=1, keepdim=True)
            self._decide(step, step.truncated, merged, exact)

    def _choose_from_full_gather(self, step: _Step, needs_full_gather: list[int]) -> None:
        """Gather the whole vocabulary's logits of these rows and set their tokens on rank 0."""
        missing = max(self._shard_sizes) - len(self._vocab)
        padded = torch.nn.functional.pad(step.logits[needs_full_gather], (0, missing), value=-torch.inf)
        parts = self._collectives.gather(padded)
        if parts is None:
            return
        logits = torch.cat([part[:, :size] for part, size in zip(parts, self._shard_sizes, strict=True)], dim=1)

        for i, row in zip(needs_full_gather, logits.unsqueeze(1), strict=True):
            count = self._width
            try:
                while step.tokens[i] == _NEEDS_FULL_GATHER:
                    count = min(count * _GROWTH, self._vocab_size)
                    self._decide(step, [i], top_keys(row, 0, count), torch.tensor([[count]], device=row.device))
            except Exception as error:
                self._fail(step, i, error)

    def _decide(self, step: _Step, index: list[int], keys: torch.Tensor, exact: torch.Tensor) -> None:
        """Set the tokens of the rows `index` from their sorted keys, int64 (len(index), M), where `exact` suffices.

        The first `exact` keys, int64 (len(index), 1), are the first of the whole vocabulary; others may be missing
        between and after the rest.
        """
        settings = step.settings.take(index)
        kept, decided = kept_counts(keys, exact, settings, take_rows(step.totals, index), self._vocab_size)
        drawn = torch.where(decided, draw(keys, kept, settings), _NEEDS_FULL_GATHER)
        tokens = torch.where(key_values(keys[:, :1]).isfinite(), drawn, INVALID_TOKEN).squeeze(1)
        put_rows(step.tokens, index, tokens)
        for j, i in enumerate(index):
            sampling = step.rows[i].sampling
            if sampling.logprobs >= 0 and sampling.processed_logprobs and tokens[j] >= 0:
                temperature = float(settings.temperature[j])
                try:
                    step.logprobs[i] = kept_logprobs(keys[j, : kept[j]], temperature, int(tokens[j]), sampling.logprobs)
                except Exception as error:
                    self._fail(step, i, error)

    def _fail(self, step: _Step, i: int, error: Exception) -> None:
        """Let row `i` have no token, on rank 0, which alone decides between the gather and the broadcast."""
        _log.error("the row of a request could not be sampled", exc_info=error)
        step.tokens[i] = INVALID_TOKEN
        self._failures[i] = error

    def _score(self, step: _Step, originals: dict[int, torch.Tensor]) -> None:
        """Add the log-probabilities over the whole vocabulary; every rank knows the rows' tokens by now."""
        for i, original in originals.items():
            step.logits[i] = original
        temperature = step.logits.new_ones(len(step.needs_full_logprobs), 1)
        for j, i in enumerate(step.needs_full_logprobs):
            if step.rows[i].sampling.processed_logprobs:
                temperature[j] = step.settings.temperature[i]

        counts = [step.rows[i].sampling.logprobs for i in step.needs_full_logprobs]
        logits = take_rows(step.logits, step.needs_full_logprobs)
        tokens = step.tokens[step.needs_full_logprobs]
        scored = gather_logprobs(self._collectives, self._vocab, logits, tokens, counts, temperature=temperature)
        if scored is not None:
            found = zip(step.needs_full_logprobs, scored, strict=True)
            step.logprobs.update((i, logprobs) for i, logprobs in found if logprobs.token_id != INVALID_TOKEN)


def _is_plain_greedy(sampling: SlotSampling) -> bool:
    """Whether only the token is asked for, and the largest logit alone decides."""
    return sampling.temperature == 0.0 and sampling.logprobs < 0


@dataclass
class _Step:
    """One call of `sample`: its rows sorted by what they need, and what is known of them so far."""

    logits: torch.Tensor
    rows: Sequence[SampleRow]
    vocab_size: int
    tokens: torch.Tensor = field(init=False)  # int64 (R,), on rank 0 until they are broadcast
    totals: torch.Tensor = field(init=False)  # float64 (R, 1): log-sum-exp over the vocabulary, where a row needs it
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)

    @property
    def entries(self) -> list[TokenLogprobs | None]:
        """Log-probabilities row by row."""
        return [self.logprobs.get(i) for i in range(len(self.rows))]

    def __post_init__(self) -> None:
        device = self.logits.device
        self.tokens = torch.zeros(len(self.rows), dtype=torch.int64, device=device)
        self.totals = torch.zeros(len(self.rows), 1, dtype=torch.float64, device=device)
        samplings = [row.sampling for row in self.rows]
        self.greedy = [i for i, sampling in enumerate(samplings) if sampling.temperature == 0.0]
        self.sampled: list[int] = []
        self.truncated: list[int] = []
        # Truncated rows whose nucleus is of the whole vocabulary's probability.
        self.needs_full_logsumexp: list[int] = []
        # Rows whose log-probabilities are over the whole vocabulary.
        self.needs_full_logprobs: list[int] = []

        for i, sampling in enumerate(samplings):
            limited = 0 < sampling.top_k < self.vocab_size
            truncated = sampling.temperature > 0.0 and (limited or sampling.top_p < 1.0 or sampling.min_p > 0.0)
            if truncated:
                self.truncated.append(i)
            elif sampling.temperature > 0.0:
                self.sampled.append(i)
            if truncated and not limited and sampling.top_p < 1.0:
                self.needs_full_logsumexp.append(i)
            if sampling.logprobs >= 0 and not (truncated and sampling.processed_logprobs):
                self.needs_full_logprobs.append(i)

    @cached_property
    def settings(self) -> RowSettings:
        """The rows' settings as tensors, made only if a row needs them."""
        return RowSettings.of(self.rows, self.vocab_size, self.logits.device)
