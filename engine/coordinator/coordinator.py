"""Rank 0's part that the other ranks lack: it alone decides. Requests in, plans out, tokens back, events out.

Three threads: intake (encodes text), the step loop (owns the scheduler), output (owns the text of every answer).
They share nothing but queues.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from ...parallel.control import ControlChannel
from ..errors import EngineStopped, InvalidRequest, PhalanxError
from ..execution.launched_step import LaunchedStep
from ..execution.worker import Worker
from ..protocol.messages import Abort, Command, Event, Failed, Shutdown, Status, StatusRequest, Submit
from ..protocol.transport import Transport
from ..scheduling.request import Request, SequenceUpdate
from ..scheduling.scheduler import Scheduler
from ..scheduling.step_plan import Capture, Idle, StepPlan, StepResult, Stop, encode
from .input_processor import Intake
from .output_processor import OutputProcessor
from .tokenizer import Tokenizer

_log = logging.getLogger(__name__)

CAPTURE_EVERY = 16
"""Steps between two captures of CUDA graphs while serving: each takes as long as a few steps."""

QUIET_S = 1.0
"""Idle this long, the books of the pool are checked: not sooner, since an answer may still be on its way out."""


class Coordinator:
    """Owns the scheduler and drives worker 0 and, through the control channel, all others."""

    def __init__(
        self,
        *,
        worker: Worker,
        scheduler: Scheduler,
        intake: Intake,
        tokenizer: Tokenizer | None,
        control: ControlChannel,
        transport: Transport,
        ranks: int,
        report: list[str],
        heartbeat_s: float,
    ) -> None:
        self._worker, self._scheduler, self._intake, self._control = worker, scheduler, intake, control
        self._transport, self._ranks, self._report, self._heartbeat_s = transport, ranks, report, heartbeat_s
        self._commands: queue.SimpleQueue[tuple[bytes, Command, float] | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._output = OutputProcessor(tokenizer, self._emit, self._stop_found)
        self._events: dict[bytes, list[Event]] = {}  # by client, not sent yet; the output's thread owns them
        # From acceptance to the last event, (client, its id) of each request; intake adds, output removes. The lock
        # is for the moment of stopping: afterwards nothing is accepted, and all that was is failed.
        self._active: dict[str, tuple[bytes, str]] = {}
        self._accepting = threading.Lock()
        self._refusal: str | None = None
        self._flying: deque[tuple[StepPlan, LaunchedStep]] = deque()  # launched, not committed; oldest first
        self._stopping = False
        self.stopped: Exception | None = None
        self._threads = [
            threading.Thread(target=self._run_thread, args=[work], name=f"phalanx-{name}", daemon=True)
            for name, work in (("intake", self._take_in), ("output", self._give_out))
        ]

    def start(self) -> None:
        """Begin to take in commands. Steps run in run()."""
        for thread in self._threads:
            thread.start()
        self._transport.start(lambda client, command: self._commands.put((client, command, time.monotonic())))

    def stop(self) -> None:
        """Make run() return after the step under way; safe from any thread and from a signal handler."""
        self._inbox.put(self._stop)

    def run(self, payload: Callable[[], bytes] = lambda: b"") -> None:
        """The step loop: plan, execute, commit, until stop() or a Shutdown command; then the ranks are told to stop.

        What still runs is aborted. An error of a rank ends the loop with that error, and all requests with
        EngineStopped; so does every later call.
        """
        if self._refusal is not None:
            raise EngineStopped(self._refusal)
        self._stopping = False
        try:
            while self._handle_inbox():
                self._step()
            self._abort_all()
            while self._flying:
                self._commit_oldest()
            self._scheduler.check_integrity()
            self._control.send(encode(Stop(payload())))
        except Exception as error:
            self.stopped = error
            self._refuse_all(f"rank 0 failed: {type(error).__name__}: {error}")
            raise

    def close(self) -> None:
        """Deliver every event that is due, then end the threads and the transport. After run() has returned."""
        self._commands.put(None)
        self._threads[0].join()
        self._refuse_all("the engine was closed")
        self._outbox.put(None)
        self._threads[1].join()
        self._transport.close()

    # ---- the step loop's thread

    def _step(self) -> None:
        """Plan, launch, commit. With overlap the step before is committed while the one just launched is computed."""
        plan = self._scheduler.schedule() if self._scheduler.can_run_ahead else None
        if plan is not None:
            self._control.send(encode(plan))
            self._flying.append((plan, self._worker.launch(plan)))
        if self._flying and (plan is None or not self._worker.settings.overlap or len(self._flying) > 1):
            self._commit_oldest()
        if plan is not None and plan.step % CAPTURE_EVERY == 0:
            self._capture_next()

    def _commit_oldest(self) -> None:
        plan, step = self._flying.popleft()
        result = step.result()
        self._fail_invalid(plan, result)
        updates = self._scheduler.commit(plan, result)
        self._outbox.put(lambda: self._deliver(updates))

    def _capture_next(self) -> None:
        """Capture one more CUDA graph, if that is done while serving."""
        if self._worker.uncaptured:
            rows = self._worker.uncaptured[0]
            self._control.send(encode(Capture(rows)))
            self._worker.capture(rows)

    def _handle_inbox(self) -> bool:
        """Run what other threads asked for; wait for it while there is nothing to compute. False: time to stop."""
        patience = min(QUIET_S, self._heartbeat_s)
        while not self._stopping:
            wait = not self._scheduler.has_work and not self._flying
            try:
                action = self._inbox.get(block=wait, timeout=patience if wait else None)
            except queue.Empty:
                if not wait:
                    return True
                if patience != self._heartbeat_s:
                    self._scheduler.check_integrity()
                    patience = self._heartbeat_s
                self._control.send(encode(Idle()))
                self._capture_next()
                continue
            action()
        return False

    def _add(self, client: bytes, request: Request, submit: Submit) -> None:
        try:
            self._scheduler.add(request)
        except PhalanxError as error:
            failure = error
            self._outbox.put(lambda: self._fail(client, submit.id, request.id, failure))
            return
        self._outbox.put(lambda: self._output.start(client, submit, request.id))

    def _abort(self, request_id: str) -> None:
        updates = self._scheduler.abort(request_id)
        self._outbox.put(lambda: self._deliver(updates))

    def _abort_all(self) -> None:
        for request_id in self._scheduler.unfinished():
            self._abort(request_id)

    def _finish(self, request_id: str, index: int, stop: str) -> None:
        update = self._scheduler.finish(request_id, index, stop)
        if update is not None:
            self._outbox.put(lambda: self._deliver([update]))

    def _fail_invalid(self, plan: StepPlan, result: StepResult) -> None:
        """A row whose logits were not numbers fails its own request; the others of the step go on.

        Where one token's values overflow, attention may leave what is no number in earlier tokens of the same tile too
        (0 x infinity), so nothing of such a request stays in the prefix cache.
        """
        for row, token in zip(plan.sample_rows, result.token_ids, strict=True):
            if token < 0:
                request_id = self._scheduler.request_of_row(row)
                if request_id is None:
                    continue
                self._scheduler.abort(request_id, forget=True)
                error = InvalidRequest(
                    "the model's output for this request is not a number; with float16 weights use dtype=bfloat16 or "
                    "float32"
                )
                self._outbox.put(partial(self._fail_running, request_id, error))

    def _stop(self) -> None:
        self._stopping = True

    def _report_status(self, client: bytes) -> None:
        scheduler, capacity = self._scheduler, self._worker.capacity
        status = Status(
            ready=True,
            ranks=self._ranks,
            max_model_len=capacity.max_model_len,
            max_num_seqs=scheduler.max_num_seqs,
            block_size=capacity.block_size,
            total_blocks=scheduler.total_blocks,
            free_blocks=scheduler.free_blocks,
            running=scheduler.running,
            waiting=scheduler.waiting,
            steps=scheduler.steps,
            preemptions=scheduler.preemptions,
            prefix_hits=scheduler.prefix_hits,
            peak_memory=list(capacity.peak_memory),
            report=self._report,
        )
        self._outbox.put(lambda: self._emit(client, status))

    def _run_thread(self, work: Callable[[], None]) -> None:
        """A defect in one of the other threads must not leave requests unanswered: it ends the step loop."""
        try:
            work()
        except Exception as error:
            failure = error
            self._inbox.put(lambda: _raise(failure))

    # ---- the intake's thread

    def _take_in(self) -> None:
        while (item := self._commands.get()) is not None:
            self._handle(*item)

    def _handle(self, client: bytes, command: Command, arrived_at: float) -> None:
        if isinstance(command, Submit):
            self._submit(client, command, arrived_at)
        elif isinstance(command, Abort):
            self._inbox.put(lambda: self._abort(_request_id(client, command.id)))
        elif isinstance(command, StatusRequest):
            self._inbox.put(lambda: self._report_status(client))
        else:
            assert isinstance(command, Shutdown)
            self.stop()

    def _submit(self, client: bytes, submit: Submit, arrived_at: float) -> None:
        request_id = _request_id(client, submit.id)
        try:
            if request_id in self._active:
                raise InvalidRequest(f"id={submit.id!r} is in use by a request that is not finished; choose another")
            request = self._intake.accept(submit, request_id, arrived_at)
            with self._accepting:
                if self._refusal is not None:
                    raise EngineStopped(self._refusal)
                self._active[request_id] = client, submit.id
        except PhalanxError as error:
            self._fail_refused(client, submit.id, error)
        except Exception as error:
            # Whatever a request brings about while it is taken in, it brings about for itself alone.
            _log.exception("a request could not be taken in")
            self._fail_refused(client, submit.id, InvalidRequest(f"the request was refused: {error!r}"))
        else:
            self._inbox.put(lambda: self._add(client, request, submit))

    def _fail_refused(self, client: bytes, client_id: str, error: PhalanxError) -> None:
        failed = Failed(client_id, type(error).__name__, str(error))
        self._outbox.put(lambda: self._emit(client, failed))

    # ---- the output's thread

    def _give_out(self) -> None:
        while (action := self._outbox.get()) is not None:
            action()
            # What a step brought a client goes as one message: each costs two threads and the client a wake-up.
            outgoing, self._events = self._events, {}
            for client, events in outgoing.items():
                self._transport.send(client, *events)

    def _deliver(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            self._output.update(update)
            if update.request_finished:
                self._active.pop(update.request.id, None)

    def _stop_found(self, request_id: str, index: int, stop: str) -> None:
        self._inbox.put(lambda: self._finish(request_id, index, stop))

    def _fail(self, client: bytes, client_id: str, request_id: str, error: Exception) -> None:
        self._active.pop(request_id, None)
        self._emit(client, Failed(client_id, type(error).__name__, str(error)))

    def _fail_running(self, request_id: str, error: Exception) -> None:
        state = self._output.forget(request_id)
        if state is not None:
            self._fail(state.client, state.id, request_id, error)

    def _refuse_all(self, why: str) -> None:
        """The end: accept nothing more, and after the events that are due fail every request that is left."""
        with self._accepting:
            self._refusal = self._refusal or why
        self._outbox.put(lambda: self._fail_outstanding(EngineStopped(why)))

    def _fail_outstanding(self, error: EngineStopped) -> None:
        for request_id, (client, client_id) in list(self._active.items()):
            self._output.forget(request_id)
            self._fail(client, client_id, request_id, error)

    def _emit(self, client: bytes, event: Event) -> None:
        self._events.setdefault(client, []).append(event)


def _raise(error: Exception) -> None:
    raise error


def _request_id(client: bytes, client_id: str) -> str:
    return f"{client.hex()}:{client_id}"
