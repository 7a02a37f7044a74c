"""Tokens of each slot, counted on the device: penalties and bad words need no token that the host does not know yet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...kernels.host_copies import to_device
from ..scheduling.step_plan import SlotSampling, SlotStart
from .logprobs import row_chunks


class TokenCounts:
    """Holds which tokens of one vocabulary shard each slot's prompt has, and how often each occurs in its output.

    The tables take 5 bytes for each slot and token of the shard. The first request with a penalty allocates them.
    """

    def __init__(self, slots: int, vocab: range, device: torch.device) -> None:
        self._slots = slots
        self._vocab = vocab
        self._device = device
        # Prompt, bool, and output, int32, each (slots, len(vocab) + 1).
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        # The last token of each slot, int64 (slots,), from the first request with bad words on.
        self._last: torch.Tensor | None = None

    def start(self, start: SlotStart) -> None:
        """Count the known tokens of a sequence that takes a slot, as far as its sampling needs them."""
        if start.sampling.bad_words:
            if self._last is None:
                self._last = torch.full((self._slots,), -1, dtype=torch.int64, device=self._device)
            self._last[start.slot].fill_(start.token_ids[-1])
        if not start.sampling.needs_token_counts:
            return
        prompt, output = self._allocated()
        seen = np.asarray(start.token_ids, dtype=np.int64)

        prompt[start.slot].zero_()
        prompt[start.slot, self._columns(seen[: start.prompt_length])] = True

        output[start.slot].zero_()
        token_ids, counts = np.unique(seen[start.prompt_length :], return_counts=True)
        # Tokens of other shards go to one extra column, where they may collide.
        output[start.slot, self._columns(token_ids)] = to_device([counts.astype(np.int32)], self._device)[0]

    def add(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Count one more token, int64 (S,), in each of different slots, int64 (S,), without waiting for the device.

        What is no token, below 0, counts for nothing: its row is dropped, or computed once more.
        """
        if self._last is not None:
            self._last[slots] = torch.where(token_ids < 0, self._last[slots], token_ids)
        if self._tables is None:
            return
        first = self._vocab.start
        size = len(self._vocab)
        columns = torch.where((token_ids >= first) & (token_ids < first + size), token_ids - first, size)
        self._tables[1][slots, columns] += 1

    def penalize(
        self, logits: torch.Tensor, rows: list[int], slots: Sequence[int], samplings: Sequence[SlotSampling]
    ) -> None:
        """Apply penalties to `rows` of the float32 logits (R, V) in place; slots and samplings are those of the rows.

        As penalties.edit_logits does: CTRL's repetition penalty (arXiv:1909.05858, section 4.1), and the presence and
        frequency penalties of the OpenAI API.
        """
        prompt, output = self._allocated()
        numbers = [[s.repetition_penalty, s.presence_penalty, s.frequency_penalty] for s in samplings]
        indices = np.array([rows, list(slots)], dtype=np.int64)
        where, penalties = to_device([indices, np.array(numbers, dtype=np.float32)], self._device)
        penalties = penalties.unsqueeze(2)

        everyone = rows == list(range(len(logits)))
        size = len(self._vocab)

        # In chunks of rows, so that the temporaries stay small.
        for some in row_chunks(logits[: len(rows)]):
            index = where[0, some]
            of_slots = where[1, some]
            values = logits[some] if everyone else logits[index]

            counts = output[of_slots, :size]
            repetition, presence, frequency = penalties[some].unbind(1)
            seen = (counts > 0) | prompt[of_slots, :size]
            values = torch.where(seen, torch.where(values > 0, values / repetition, values * repetition), values)
            values -= presence * (counts > 0) + frequency * counts

            if everyone:
                logits[some] = values
            else:
                logits[index] = values

    def mask_words(self, logits: torch.Tensor, slot: int, banned: list[int], preceding: list[int]) -> None:
        """Mask each banned token of the slot's float32 logits (V,) whose preceding token is the slot's last, in place.

        -1 stands for any preceding token. Nothing waits for the device.
        """
        assert self._last is not None
        first = self._vocab.start
        pairs = np.array([banned, preceding], dtype=np.int64)
        pairs = pairs[:, (pairs[0] >= first) & (pairs[0] < first + len(self._vocab))]
        columns, before = to_device([np.concatenate((pairs[0] - first, pairs[1]))], self._device)[0].view(2, -1)

        # A token that ends two words is there twice: sums do not depend on the order.
        hit = (before == self._last[slot]) | (before < 0)
        logits.index_add_(0, columns, torch.zeros_like(columns, dtype=logits.dtype).masked_fill_(hit, -torch.inf))

    def _allocated(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._tables is None:
            shape = self._slots, len(self._vocab) + 1
            self._tables = (
                torch.zeros(shape, dtype=torch.bool, device=self._device),
                torch.zeros(shape, dtype=torch.int32, device=self._device),
            )
        return self._tables

    def _columns(self, token_ids: np.ndarray) -> torch.Tensor:
        first = self._vocab.start
        size = len(self._vocab)
        inside = (token_ids >= first) & (token_ids < first + size)
        return to_device([np.where(inside, token_ids - first, size)], self._device)[0]
