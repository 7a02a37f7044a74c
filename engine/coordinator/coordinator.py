"""Rank 0's part that the other ranks lack: it alone decides. Requests in, plans out, tokens back, events out.

Its threads share nothing but queues and the registry of requests: the intake threads (ingress.py) encode text, the step
loop (here) owns the scheduler, the output thread (egress.py) owns the text of every answer.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import ParamSpec

from ...parallel.control import ControlChannel
from ..constraints.mask_thread import MaskThreads, no_token_left
from ..constraints.matcher import Matcher
from ..errors import EngineFault, InvalidRequest, PhalanxError
from ..execution.rank_worker import LaunchedStep, Worker
from ..protocol.messages import ModelInfo, Submit
from ..protocol.transport import Transport
from ..scheduling.request import Request, Sequence, SequenceStatus, SequenceUpdate
from ..scheduling.scheduler import Scheduler
from ..scheduling.step_plan import Capture, Idle, Masks, StepPlan, StepResult, Stop, encode
from .egress import Egress
from .ingress import Ingress
from .input_processor import InputProcessor
from .progress import Progress, StatusAnswers
from .registry import Owner, RequestRegistry
from .threads import as_exception
from .tokenizer import Tokenizer

_log = logging.getLogger(__name__)

P = ParamSpec("P")

CAPTURE_EVERY = 16
"""Steps between two captures of CUDA graphs while serving: each takes as long as a few steps."""

QUIET_S = 1.0
"""Seconds of idleness before the block pool is checked: not sooner, since an answer may still be on its way out."""


class Coordinator:
    """The step loop: owns the scheduler, and drives worker 0 and, through the control channel, all others.

    start(), run() and close() are for the thread that owns the engine, run() once or several times in between; stop()
    and call_soon() for any thread. The others run on the loop's thread, where call_soon() brings them.
    """

    def __init__(
        self,
        *,
        worker: Worker,
        scheduler: Scheduler,
        input_processor: InputProcessor,
        tokenizer: Tokenizer | None,
        control: ControlChannel,
        transport: Transport,
        info: ModelInfo,
        heartbeat_s: float,
        rank_waits: Callable[[], list[float]] = list,
    ) -> None:
        """`info` is told to clients that ask; idle ranks hear something every `heartbeat_s` seconds.

        `rank_waits` tells the seconds that each rank has waited for others; any thread calls it.
        """
        self._worker = worker
        self._scheduler = scheduler
        self._control = control
        self._transport = transport
        self._info = info
        self._heartbeat_s = heartbeat_s
        peak_memory = list(worker.capacity.peak_memory)
        self._progress = Progress(scheduler, info, peak_memory, heartbeat=worker.heartbeat, rank_waits=rank_waits)

        self._registry = RequestRegistry()
        self._egress = Egress(transport, tokenizer, self._registry, self)
        self._status_answers = StatusAnswers(self._progress, self._egress.send, self)
        self._ingress = Ingress(input_processor, self._registry, self._egress, self)

        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._masks = MaskThreads(made_late=lambda: self.call_soon(_look_again))
        # Launched, not committed; oldest first. With the masks of its constrained rows, by row.
        self._in_flight: deque[tuple[StepPlan, LaunchedStep, dict[int, bytes]]] = deque()
        self._no_token = bytes(4 * -(-info.vocab_size // 32))  # a mask
        self._has_rows = True  # False while every row waits for its mask, whose making wakes the loop
        self._prepared = False
        self._stopping = self._hand_over = False
        self.stopped: Exception | None = None  # what ended run(), if it was an error

    def start(self) -> None:
        """Begin to take in commands. Steps run in run()."""
        self._ingress.start()
        self._egress.start()
        self._transport.start(self._ingress.receive, self._ingress.abandon, self._ingress.fail)

    def run(self, payload: Callable[[], bytes] = lambda: b"") -> None:
        """The step loop: plan, execute, commit, until stop() or a Shutdown command; then the ranks are told to stop.

        What still runs is aborted. An error of a rank ends the loop with that error, and all requests with
        EngineStopped; so does every later call.
        """
        self._registry.check_open()
        self._stopping = False
        try:
            while self._handle_inbox():
                self._step()

            if self._hand_over:
                self._refuse_all("the engine was told to end")
            for request_id in self._scheduler.unfinished():
                self.abort(request_id)
            while self._in_flight:
                self._commit_oldest()
            self._scheduler.check_integrity()
            self._control.send(encode(Stop(payload())))
            self._progress.ended()
        except BaseException as error:
            self.stopped = as_exception(error)
            self._progress.ended(failed=True)
            self._refuse_all(f"rank 0 failed: {type(error).__name__}: {error}")
            raise

    def stop(self, hand_over: bool = False) -> None:
        """Make run() return after the step under way; safe from any thread and from a signal handler.

        With `hand_over` what still runs fails with EngineStopped, so that its clients may go on with it at another
        engine; without, it is aborted.
        """
        self.call_soon(self._stop, hand_over)

    def close(self) -> None:
        """Deliver every event that is due, then end the threads and the transport. After run() has returned."""
        self._ingress.close()
        self._refuse_all("the engine was closed")
        self._egress.close()
        self._masks.close()
        self._transport.close()

    def call_soon(self, action: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have run() call `action` between two steps; safe from any thread. What it raises ends the loop."""
        self._inbox.put(partial(action, *args, **kwargs))

    def report_status(self, client: bytes) -> None:
        """Send the engine's Status to a client; safe from any thread, also while a step hangs."""
        self._status_answers.ask(client)

    def report_model_info(self, client: bytes) -> None:
        """Send the engine's ModelInfo to a client; safe from any thread."""
        self._egress.send(client, self._info)

    # ---- the thread of run(): steps

    def _step(self) -> None:
        """Plan, launch, commit. With overlap the step before is committed while the one just launched is computed."""
        progress = self._progress
        progress.phase("schedule")
        plan = self._scheduler.schedule() if self._scheduler.can_run_ahead else None
        self._fail_rows()
        self._has_rows = plan is not None or bool(self._in_flight)
        if plan is not None:
            progress.planned(plan)
            progress.phase("launch")
            self._control.send(encode(plan))
            if plan.masked_samples:
                self._launch_masked(plan)
            else:
                self._in_flight.append((plan, self._worker.launch(plan), {}))
        if self._in_flight and (plan is None or not self._worker.settings.overlap or len(self._in_flight) > 1):
            self._commit_oldest()
        else:
            progress.went_on()
        progress.phase(None)
        if plan is not None and plan.step % CAPTURE_EVERY == 0:
            self._capture_next()

    def _launch_masked(self, plan: StepPlan) -> None:
        """Launch a step some of whose tokens a grammar limits: the masks are made beside its forward pass.

        With overlap they follow from the tokens of the step before, which is committed meanwhile. A row whose mask is
        late is sent one that allows no token, and its last token is computed again in a later step.
        """
        step = self._worker.forward(plan)
        while self._in_flight:
            self._commit_oldest()

        self._progress.phase("launch")
        sequences = self._scheduler.masked_sequences(plan)
        matchers = [matcher_of(sequence) for sequence in sequences]
        rows = [plan.sample_rows[i] for i in plan.masked_samples]
        made: dict[int, bytes] = {}
        for row, matcher, there in zip(rows, matchers, self._masks.collect(matchers, step.computed), strict=True):
            if there:
                made[row] = b"" if matcher is None or matcher.mask is None else matcher.mask
            else:
                self._scheduler.postpone(row)
                made[row] = self._no_token

        found = list(made.values())
        self._control.send(encode(Masks(found)))
        self._in_flight.append((plan, self._worker.sample(step, found), made))
        self._end_constrained(sequences)

    def _end_constrained(self, sequences: list[Sequence | None]) -> None:
        """End the answers that turned out to be complete, or to have failed, when their masks were computed."""
        for sequence in sequences:
            matcher = matcher_of(sequence)
            if sequence is None or matcher is None or matcher.mask is None:
                continue
            request_id = sequence.request.id
            if matcher.failure is not None:
                self._scheduler.abort(request_id)
                kind = EngineFault if matcher.is_fault else InvalidRequest
                self._egress.fail(request_id, kind(f"structured: {matcher.failure}"))
            elif matcher.finished:
                self.finish(request_id, sequence.index, None)

    def _commit_oldest(self) -> None:
        plan, step, masks = self._in_flight.popleft()
        self._progress.phase("wait")
        result = step.result()

        self._progress.phase("commit")
        self._fail_invalid(plan, result, masks)
        updates = self._scheduler.commit(plan, result)
        self._fail_rows()
        self._begin_masks(update.sequence for update in updates)
        self._progress.committed(updates)
        self._deliver(updates)

    def _begin_masks(self, sequences: Iterable[Sequence]) -> None:
        """Have the masks made that follow from what the sequences have just taken in."""
        going_on = (matcher_of(sequence) for sequence in sequences if sequence.status is not SequenceStatus.FINISHED)
        matchers = [matcher for matcher in going_on if matcher is not None and matcher.mask is None]
        if matchers:
            self._masks.begin(matchers)

    def _fail_invalid(self, plan: StepPlan, result: StepResult, masks: dict[int, bytes]) -> None:
        """A row whose logits were not numbers fails its own request; the others of the step go on.

        So does one that has no token left, because nothing that its grammar allows may be sampled, and one that the
        sampler could not handle.

        Keys and values of the token that overflowed, and of those that attend to it, are no numbers either. Earlier
        tokens are sound, but which token was the first is not known, so nothing of such a request stays in the prefix
        cache.
        """
        for index, (row, token) in enumerate(zip(plan.sample_rows, result.token_ids, strict=True)):
            if token >= 0:
                continue
            sequence = self._scheduler.sequence_of_row(row)
            if sequence is None:
                continue
            request_id = sequence.request.id
            if index in result.failures:
                self._scheduler.abort(request_id)
                fault = EngineFault(f"the request could not be sampled: {result.failures[index]!r}")
                self._egress.fail(request_id, fault)
                continue

            why = no_token_left(sequence.sampling, masks[row], sequence.output) if masks.get(row) else None
            if why is not None:
                self._scheduler.abort(request_id)
                self._egress.fail(request_id, InvalidRequest(f"structured: {why}"))
                continue

            self._scheduler.abort(request_id, forget=True)
            error = EngineFault(
                "the model's output for this request is not a number; with float16 weights use dtype=bfloat16 or "
                "float32"
            )
            self._egress.fail(request_id, error)

    def _fail_rows(self) -> None:
        """Fail the requests whose own rows the scheduler could not make; the others of the step go on."""
        failures, self._scheduler.failures = self._scheduler.failures, []
        for request_id, error in failures:
            _log.error("the row of a request failed", exc_info=error)
            self._scheduler.abort(request_id, forget=True)
            self._egress.fail(request_id, EngineFault(f"the request could not be computed: {error!r}"))

    def _capture_next(self) -> None:
        """Capture one more CUDA graph, if that is done while serving."""
        if self._worker.uncaptured:
            rows = self._worker.uncaptured[0]
            self._control.send(encode(Capture(rows)))
            self._worker.capture(rows)

    # ---- the thread of run(): what other threads ask for

    def add(self, owner: Owner, request: Request, submit: Submit) -> None:
        """Schedule an accepted request, or fail it if the queue has no room."""
        try:
            updates = self._scheduler.add(request)
        except PhalanxError as error:
            self._egress.fail(request.id, error)
        except Exception as error:
            _log.exception("a request could not be scheduled")
            self._egress.fail(request.id, EngineFault(f"the request could not be scheduled: {error!r}"))
        else:
            self._egress.begin(owner, submit, request)
            self._begin_masks(request.sequences)
            self._deliver(updates)

    def abort(self, request_id: str) -> None:
        """End a request early; an unknown one is ignored."""
        self._deliver(self._scheduler.abort(request_id))

    def finish(self, request_id: str, index: int, stop: str | None) -> None:
        """End sequence `index` of a request, whose text has reached the stop string `stop`, or is complete."""
        update = self._scheduler.finish(request_id, index, stop)
        if update is not None:
            self._deliver([update])

    def _deliver(self, updates: list[SequenceUpdate]) -> None:
        # Whoever has seen the end of a request finds it gone from the Status.
        self._progress.went_on()
        self._egress.deliver(updates)

    def _handle_inbox(self) -> bool:
        """Run what other threads asked for; wait for it while there is nothing to compute. False: time to stop."""
        first = True
        idle_at = time.monotonic() + min(QUIET_S, self._heartbeat_s)
        while not self._stopping:
            wait = not self._in_flight and not (self._scheduler.has_work and self._has_rows)
            # What asks for the state again and again must not keep the other ranks from hearing anything.
            left = idle_at - time.monotonic()
            if wait and left <= 0:
                self._idle(first)
                first = False
                idle_at = time.monotonic() + self._heartbeat_s
                self._has_rows = True
                continue
            try:
                action = self._wait_for_action(left) if wait else self._inbox.get_nowait()
            except queue.Empty:
                if not wait:
                    return True
            else:
                action()
                self._has_rows = True
        return False

    def _wait_for_action(self, patience: float) -> Callable[[], None]:
        with self._progress.resting():
            return self._inbox.get(timeout=patience)

    def _idle(self, first: bool) -> None:
        """Tell the other ranks that this one lives. On the `first` call since there was work, check the block pool.

        The first rest of all is when grammars are made ready: reading the vocabulary takes up to a second, in which
        nothing else of this process runs.
        """
        if first:
            self._scheduler.check_integrity()
        if not self._prepared:
            self._prepared = True
            # Where no more threads may run, the first request with a grammar makes them ready.
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=self._ingress.prepare, name="phalanx-vocabulary", daemon=True).start()
        self._control.send(encode(Idle()))
        self._capture_next()

    def _stop(self, hand_over: bool) -> None:
        self._stopping = True
        self._hand_over = hand_over

    # ---- the end

    def _refuse_all(self, why: str) -> None:
        """Accept nothing more, and fail every request that is left, after the events that are due."""
        self._egress.fail_all(self._registry.close(why))


def _look_again() -> None:
    """What wakes the step loop for a mask that is there now."""


def matcher_of(sequence: Sequence | None) -> Matcher | None:
    """Return the grammar's matcher of a sequence, if it has one."""
    constraint = None if sequence is None else sequence.constraint
    return constraint if isinstance(constraint, Matcher) else None
