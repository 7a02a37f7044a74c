"""Requests from a JSONL file, and their answers to another; a line that is no request fails alone."""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from ...engine.client.requests import RequestOutput
from ...engine.config import unknown_name
from ...engine.errors import ConfigError, InvalidRequest
from ...engine.protocol.messages import MESSAGE_BYTES, Submit
from ...engine.protocol.sampling_params import SamplingParams
from ...engine.protocol.structured import StructuredOutput
from ...parallel.loading.json_files import shown

Id = str | int
MAX_LINE_BYTES = 2 * MESSAGE_BYTES
"""A longer line cannot be a request that an engine takes, however it is written."""


class _Line(msgspec.Struct):
    id: Id
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    token_ids: list[int] | None = None
    sampling: dict[str, Any] | None = None
    structured: StructuredOutput | None = None


class _Answered(msgspec.Struct):
    """What a line of the output says of which request it answers."""

    id: Id


@dataclass(frozen=True)
class LineRequest:
    """A line that is a request. `id` is the line's own; the request's id is its text."""

    id: Id
    submit: Submit


@dataclass(frozen=True)
class BadLine:
    """A line that is no request, and why. `id` is the line's own, or line-N if it has none that can be read."""

    id: Id
    error: str


def read_requests(
    file: BinaryIO, defaults: SamplingParams, done: Collection[str] = (), seed: int | None = None
) -> Iterator[LineRequest | BadLine]:
    """Yield the file's lines in order; blank lines, and those whose id is in `done`, are left out.

    A line's "sampling" is laid over `defaults`, field by field. With `seed`, a line without one of its own gets one
    that follows from `seed` and its id, so that it draws the same whatever an earlier run has answered.
    """
    base = msgspec.to_builtins(defaults)
    first_line: dict[str, int] = {}
    for number, raw in enumerate(_lines(file), 1):
        line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw  # as editors on Windows leave it
        if not line.strip():
            continue
        item = _parse(line, number, base)
        key = str(item.id)
        if key in done:
            continue
        if key in first_line:
            yield BadLine(item.id, f"line {number}: id {item.id!r} is also that of line {first_line[key]}")
            continue
        first_line[key] = number
        yield item if seed is None or isinstance(item, BadLine) else _seeded(item, seed)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the file's lines; of one that is too long no more than shows it, for it may not fit into memory."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return


def _seeded(item: LineRequest, seed: int) -> LineRequest:
    submit = item.submit
    if submit.sampling.seed is not None:
        return item
    digest = hashlib.blake2b(f"{seed} {submit.id}".encode(), digest_size=8).digest()
    sampling = msgspec.structs.replace(submit.sampling, seed=int.from_bytes(digest, "big", signed=True))
    return LineRequest(item.id, msgspec.structs.replace(submit, sampling=sampling))


def count_requests(path: Path) -> int:
    """Count the lines of the file that are not blank."""
    with path.open("rb") as file:
        return sum(1 for line in _lines(file) if line.removeprefix(codecs.BOM_UTF8).strip())


def _parse(line: bytes, number: int, base: dict[str, Any]) -> LineRequest | BadLine:
    line_id: Id = f"line-{number}"
    if len(line) > MAX_LINE_BYTES:
        return BadLine(line_id, f"line {number} is longer than the {MAX_LINE_BYTES} bytes that a request may have")
    try:
        values = msgspec.json.decode(line.decode())
        if not isinstance(values, dict):
            raise InvalidRequest(f"a request is a JSON object, not {type(values).__name__}")

        given = values.get("id")
        if isinstance(given, str | int) and not isinstance(given, bool) and given != "":
            line_id = given
        elif "id" in values:
            raise InvalidRequest(f"id={shown(given)} must be a string that is not empty, or an integer")

        return LineRequest(line_id, _submit(values, base))
    except UnicodeDecodeError as error:
        return BadLine(line_id, f"line {number} is not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}")
    except RecursionError:
        return BadLine(line_id, f"line {number} is nested too deep")
    except msgspec.ValidationError as error:
        return BadLine(line_id, f"line {number}: {error}")
    except msgspec.DecodeError as error:
        return BadLine(line_id, f"line {number} is not JSON: {error}")
    except InvalidRequest as error:
        return BadLine(line_id, f"line {number}: {error}")


