"""Complete one prompt, or every request of a JSONL file: `python -m phalanx.launch.generate`, also under torchrun."""

from __future__ import annotations

import contextlib
import os
import queue
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from ..engine.client.llm import LLM
from ..engine.client.requests import OutputBuilder
from ..engine.config import EngineConfig
from ..engine.errors import ConfigError, EngineStopped, InvalidRequest, PhalanxError
from ..engine.protocol.messages import Delta, Event, Finished, ModelInfo, Status, Submit
from .cli.compose import Job
from .cli.display import AnswerStream, Display, ProgressBar, write_stdout
from .cli.jsonl import AnswerFile, BadLine, Id, LineRequest, answer_record, count_requests, read_done, read_requests
from .cli.program import run_program
from .cli.run_journal import RunJournal
from .cli.schema import Keys
from .ranks.process import OutputLost, Signalled
from .ranks.progress import loading_progress
from .ranks.session import follow, open_llm, why_stopped

WINDOW = 4
"""Most requests under way, in multiples of max_num_seqs: the engine never waits, and inputs of any size work."""


@dataclass
class GenerateKeys(Keys):
    """The keys of generate, besides the engine's configuration."""

    prompt: str | None = None
    """The text to complete; the answer streams to standard output. It is taken as written, unless quoted for Hydra."""
    input: str | None = None
    """A JSONL file, a request a line: {"id", "prompt" | "messages" | "token_ids", "sampling"?, "structured"?}."""
    output: str | None = None
    """The JSONL file of answers, written as each finishes and replaced unless resume=true; null: standard output."""
    resume: bool = False
    """Continue a killed run: skip the ids that output already has."""
    journal: str | None = None
    """With input and output: a file, made if there is none, that notes every second how far each answer has got. With
    it a killed run is continued from its last tokens, and resume=true is implied; null notes nothing."""
    stream: bool = False
    """With input: show the answers as they are written instead of a progress bar."""


@dataclass
class Summary:
    """Counts and times of a batch."""

    answered: int = 0
    failed: int = 0
    tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def text(self, skipped: int) -> str:
        """Return one line for the end of a run; `skipped` requests were answered by an earlier one."""
        seconds = time.monotonic() - self.started
        already = f", {skipped} already there" if skipped else ""
        first = self.first_token_s
        median = f"; first token after {statistics.median(first):.2f} s (p50)" if first else ""
        return (
            f"{self.answered + self.failed} requests: {self.answered} answered, {self.failed} failed{already}; "
            f"{self.tokens} tokens in {seconds:.1f} s, {self.tokens / max(seconds, 1e-9):.1f} tokens/s{median}"
        )


@dataclass(frozen=True)
class _UnderWay:
    id: Id
    builder: OutputBuilder


