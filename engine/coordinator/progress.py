"""How far the step loop is, for threads that must not wait for it."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from ..execution.heartbeat import Heartbeat
from ..protocol.messages import Event, ModelInfo, Status
from ..scheduling.request import SequenceUpdate
from ..scheduling.scheduler import Scheduler
from ..scheduling.step_plan import StepPlan
from .threads import StepLoop

_log = logging.getLogger(__name__)

PHASES = ("schedule", "launch", "wait", "commit")
PATIENCE_S = 0.1
"""Seconds that a question for the Status waits for the step loop before it is answered without it."""


class Progress:
    """Counts what the step loop does. The loop alone calls all but status(), which any thread may call.

    What other threads read is one frozen Status, which the loop replaces as a whole, and the time when it last went on:
    so a loop that hangs is still told of, with a `stalled_s` that grows.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        info: ModelInfo,
        peak_memory: list[int],
        clock: Callable[[], float] = time.monotonic,
        heartbeat: Heartbeat | None = None,
        rank_waits: Callable[[], list[float]] = list,
    ) -> None:
        """`rank_waits` tells the seconds that each rank has waited for others; it is asked when somebody asks."""
        self._heartbeat = heartbeat or Heartbeat()
        self._scheduler = scheduler
        self._info = info
        self._peak_memory = peak_memory
        self._clock = clock
        self._rank_waits = rank_waits

        self._prompt_lengths: dict[int, int] = {}  # by slot
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._phase_seconds = dict.fromkeys(PHASES, 0.0)
        self._phase: str | None = None
        self._phase_since = 0.0

        self._resting = True
        self._went_on_at = clock()
        self._ready = True
        self._latest = self._status()

    def status(self) -> Status:
        """The engine as it was after the latest step."""
        latest = self._latest
        went_on_at = self._went_on_at
        stalled_s = 0.0 if self._resting else max(0.0, self._clock() - went_on_at)
        return msgspec.structs.replace(latest, stalled_s=stalled_s, rank_wait_seconds=self._rank_waits())

    # ---- the step loop

    def went_on(self) -> None:
        """Note that the loop lives, and publish what it has done."""
        self._latest = self._status()
        self._went_on_at = self._clock()

    def answer(self) -> Status:
        """The engine at this moment."""
        self.went_on()
        return msgspec.structs.replace(self._latest, rank_wait_seconds=self._rank_waits())

    @contextmanager
    def resting(self) -> Iterator[None]:
        """The time in which the loop waits for work."""
        self.went_on()
        self._resting = True
        self._heartbeat.phase("waiting")
        try:
            yield
        finally:
            self._heartbeat.phase("schedule")
            self._went_on_at = self._clock()
            self._resting = False

    def phase(self, name: str | None) -> None:
        """Note which of PHASES a step is in from now on, and count the time of the one before; None at its end."""
        now = self._clock()
        if self._phase is not None:
            self._phase_seconds[self._phase] += now - self._phase_since
        self._phase = name
        self._phase_since = now
        if name is not None:
            self._heartbeat.phase(name)

    def planned(self, plan: StepPlan) -> None:
        """Count what a step computes."""
        self._heartbeat.step(plan.step, plan.num_tokens)
        lengths = self._prompt_lengths
        for start in plan.starts:
            lengths[start.slot] = start.prompt_length
        # The last token of a prompt may be a decode row, too.
        for slot, first, count in zip(plan.slots, plan.positions, plan.counts, strict=True):
            if first < lengths[slot]:
                self._prompt_tokens += min(first + count, lengths[slot]) - first

    def committed(self, updates: list[SequenceUpdate]) -> None:
        """Count the tokens that a step brought."""
        self._generation_tokens += sum(len(update.token_ids) for update in updates)

    def ended(self, failed: bool = False) -> None:
        """Note that the loop has returned; if it has not failed, it may be run again."""
        self.phase(None)
        self._ready = not failed
        self._resting = True
        self._heartbeat.phase("waiting")
        self.went_on()

    def _status(self) -> Status:
        scheduler = self._scheduler
        return Status(
            ready=self._ready,
            ranks=self._info.ranks,
            max_model_len=self._info.max_model_len,
            max_num_seqs=scheduler.max_num_seqs,
            block_size=self._info.block_size,
            total_blocks=scheduler.total_blocks,
            free_blocks=scheduler.free_blocks,
            running=scheduler.running,
            waiting=scheduler.waiting,
            steps=scheduler.steps,
            preemptions=scheduler.preemptions,
            prefix_hits=scheduler.prefix_hits,
            prefix_queries=scheduler.prefix_queries,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            waiting_tokens=scheduler.waiting_tokens,
            phase_seconds=dict(self._phase_seconds),
            peak_memory=self._peak_memory,
            report=self._info.report,
        )


class StatusAnswers:
    """Answers questions for the Status: on the step loop, in turn with other commands; without it if it is busy.

    Any thread may call everything here.
    """

    def __init__(self, progress: Progress, send: Callable[[bytes, Event], None], loop: StepLoop) -> None:
        self._progress = progress
        self._send = send
        self._loop = loop
        self._lock = threading.Lock()
        self._asked: dict[int, bytes] = {}
        self._numbers = itertools.count()
        self._timer: threading.Timer | None = None

    def ask(self, client: bytes) -> None:
        """Have the client answered, after its earlier commands if they are done soon, and in any case soon."""
        with self._lock:
            number = next(self._numbers)
            self._asked[number] = client
            if self._timer is None:
                self._timer = threading.Timer(PATIENCE_S, self._answer_all)
                self._timer.daemon = True
                try:
                    self._timer.start()
                except RuntimeError as error:  # there may be no more threads: the loop answers, unless a step hangs
                    self._timer = None
                    _log.warning("a question for the engine's state has no timer: %s", error)
        self._loop.call_soon(self._answer, number)

    def _answer(self, number: int) -> None:
        with self._lock:
            client = self._asked.pop(number, None)
            if not self._asked:
                self._forget_timer()
        if client is not None:
            self._send(client, self._progress.answer())

    def _answer_all(self) -> None:
        with self._lock:
            asked, self._asked = self._asked, {}
            self._forget_timer()
        for client in asked.values():
            self._send(client, self._progress.status())

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