def _submit(values: dict[str, Any], base: dict[str, Any]) -> Submit:
    for name in values:
        if name not in _Line.__struct_fields__:
            raise InvalidRequest(unknown_name("field", name, list(_Line.__struct_fields__)))

    line = msgspec.convert(values, _Line)
    given = [name for name in ("prompt", "messages", "token_ids") if getattr(line, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"exactly one of prompt, messages and token_ids must be given; got {', '.join(given) or 'none'}"
        )

    given_sampling = {name: value for name, value in (line.sampling or {}).items() if value is not None}
    return Submit(
        id=str(line.id),
        prompt=line.prompt,
        messages=line.messages,
        token_ids=line.token_ids,
        sampling=SamplingParams.from_dict({**base, **given_sampling}),
        structured=line.structured,
    )


def answer_record(request_id: Id, output: RequestOutput) -> dict[str, Any]:
    """Return an answer's output line. With n > 1 "completions" lists all; "text" and the like are completion 0's."""
    completions = [
        {"text": each.text, "token_ids": each.token_ids, "finish_reason": each.finish_reason}
        | ({} if each.logprobs is None else {"logprobs": [_logprobs(entry) for entry in each.logprobs]})
        for each in output.outputs
    ]
    record: dict[str, Any] = {"id": request_id, **completions[0]}
    if len(completions) > 1:
        record["completions"] = completions
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [_logprobs(entry) for entry in output.prompt_logprobs]
    return record | {"usage": msgspec.to_builtins(output.usage), "timings": msgspec.to_builtins(output.timings)}


def _logprobs(entry: msgspec.Struct) -> dict[str, Any]:
    values = msgspec.structs.asdict(entry)
    del values["token_bytes"], values["top_bytes"]  # bytes have no form in JSON; the token ids say as much
    return values


class AnswerFile:
    """Appends JSON lines to a file opened for appending; each is complete in the file before the next begins."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, record: dict[str, Any]) -> None:
        """Append a record. Raises ConfigError where the file cannot take it, standard output what it raises itself."""
        try:
            self._file.write(msgspec.json.encode(record) + b"\n")
            self._file.flush()
        except OSError as error:
            raise ConfigError(f"output={self._file.name!r} cannot be written: {error.strerror}") from error

    def clear(self) -> None:
        """Drop what an earlier run wrote; a pipe, a terminal or another device holds nothing to drop."""
        if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._file.truncate(0)


def _open_answers(path: Path) -> BinaryIO:
    try:
        return path.open("r+b")
    except OSError as error:
        raise ConfigError(f"output={str(path)!r} cannot be continued: {error.strerror}") from error


def read_done(path: Path) -> set[str]:
    """Return the ids that an earlier run has answered; a last line that a killed run left unfinished is cut off.

    Raises ConfigError if the file holds anything but such lines.
    """
    done: set[str] = set()
    if not os.path.lexists(path):
        return done
    if not path.is_file():  # to read a pipe or a device might take for ever
        raise ConfigError(f"output={str(path)!r} is not a file: resume=true continues only a file that generate wrote")

    with _open_answers(path) as file:
        whole = 0
        for number, line in enumerate(file, 1):
            # A killed run left this line unfinished.
            if not line.endswith(b"\n"):
                break

            try:
                done.add(str(msgspec.json.decode(line, type=_Answered).id))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                raise ConfigError(
                    f"line {number} of output={str(path)!r} is no answer with an id: resume=true continues only a "
                    f"file that generate wrote; give another output="
                ) from None
            whole += len(line)

        file.truncate(whole)
    return done
