"""What a batch shows while it runs: a progress bar, or the answers themselves as they are written."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...engine.protocol.messages import Delta
from .jsonl import BadLine, LineRequest

PLAIN_PERIOD_S = 10.0
_TITLE_WIDTH = 100


class Display:
    """Is informed of what happens to the requests of a batch; this one shows nothing."""

    def submitted(self, request: LineRequest) -> None:
        """A request was sent to the engine."""

    def refused(self, line: BadLine) -> None:
        """A line was no request; its error record was written."""

    def delta(self, delta: Delta) -> None:
        """Part of an answer arrived."""

    def ended(self, request_id: str, record: dict[str, Any]) -> None:
        """A submitted request's record was written: an answer, or an error."""

    def close(self) -> None:
        """The batch ended, or was broken off."""


class ProgressBar(Display):
    """Requests done and tokens a second, on standard error: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total = total
        self._stream = stream
        self._done = self._tokens = 0
        self._started = self._reported = time.monotonic()
        self._bar: Progress | None = None
        if stream.isatty():
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]} tokens/s"),
                TimeElapsedColumn(),
                console=Console(file=stream),
            )
            self._task = self._bar.add_task("", total=total, rate="0.0")
            self._bar.start()

    def refused(self, line: BadLine) -> None:
        """Count the line as done."""
        self._done += 1
        self._show()

    def delta(self, delta: Delta) -> None:
        """Count the new tokens."""
        self._tokens += len(delta.token_ids)
        self._show()

    def ended(self, request_id: str, record: dict[str, Any]) -> None:
        """Count the request as done."""
        self._done += 1
        self._show()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()

    def _show(self) -> None:
        now = time.monotonic()
        rate = f"{self._tokens / max(now - self._started, 1e-9):.1f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=rate)
        elif now - self._reported >= PLAIN_PERIOD_S:
            self._reported = now
            print(f"{self._done} of {self._total} requests, {rate} tokens/s", file=self._stream, flush=True)


class AnswerStream(Display):
    """Shows the answers one below the other in the order of the requests; the first unfinished one streams.

    The others' text is kept until their turn comes, so that requests computed side by side stay readable.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        # The texts of each completion, in the order of the lines. Keys are request ids, or numbers for bad lines.
        self._texts: dict[str | int, list[str]] = {}
        self._titles: dict[str | int, str] = {}
        self._footers: dict[str | int, str] = {}
        self._refused = 0
        self._shown = 0  # characters of the first request's first completion

    def submitted(self, request: LineRequest) -> None:
        """Line up the request behind those before it; the first one's title is shown at once."""
        submit = request.submit
        self._add(submit.id, f"[{submit.id}] {_question(request)}"[:_TITLE_WIDTH], submit.sampling.n)

    def refused(self, line: BadLine) -> None:
        """Line up the error, in the order of the lines."""
        self._refused += 1
        self._footers[self._refused] = f"error: {line.error}"
        self._add(self._refused, f"[{line.id}]", 1)
        self._advance()

    def delta(self, delta: Delta) -> None:
        """Show the new text, or keep it until its request's turn."""
        self._texts[delta.id][delta.index] += delta.text
        self._advance()

    def ended(self, request_id: str, record: dict[str, Any]) -> None:
        """Close an answer with its usage and timings, or with the error, once its turn has come."""
        if "error" in record:
            self._footers[request_id] = f"error: {record['error']}"
        else:
            usage = record["usage"]
            timings = record["timings"]
            self._footers[request_id] = (
                f"({record['finish_reason']}; {usage['completion_tokens']} tokens, first after "
                f"{timings['ttft_s']:.2f} s, then {timings['tpot_ms']:.0f} ms each)"
            )
        self._advance()

    def _add(self, key: str | int, title: str, completions: int) -> None:
        self._texts[key] = [""] * completions
        self._titles[key] = title
        if len(self._texts) == 1:
            self._begin()

    def _begin(self) -> None:
        self._shown = 0
        self._write(f"{self._titles[next(iter(self._texts))]}\n")

    def _advance(self) -> None:
        while self._texts:
            first = next(iter(self._texts))
            text = self._texts[first][0]
            self._write(text[self._shown :])
            self._shown = len(text)
            if first not in self._footers:
                return

            for number, other in enumerate(self._texts[first][1:], 2):
                self._write(f"\n-- completion {number} --\n{other}")
            self._write(f"\n{self._footers.pop(first)}\n\n")

            del self._texts[first], self._titles[first]
            if self._texts:
                self._begin()


def write_stdout(text: str) -> None:
    """Write text to standard output, and flush it."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _question(request: LineRequest) -> str:
    submit = request.submit
    if submit.prompt is not None:
        text = submit.prompt
    elif submit.messages:
        text = str(submit.messages[-1].get("content", ""))
    else:
        text = f"{len(submit.token_ids or [])} token ids"
    return " ".join(text.split())
