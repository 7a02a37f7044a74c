"""Ranks without a model: they obey plans, and notice when a token would see any KV but that of its own prefix.

The KV of a position is a hash of all tokens up to it, so a wrong block, a stale one or one written by somebody else
shows at once; the next token is a function of that hash and of the seed, so outputs can be predicted and compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from phalanx.engine.protocol.logprobs import TokenLogprobs
from phalanx.engine.scheduling.request import Request, SequenceStatus
from phalanx.engine.scheduling.scheduler import Scheduler
from phalanx.engine.scheduling.step_plan import SlotSampling, StepPlan, StepResult, decode, encode

VOCABULARY = 50
EMPTY = 1469598103934665603


def prefix_hashes(tokens: Iterable[int], before: int = EMPTY) -> list[int]:
    """For each position, a hash of all tokens up to it."""
    hashes = []
    for token in tokens:
        before = hash((before, token))
        hashes.append(before)
    return hashes


def next_token(prefix: int, sampling: SlotSampling, num_output: int) -> int:
    """The token that follows a prefix; as in the sampler, no end token comes before min_tokens are out."""
    token = hash((prefix, sampling.seed)) % VOCABULARY
    while num_output < sampling.min_tokens and token in sampling.end_token_ids:
        token = (token + 1) % VOCABULARY
    return token


def logprob(prefix: int, token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -float(prefix % 97), 1, [token], [-float(prefix % 97)])


def expected_output(request: Request, index: int, max_model_len: int) -> tuple[list[int], str]:
    """What a completion must be, whatever runs beside it: its tokens and its finish reason."""
    tokens, sampling = list(request.prompt), request.samplings[index]
    ends = request.eos_token_ids | request.stop_token_ids
    prefix = prefix_hashes(tokens)[-1]
    while True:
        num_output = len(tokens) - len(request.prompt)
        token = next_token(prefix, sampling, num_output)
        tokens.append(token)
        prefix = hash((prefix, token))
        output = tokens[len(request.prompt) :]
        if token in ends and num_output >= sampling.min_tokens:
            return output, "stop"
        if len(output) == request.max_tokens or len(tokens) == max_model_len:
            return output, "length"


class FakeRanks:
    """Mirrors the slots and the KV cache of the ranks of one scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._size = scheduler.block_size
        self._kv: list[int | None] = [None] * (scheduler.total_blocks * self._size)
        # A sampled token stands here at once, as on the ranks' devices; as many as `_told` were named by a plan too.
        self._tokens: list[list[int]] = [[] for _ in range(scheduler.max_num_seqs)]
        self._told = [0] * scheduler.max_num_seqs
        self._prefixes: list[list[int]] = [[] for _ in range(scheduler.max_num_seqs)]
        self._prompts = [0] * scheduler.max_num_seqs
        self._samplings = [SlotSampling()] * scheduler.max_num_seqs
        self._tables: list[dict[int, int]] = [{} for _ in range(scheduler.max_num_seqs)]
        self.computed = 0

    def execute(self, sent: StepPlan, late: Collection[int] = ()) -> StepResult:
        """`late` are rows that no token may be sampled for."""
        plan = decode(encode(sent))
        assert plan == sent
        assert isinstance(plan, StepPlan)
        self._apply(plan)
        self._check_shape(plan)
        self._store(plan)
        self._attend(plan)
        self.computed += plan.num_tokens
        tokens, logprobs = [], []
        for row in plan.sample_rows:
            if row in late:
                tokens.append(-1)
                logprobs.append(None)
                continue
            slot = plan.slots[row]
            prefix, sampling = self._prefixes[slot][-1], self._samplings[slot]
            token = next_token(prefix, sampling, len(self._tokens[slot]) - self._prompts[slot])
            self._tokens[slot].append(token)
            self._prefixes[slot] += prefix_hashes([token], prefix)
            tokens.append(token)
            logprobs.append(logprob(prefix, token) if sampling.logprobs >= 0 else None)
        return StepResult(tokens, logprobs, self._prompt_logprobs(plan))

    def _apply(self, plan: StepPlan) -> None:
        for start in plan.starts:
            self._tokens[start.slot] = list(start.token_ids)
            self._told[start.slot] = len(start.token_ids)
            self._prefixes[start.slot] = prefix_hashes(start.token_ids)
            self._prompts[start.slot] = start.prompt_length
            self._samplings[start.slot] = start.sampling
            self._tables[start.slot] = {}
        for slot, token in zip(plan.token_slots, plan.token_ids, strict=True):
            assert self._tokens[slot][self._told[slot]] == token
            self._told[slot] += 1
        for slot, index, block in zip(plan.block_slots, plan.block_indices, plan.block_ids, strict=True):
            self._tables[slot][index] = block

    def _check_shape(self, plan: StepPlan) -> None:
        assert 0 < plan.num_tokens <= self._scheduler.max_num_batched_tokens
        assert len(plan.slots) == len(plan.positions) == len(plan.counts) == len(set(plan.slots))
        samples = []
        for row, (slot, position, count) in enumerate(zip(plan.slots, plan.positions, plan.counts, strict=True)):
            known = len(self._tokens[slot])
            assert count >= 1
            assert known - self._told[slot] <= 1
            assert position + count <= known
            assert (row < plan.num_decodes) == (count == 1 and position == known - 1)
            if position + count == known:
                samples.append(row)
        assert plan.sample_rows == samples

    def _store(self, plan: StepPlan) -> None:
        written = set()
        for slot, position, count in zip(plan.slots, plan.positions, plan.counts, strict=True):
            for p in range(position, position + count):
                place = self._tables[slot][p // self._size] * self._size + p % self._size
                assert place not in written, "two tokens of one step share a place in the cache"
                written.add(place)
                self._kv[place] = self._prefixes[slot][p]

    def _attend(self, plan: StepPlan) -> None:
        for slot, position, count in zip(plan.slots, plan.positions, plan.counts, strict=True):
            table = self._tables[slot]
            seen = [self._kv[table[p // self._size] * self._size + p % self._size] for p in range(position + count)]
            assert seen == self._prefixes[slot][: position + count], f"slot {slot} sees KV of another prefix"

    def _prompt_logprobs(self, plan: StepPlan) -> dict[int, list[TokenLogprobs]]:
        results = {}
        for row, (slot, position, count) in enumerate(zip(plan.slots, plan.positions, plan.counts, strict=True)):
            end = min(position + count, self._prompts[slot] - 1)
            if self._samplings[slot].prompt_logprobs >= 0 and position < end:
                tokens, prefixes = self._tokens[slot], self._prefixes[slot]
                results[row] = [logprob(prefixes[p], tokens[p + 1]) for p in range(position, end)]
        return results


def step(scheduler: Scheduler, ranks: FakeRanks) -> StepPlan | None:
    """One step of the engine, with the books checked before and after."""
    plan = scheduler.schedule()
    scheduler.check_integrity()
    if plan is not None:
        scheduler.commit(plan, ranks.execute(plan))
        scheduler.check_integrity()
    return plan


def run_until_idle(scheduler: Scheduler, ranks: FakeRanks, limit: int = 10_000) -> list[StepPlan]:
    """Step until no request is left; every block and slot must be free then."""
    plans: list[StepPlan] = []
    while scheduler.has_work:
        plan = step(scheduler, ranks)
        assert plan is not None, "there is work, but nothing was scheduled"
        plans.append(plan)
        assert len(plans) <= limit
    assert scheduler.free_blocks == scheduler.total_blocks
    assert scheduler.running == scheduler.waiting == 0
    return plans


def assert_complete(request: Request, max_model_len: int) -> None:
    """Every completion is what it would have been alone, and so are its prompt logprobs."""
    for index, sequence in enumerate(request.sequences):
        assert sequence.status is SequenceStatus.FINISHED
        assert (sequence.output, sequence.finish_reason) == expected_output(request, index, max_model_len)
    if request.samplings[0].prompt_logprobs >= 0:
        prefixes = prefix_hashes(request.prompt)
        assert request.prompt_logprobs == [logprob(p, t) for p, t in zip(prefixes, request.prompt[1:], strict=False)]