class Batch:
    """Sends requests through an engine, a bounded number at a time, and writes each record as it is known."""

    def __init__(
        self, llm: LLM, answers: AnswerFile | None, display: Display, window: int, journal: RunJournal | None = None
    ) -> None:
        self._llm = llm
        self._journal = journal
        self._answers = answers
        self._display = display
        self._window = window
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._under_way: dict[str, _UnderWay] = {}
        self.summary = Summary()

    def run(self, requests: Iterator[LineRequest | BadLine]) -> None:
        """Work until every request has its record. Raises EngineStopped if the engine ends first."""
        waiting: LineRequest | BadLine | None = next(requests, None)
        while waiting is not None or self._under_way:
            while waiting is not None and len(self._under_way) < self._window:
                self._begin(waiting)
                waiting = next(requests, None)
            if self._under_way:
                self._take(self._events.get())

    def _begin(self, item: LineRequest | BadLine) -> None:
        if isinstance(item, BadLine):
            self.summary.failed += 1
            self._write({"id": item.id, "error": item.error})
            self._display.refused(item)
            return
        self._under_way[item.submit.id] = _UnderWay(item.id, OutputBuilder(item.submit.sampling.n))
        self._display.submitted(item)
        submit = item.submit
        if self._journal is not None:
            submit, before = self._journal.begin(item)
            for event in before:
                self._replay(event)
        self._llm.submit(submit, self._events.put, quick=True)

    def _replay(self, event: Event) -> None:
        """Take in what an earlier run had of an answer."""
        assert not isinstance(event, Status | ModelInfo)
        self._under_way[event.id].builder.add(event)
        if isinstance(event, Delta):
            self._display.delta(event)

    def _take(self, event: Event) -> None:
        assert not isinstance(event, Status | ModelInfo)
        entry = self._under_way[event.id]
        if self._journal is not None:
            self._journal.add(event, event.id)

        try:
            output = entry.builder.add(event)
        except EngineStopped as error:
            # The request is not at fault: it gets no record, and a resumed run computes it.
            raise why_stopped(self._llm, error) from None
        except PhalanxError as error:
            del self._under_way[event.id]
            self.summary.failed += 1
            self._end(event.id, {"id": entry.id, "error": str(error)})
            return

        if isinstance(event, Delta):
            self.summary.tokens += len(event.token_ids)
            self._display.delta(event)

        if output is not None:
            del self._under_way[event.id]
            self.summary.answered += 1
            self.summary.first_token_s.append(output.timings.ttft_s)
            self._end(event.id, answer_record(entry.id, output))

    def _end(self, request_id: str, record: dict[str, object]) -> None:
        self._write(record)
        if self._journal is not None:  # only now: the record is in the file
            self._journal.end(request_id)
        self._display.ended(request_id, record)

    def _write(self, record: dict[str, object]) -> None:
        if self._answers is not None:
            self._answers.write(record)


def generate(job: Job[GenerateKeys]) -> int:
    """Complete one prompt or a batch. Returns 0 if every request was answered, else 1."""
    config = job.engine_config()
    if job.rank_info.rank != 0:
        follow(config, job.rank_info)
        return 0
    check_keys(job.keys)
    if job.keys.prompt is not None:
        return _one(job, config, job.keys.prompt)
    return _batch(job, config)


def check_keys(keys: GenerateKeys) -> None:
    """Raise ConfigError for keys that do not go together or name no file."""
    if (keys.prompt is None) == (keys.input is None):
        raise ConfigError("give either prompt=TEXT or input=FILE.jsonl")
    if keys.input is None:
        for name in ("output", "resume", "journal", "stream"):
            if getattr(keys, name):
                raise ConfigError(f"{name}={getattr(keys, name)} goes with input=FILE.jsonl, not with prompt=")
        return

    if not os.path.isfile(keys.input):
        raise ConfigError(f"input={keys.input!r} is not a file")
    if keys.resume and keys.output is None:
        raise ConfigError("resume=true needs output=FILE.jsonl, the file to continue")
    if keys.journal is not None and keys.output is None:
        raise ConfigError(f"journal={keys.journal!r} needs output=FILE.jsonl: what is answered is told from it")
    if keys.output is not None and _is_same_file(keys.output, keys.input):
        raise ConfigError(f"output={keys.output!r} is the input file: give another")
    for name, path in (("input", keys.input), ("output", keys.output)):
        if keys.journal is not None and path is not None and _is_same_file(keys.journal, path):
            raise ConfigError(f"journal={keys.journal!r} is the file of {name}: give another")


def _is_same_file(one: str, other: str) -> bool:
    """Whether two paths lead to one file, by links of any kind; it need not be there yet."""
    try:
        return os.path.realpath(one) == os.path.realpath(other) or os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return False


def _one(job: Job[GenerateKeys], config: EngineConfig, prompt: str) -> int:
    submit = Submit(id="prompt", prompt=prompt, sampling=config.sampling)
    others = [""] * config.sampling.n

    with open_llm(config, job.rank_info, loading_progress(job.rank_info)) as llm:
        _say_report(llm)
        handle = llm.submit(submit)
        assert handle is not None

        try:
            for event in handle:
                if isinstance(event, Delta) and event.index == 0:
                    write_stdout(event.text)
                elif isinstance(event, Delta):
                    others[event.index] += event.text
                elif isinstance(event, Finished):
                    for number, text in enumerate(others[1:], 2):
                        write_stdout(f"\n-- completion {number} --\n{text}")
                    write_stdout("\n")
                    _say(_one_summary(event))
        except EngineStopped as error:
            raise why_stopped(llm, error) from None
        except InvalidRequest as error:
            _say(f"error: {error}")
            return 1
    return 0


