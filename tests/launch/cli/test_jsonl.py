"""Requests from JSONL and answers to it: good lines, bad lines, and runs that were killed."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from phalanx.engine.client.requests import CompletionOutput, RequestOutput
from phalanx.engine.errors import ConfigError
from phalanx.engine.protocol.logprobs import TokenLogprobs
from phalanx.engine.protocol.messages import Delta, Timings, Usage
from phalanx.engine.protocol.sampling_params import SamplingParams
from phalanx.engine.protocol.structured import StructuredOutput
from phalanx.launch.cli.display import AnswerStream
from phalanx.launch.cli.jsonl import (
    AnswerFile,
    BadLine,
    LineRequest,
    answer_record,
    count_requests,
    read_done,
    read_requests,
)


def read(text: str | bytes, defaults: SamplingParams | None = None, **options: Any) -> list[LineRequest | BadLine]:
    data = text.encode() if isinstance(text, str) else text
    return list(read_requests(io.BytesIO(data), defaults or SamplingParams(), **options))


def one(text: str | bytes) -> LineRequest | BadLine:
    (item,) = read(text)
    return item


def output(texts: list[str], **completion: Any) -> RequestOutput:
    return RequestOutput(
        id="a",
        prompt_token_ids=[1, 2],
        outputs=[
            CompletionOutput(index=i, text=text, token_ids=[i], finish_reason="stop", **completion)
            for i, text in enumerate(texts)
        ],
        usage=Usage(2, len(texts)),
        timings=Timings(0.5, 1.0, 2.0, 3.0),
    )


def test_each_kind_of_request_is_read() -> None:
    first, second, third = read(
        '{"id": "a", "prompt": "x"}\n{"id": 2, "messages": [{"role": "user", "content": "y"}]}\n'
        '\n{"id": "c", "token_ids": [1, 2]}'
    )
    assert isinstance(first, LineRequest)
    assert isinstance(second, LineRequest)
    assert isinstance(third, LineRequest)
    assert (first.id, first.submit.prompt) == ("a", "x")
    assert (second.id, second.submit.id) == (2, "2")
    assert second.submit.messages == [{"role": "user", "content": "y"}]
    assert third.submit.token_ids == [1, 2]


def test_a_line_says_what_its_answer_must_match() -> None:
    item = one('{"id": "a", "prompt": "x", "structured": {"choice": ["yes", "no"]}}')
    assert isinstance(item, LineRequest)
    assert item.submit.structured == StructuredOutput(choice=("yes", "no"))
    for wrong in ('{"choices": ["a"]}', '{"regex": 5}', '"a"'):
        assert isinstance(one(f'{{"id": "a", "prompt": "x", "structured": {wrong}}}'), BadLine)


def test_a_lines_sampling_is_laid_over_the_defaults() -> None:
    (item,) = read(
        '{"id": "a", "prompt": "x", "sampling": {"top_k": 5, "stop": "."}}',
        SamplingParams(temperature=0.5, top_k=9, stop=("!",), logit_bias={3: 1.0}),
    )
    assert isinstance(item, LineRequest)
    assert item.submit.sampling == SamplingParams(temperature=0.5, top_k=5, stop=(".",), logit_bias={3: 1.0})


@pytest.mark.parametrize(
    ("line", "line_id", "words"),
    [
        ("no json", "line-1", "line 1 is not JSON"),
        (b'{"id": "a", "prompt": "\xff"}', "line-1", "not UTF-8: byte 0xff at position 23"),
        ("[1]", "line-1", "a JSON object, not list"),
        ('{"prompt": "x"}', "line-1", "id"),
        ('{"id": "", "prompt": "x"}', "line-1", "id=''"),
        ('{"id": true, "prompt": "x"}', "line-1", "id=True"),
        ('{"id": 1.5, "prompt": "x"}', "line-1", "id=1.5"),
        ('{"id": "a"}', "a", "exactly one of prompt, messages and token_ids must be given; got none"),
        ('{"id": "a", "prompt": "x", "token_ids": [1]}', "a", "got prompt, token_ids"),
        ('{"id": "a", "promt": "x"}', "a", "did you mean 'prompt'"),
        ('{"id": "a", "prompt": 5}', "a", "$.prompt"),
        ('{"id": "a", "token_ids": ["x"]}', "a", "$.token_ids"),
        ('{"id": "a", "messages": "hi"}', "a", "$.messages"),
        ('{"id": 3, "prompt": "x", "sampling": {"temperature": -1}}', 3, "temperature=-1"),
        ('{"id": 3, "prompt": "x", "sampling": {"temprature": 1}}', 3, "temprature"),
        ('{"id": 3, "prompt": "x", "sampling": []}', 3, "$.sampling"),
        ('{"id": "a", "prompt": "x"', "line-1", "not JSON"),
    ],
)
def test_a_bad_line_is_named_and_says_what_is_wrong(line: str | bytes, line_id: str | int, words: str) -> None:
    item = one(line)
    assert isinstance(item, BadLine)
    assert item.id == line_id
    assert words in item.error
    assert "line 1" in item.error


def test_an_id_that_was_there_before_is_refused_with_both_lines() -> None:
    _, _, again = read('{"id": 1, "prompt": "x"}\n{"id": "b", "prompt": "x"}\n{"id": "1", "prompt": "y"}')
    assert again == BadLine("1", "line 3: id '1' is also that of line 1")


def test_lines_already_answered_are_left_out() -> None:
    items = read('{"id": 1, "prompt": "x"}\nbroken\n{"id": "b", "prompt": "x"}', done={"1", "line-2"})
    assert [item.id for item in items] == ["b"]


@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf")
@example(b"\xef\xbb\xbf \n\xef\xbb\xbf")
def test_whatever_the_bytes_every_line_gives_one_item(data: bytes) -> None:
    lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    assert len(read(data)) == len(lines)


def test_lines_are_read_one_at_a_time() -> None:
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            line = b'{"id": %d, "prompt": "x"}\n' % self.tell_next()
            buffer[: len(line)] = line
            return len(line)

        count = 0

        def tell_next(self) -> int:
            self.count += 1
            return self.count

    requests = read_requests(io.BufferedReader(Endless()), SamplingParams())
    assert [next(requests).id for _ in range(3)] == [1, 2, 3]


def test_an_answer_has_the_documented_fields() -> None:
    record = answer_record(7, output(["text"]))
    assert record == {
        "id": 7,
        "text": "text",
        "token_ids": [0],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 2, "completion_tokens": 1, "cached_tokens": 0, "reasoning_tokens": 0},
        "timings": {"queued_s": 0.5, "ttft_s": 1.0, "tpot_ms": 2.0, "total_s": 3.0},
    }


def test_several_completions_are_listed_with_the_first_in_its_usual_place() -> None:
    record = answer_record("a", output(["one", "two"]))
    assert record["text"] == "one"
    assert [completion["text"] for completion in record["completions"]] == ["one", "two"]


def test_logprobs_are_written_when_there_are_any() -> None:
    entry = TokenLogprobs(5, -0.5, 1, [5], [-0.5])
    record = answer_record("a", output(["x"], logprobs=[entry]))
    assert record["logprobs"] == [
        {"token_id": 5, "logprob": -0.5, "rank": 1, "top_token_ids": [5], "top_logprobs": [-0.5]}
    ]


def test_a_torn_last_line_is_cut_off_and_the_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"id":1,"text":"x"}\n{"id":"b","error":"y"}\n{"id":"c","te')
    assert read_done(path) == {"1", "b"}
    with path.open("ab") as file:
        AnswerFile(file).write({"id": "c", "text": "ü"})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [1, "b", "c"]


def test_no_earlier_output_means_that_nothing_is_done(tmp_path: Path) -> None:
    assert read_done(tmp_path / "none") == set()


@pytest.mark.parametrize(
    "content", [b"notes\n", b"[1]\n", b"{}\n", b"\xff\n", b'{"text":"x"}\n', b'{"id":null}\n', b'{"id":[1]}\n']
)
def test_a_file_that_generate_did_not_write_is_not_continued(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="line 1 of output="):
        read_done(path)
    assert path.read_bytes() == content


def test_what_is_no_file_of_answers_is_not_continued_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ConfigError, match=r"output=.* is not a file"):
            read_done(path)


class _Full(io.BytesIO):
    name = "out.jsonl"

    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_output_that_cannot_take_an_answer_is_named() -> None:
    with Path("/dev/null").open("ab") as file:
        answers = AnswerFile(file)
        answers.clear()
        answers.write({"id": 1})
    with pytest.raises(ConfigError, match=r"output='out\.jsonl' cannot be written: No space left"):
        AnswerFile(_Full()).write({"id": 1})


def test_clearing_drops_what_an_earlier_run_wrote(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    with path.open("ab") as file:
        answers = AnswerFile(file)
        answers.clear()
        answers.write({"id": 1})
    assert path.read_text() == '{"id":1}\n'


def test_a_line_without_a_seed_gets_its_own_whatever_was_answered_before() -> None:
    text = "".join(json.dumps({"id": i, "prompt": "x"}) + "\n" for i in range(8))
    text += '{"id": "own", "prompt": "x", "sampling": {"seed": 5}}'

    def seeds(**options: Any) -> dict[Any, int | None]:
        items = read(text, **options)
        return {item.id: item.submit.sampling.seed for item in items if isinstance(item, LineRequest)}

    whole = seeds(seed=0)
    assert len(set(whole.values())) == 9
    assert whole["own"] == 5
    assert seeds(seed=0, done={str(i) for i in range(4)}) == {name: whole[name] for name in (4, 5, 6, 7, "own")}
    assert not set(seeds(seed=1).values()) & (set(whole.values()) - {5}) - {5}
    assert set(seeds().values()) == {None, 5}


def test_blank_lines_are_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("a\n\n  \nb")
    assert count_requests(path) == 2
    path.write_bytes(codecs.BOM_UTF8 + b"\na\n")
    assert count_requests(path) == 1


def test_a_byte_order_mark_and_the_line_ends_of_windows_are_no_part_of_a_line() -> None:
    data = (
        codecs.BOM_UTF8
        + b'{"id": "a", "prompt": "x"}\r\n\r\n{"id": "b", "prompt": "y"}\r\n  \r\n{"id": 3, "prompt": "z"}'
    )
    assert [item.id for item in read(data) if isinstance(item, LineRequest)] == ["a", "b", 3]


@pytest.mark.parametrize(
    "fields",
    [
        r'"messages": [{"role": "system", "content": "\ud800"}, {"role": "user", "content": "a"}]',
        r'"prompt": "\udc00"',
        r'"prompt": "a", "sampling": {"stop": "\ud83d"}',
        r'"prompt": "a", "sampling": {"bad_words": ["\ud83d"]}',
    ],
)
def test_half_of_a_surrogate_pair_fails_its_line_alone(fields: str) -> None:
    file = io.BytesIO(f'{{"id": "bad", {fields}}}\n{{"id": "good", "prompt": "a"}}\n'.encode())
    bad, good = read_requests(file, SamplingParams())
    assert isinstance(bad, BadLine)
    assert "line 1" in bad.error
    assert isinstance(good, LineRequest)


def test_a_null_in_a_lines_sampling_leaves_the_default() -> None:
    item = read('{"id": 1, "prompt": "x", "sampling": {"n": null, "top_k": null}}', SamplingParams(n=2, top_k=7))[0]
    assert isinstance(item, LineRequest)
    assert (item.submit.sampling.n, item.submit.sampling.top_k) == (2, 7)


def test_the_answers_of_requests_computed_side_by_side_are_shown_one_after_the_other() -> None:
    shown: list[str] = []
    stream = AnswerStream(shown.append)
    for item in read('{"id": "a", "prompt": "first"}\nbad\n{"id": "b", "prompt": "second", "sampling": {"n": 2}}'):
        if isinstance(item, BadLine):
            stream.refused(item)
        else:
            stream.submitted(item)
    stream.delta(Delta("b", 0, "B", [1]))
    stream.delta(Delta("a", 0, "A1 ", [1]))
    stream.delta(Delta("b", 1, "second B", [1]))
    assert "".join(shown) == "[a] first\nA1 "
    stream.ended("b", answer_record("b", output(["B", "second B"])))
    stream.delta(Delta("a", 0, "A2", [2]))
    stream.ended("a", {"id": "a", "error": "broke"})
    end = "(stop; 2 tokens, first after 1.00 s, then 2 ms each)"
    text = "".join(shown)
    assert text.startswith("[a] first\nA1 A2\nerror: broke\n\n[line-2]\n\nerror: line 2 is not JSON")
    assert text.endswith(f"\n\n[b] second\nB\n-- completion 2 --\nsecond B\n{end}\n\n")


@pytest.mark.parametrize("opened", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 3000 + b"]" * 3000 + b"}]}"])
@pytest.mark.parametrize("field", ["messages", "structured", "sampling", "other"])
def test_a_line_nested_too_deep_fails_alone(field: str, opened: bytes) -> None:
    line = b'{"id": "deep", "%s": [{"a":' % field.encode() + opened
    items = read(b'{"id": 1, "prompt": "x"}\n' + line + b'\n{"id": 2, "prompt": "y"}')
    assert [type(item) for item in items] == [LineRequest, BadLine, LineRequest]
    assert "line 2" in items[1].error


def test_an_answer_nested_too_deep_is_no_answer(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_bytes(b'{"id": 1, "x": ' + b"[" * 100_000 + b"\n")
    with pytest.raises(ConfigError, match=r"line 1 of output=.*is no answer"):
        read_done(file)


@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"id": 3, "prompt": "z"}'])
@pytest.mark.parametrize("size", [49, 50, 51, 99, 100, 101, 102, 500])
def test_a_line_that_no_engine_takes_is_not_read_whole(monkeypatch: Any, tmp_path: Path, size: int, end: bytes) -> None:
    monkeypatch.setattr("phalanx.launch.cli.jsonl.MAX_LINE_BYTES", 50)
    text = b'{"id": 1, "prompt": "x"}\n' + b"[" * size + b'\n{"id": 2, "prompt": "y"}' + end
    items = read(text)
    assert [item.id for item in items] == [1, "line-2", 2, 3][: 3 + end.endswith(b"}")]
    assert ("longer than the 50 bytes" in items[1].error) == (size >= 50)  # type: ignore[union-attr]
    (tmp_path / "in.jsonl").write_bytes(text)
    assert count_requests(tmp_path / "in.jsonl") == len(items)