def _one_summary(end: Finished) -> str:
    reasons = ", ".join(completion.finish_reason for completion in end.completions)
    timings = end.timings
    tokens = end.usage.completion_tokens
    return (
        f"({reasons}; {tokens} tokens in {timings.total_s:.1f} s, {tokens / max(timings.total_s, 1e-9):.1f} tokens/s, "
        f"first after {timings.ttft_s:.2f} s)"
    )


def _batch(job: Job[GenerateKeys], config: EngineConfig) -> int:
    keys = job.keys
    assert keys.input is not None
    with _journal(keys, config) as journal:  # first: another run may have it, and its output
        continues = keys.resume or journal is not None
        done = read_done(Path(keys.output)) if continues and keys.output is not None else set()
        if journal is not None:
            journal.read(done)
        return _answer_all(job, config, done, journal)


def _answer_all(job: Job[GenerateKeys], config: EngineConfig, done: set[str], journal: RunJournal | None) -> int:
    """Answer the input's requests that are not `done`. Returns 0 if every one was answered, else 1."""
    keys = job.keys
    assert keys.input is not None
    with _open("input", keys.input, "rb") as requests, _answer_file(keys) as answers:
        with open_llm(config, job.rank_info, loading_progress(job.rank_info)) as llm:
            _say_report(llm)
            # What standard output goes to may hold another program's lines, as with ">> FILE".
            if answers is not None and keys.output is not None and not keys.resume and journal is None:
                answers.clear()

            display: Display = AnswerStream(write_stdout)
            if not keys.stream:
                display = ProgressBar(count_requests(Path(keys.input)) - len(done), sys.stderr)

            batch = Batch(llm, answers, display, min(config.max_queue, WINDOW * config.max_num_seqs), journal)

            try:
                batch.run(read_requests(requests, config.sampling, done, config.seed))
            except (Signalled, OutputLost, EngineStopped):
                display.close()
                if keys.output is not None:
                    how = "the same command" if journal is not None else "resume=true"
                    _say(f"broken off after {batch.summary.answered} answers; {how} goes on from there")
                raise
            display.close()
        _say(batch.summary.text(len(done)))
    return 1 if batch.summary.failed else 0


@contextlib.contextmanager
def _journal(keys: GenerateKeys, config: EngineConfig) -> Iterator[RunJournal | None]:
    if keys.journal is None:
        yield None
        return
    model = f"{config.model} {config.dtype} {config.quantization}"
    with contextlib.closing(RunJournal(keys.journal, model)) as journal:
        yield journal


@contextlib.contextmanager
def _answer_file(keys: GenerateKeys) -> Iterator[AnswerFile | None]:
    if keys.output is not None:
        folder = Path(keys.output).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output={keys.output!r}: folder {folder} cannot be made: {error.strerror}") from error
        file = _open("output", keys.output, "ab")
        try:
            yield AnswerFile(file)
        finally:
            # Each record was flushed: closing fails only where a record did, which is told then.
            with contextlib.suppress(OSError):
                file.close()
    else:
        yield None if keys.stream else AnswerFile(sys.stdout.buffer)


def _open(key: str, path: str, mode: str) -> BinaryIO:
    try:
        return cast(BinaryIO, open(path, mode))
    except OSError as error:
        raise ConfigError(f"{key}={path!r} cannot be opened: {error.strerror}") from error


def _say_report(llm: LLM) -> None:
    for line in llm.status().report:
        _say(line)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_program(GenerateKeys, generate, f"{__package__}.generate", "complete a prompt, or a file of requests")
