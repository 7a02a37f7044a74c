"""launch.generate as a person runs it: alone, with its own group, and under torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from phalanx.serving.journal.journal import Journal
from phalanx.tests.launch.programs import ALONE, TORCHRUN, command, environment, run, start

pytestmark = pytest.mark.slow

LINES = (
    '{"id": "text", "prompt": "Hello"}',
    '{"id": 7, "messages": [{"role": "user", "content": "Hi"}], "sampling": {"n": 2, "temperature": 1, "seed": 5}}',
    "this is not JSON",
    '{"id": "ids", "token_ids": [1, 2, 3], "sampling": {"max_tokens": 2, "logprobs": 1}}',
    '{"id": "empty", "prompt": ""}',
    '{"id": "foreign", "token_ids": [1031]}',
    '{"id": "huge", "token_ids": [99999999999999999999]}',
    '{"id": "many", "prompt": "a", "sampling": {"top_k": 99999999999999999999}}',
    '{"id": "half", "prompt": "a\\ud800"}',
    '{"id": "late", "prompt": "Bye"}',
)
BAD = {"line-3", "empty", "foreign", "huge", "line-9"}


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """A JSONL file: four requests, and lines that are none."""
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return path


def records(path: Path) -> dict[Any, dict[str, Any]]:
    """An output file's lines by id; each id stands there once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


@pytest.mark.parametrize(
    ("launcher", "arguments"),
    [(ALONE, ()), (ALONE, ("ranks=2",)), (TORCHRUN, ())],
    ids=["in process", "own group", "torchrun"],
)
def test_each_line_is_answered_or_refused_by_name(
    tiny: Path, requests: Path, tmp_path: Path, launcher: tuple[str, ...], arguments: tuple[str, ...]
) -> None:
    output = tmp_path / "new" / "answers.jsonl"
    ended = run(
        "generate",
        f"model={tiny}",
        f"input={requests}",
        f"output={output}",
        "sampling.max_tokens=4",
        "dtype=float32",
        *arguments,
        launcher=launcher,
    )
    answers = records(output)
    assert set(answers) == {"text", 7, "ids", "many", "late"} | BAD
    assert {name for name, record in answers.items() if "error" in record} == BAD
    text = answers["text"]
    assert set(text) == {"id", "text", "token_ids", "finish_reason", "usage", "timings"}
    assert len(text["token_ids"]) == text["usage"]["completion_tokens"] == 4
    assert text["finish_reason"] == "length"
    assert set(text["timings"]) == {"queued_s", "ttft_s", "tpot_ms", "total_s"}
    assert answers[7]["completions"][0]["token_ids"] == answers[7]["token_ids"]
    assert len(answers[7]["completions"]) == 2
    assert len(answers["ids"]["logprobs"]) == 2
    assert "10 requests: 5 answered, 5 failed" in ended.stderr
    assert ended.stdout == ""
    assert ended.returncode == 1


def test_the_three_ways_to_start_give_the_same_tokens(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(f'{{"id": {i}, "prompt": "{"ab" * i}"}}\n' for i in range(1, 6)))
    found = []
    for name, launcher, arguments in (("a", ALONE, ()), ("b", ALONE, ("ranks=3",)), ("c", TORCHRUN, ())):
        output = tmp_path / name
        ended = run(
            "generate",
            f"model={tiny}",
            f"input={path}",
            f"output={output}",
            "sampling.max_tokens=16",
            *arguments,
            launcher=launcher,
        )
        assert ended.returncode == 0, ended.stderr
        found.append({key: record["token_ids"] for key, record in records(output).items()})
    assert found[0] == found[1] == found[2]


def test_a_killed_run_resumes_and_answers_each_request_once(tiny: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    path.write_text("".join(f'{{"id": {i}, "prompt": "number {i}"}}\n' for i in range(400)))
    arguments = (f"model={tiny}", f"input={path}", f"output={output}", "sampling.max_tokens=30", "max_num_seqs=8")
    process = start("generate", *arguments)
    while not output.exists() or output.stat().st_size < 2000:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    first = output.read_bytes()
    assert first.count(b"\n") < 400
    output.write_bytes(first + b'{"id": 399, "te')  # as if the kill had come in the middle of a line
    ended = run("generate", *arguments, "resume=true")
    assert ended.returncode == 0, ended.stderr
    assert set(records(output)) == set(range(400))
    assert output.read_bytes().startswith(first[: first.rindex(b"\n") + 1])
    assert "already there" in ended.stderr


def test_ctrl_c_says_that_resume_goes_on(tiny: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    path.write_text("".join(f'{{"id": {i}, "prompt": "number {i}"}}\n' for i in range(2000)))
    process = start("generate", f"model={tiny}", f"input={path}", f"output={output}", "sampling.max_tokens=30")
    while not output.exists() or output.stat().st_size < 2000:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text = process.communicate()[0]
    assert process.returncode == 130
    assert "resume=true goes on from there" in text
    assert output.read_bytes().endswith(b"\n")


def test_stream_shows_the_answers_one_below_the_other_in_the_order_of_the_lines(tiny: Path, requests: Path) -> None:
    ended = run("generate", f"model={tiny}", f"input={requests}", "stream=true", "sampling.max_tokens=4")
    shown = ended.stdout
    titles = ["[text] Hello", "[7] Hi", "[line-3]", "[ids] 3 token ids", "[empty]", "[foreign]", "[late] Bye"]
    places = [shown.index(title) for title in titles]
    assert places == sorted(places)
    assert "-- completion 2 --" in shown[places[1] : places[2]]
    assert shown.count("(length; ") == 5
    assert shown.count("error: ") == len(BAD)


def test_without_output_the_answers_go_behind_what_standard_output_holds(
    tiny: Path, requests: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text('{"id": "before"}\n')
    with log.open("a") as stdout:  # as ">> log"
        arguments = command("generate", f"model={tiny}", f"input={requests}", "sampling.max_tokens=2")
        subprocess.run(arguments, stdout=stdout, stderr=subprocess.DEVNULL, timeout=120, env=environment(), check=False)
    ids = [json.loads(line)["id"] for line in log.read_text().splitlines()]
    assert ids[0] == "before"
    assert set(ids[1:]) == {"text", 7, "ids", "many", "late"} | BAD


def test_a_prompt_with_any_characters_is_answered_on_standard_output(tiny: Path) -> None:
    ended = run("generate", f"model={tiny}", "prompt=Don't, (please) = ${panic}! [ü] {\\'}", "sampling.max_tokens=3")
    assert ended.returncode == 0, ended.stderr
    assert "3 tokens" in ended.stderr


def test_a_prompt_that_is_too_long_fails_with_1_and_names_the_limit(tiny: Path) -> None:
    ended = run("generate", f"model={tiny}", "prompt=" + "word " * 40, "max_model_len=32")
    assert ended.returncode == 1
    assert "max_model_len=32" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("modle=x",), "did you mean 'model'?"),
        (("max_num_seqs=many",), "max_num_seqs must be an integer"),
        (("prompt=a", "model=nobody/nothing"), "'nobody/nothing' is not in the local hub cache"),
        (("prompt=a", "model=/no/such/folder"), "/no/such/folder"),
        (("prompt=a", "input=b", "model=/x"), "either prompt=TEXT or input=FILE.jsonl"),
        (("input=/no/such/file", "model=/x"), "input='/no/such/file' is not a file"),
        ((f"input={__file__}", f"output={__file__}/x/y", "model=/x"), "cannot be made: Not a directory"),
        (("prompt=a", "resume=true", "model=/x"), "resume=True goes with input=FILE.jsonl"),
    ],
)
def test_what_cannot_be_run_is_refused_with_2_and_one_line(arguments: tuple[str, ...], words: str) -> None:
    ended = run("generate", *arguments)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""


def test_under_torchrun_only_rank_0_says_what_is_wrong() -> None:
    ended = run("generate", "modle=x", launcher=TORCHRUN)
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "did you mean 'model'?" in said[0]
    assert ended.returncode == 1


def test_more_ranks_than_heads_are_refused_by_a_group_too(tiny: Path) -> None:
    ended = run("generate", f"model={tiny}", "prompt=a", "ranks=5")
    assert ended.returncode == 2
    assert ended.stderr == "error: ranks=5 is out of range: this model has 4 query heads, so set ranks to 1 to 4\n"


def test_the_configuration_is_printed_once_and_nothing_is_written(tiny: Path, tmp_path: Path) -> None:
    ended = run("generate", f"model={tiny}", "sampling.top_k=5", "--cfg", "job", launcher=TORCHRUN, cwd=tmp_path)
    assert ended.returncode == 0
    assert ended.stdout.count("model: ") == 1
    assert "\nranks: 2\n" in ended.stdout
    assert "\n  top_k: 5\n" in ended.stdout
    assert os.listdir(tmp_path) == []


def test_a_killed_run_with_a_journal_goes_on_from_its_last_tokens(smollm2: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "requests.jsonl"
    samplings: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 1, "seed": 5, "n": 2}, {"temperature": 0.8, "logprobs": 1},
        {"temperature": 1, "presence_penalty": 0.5, "stop": ["zebra"]},
    ]  # fmt: skip
    lines = [
        {"id": number, "prompt": f"Story {number}: once upon a time", "sampling": sampling}
        for number, sampling in enumerate(samplings)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    settings = ("dtype=float32", "max_model_len=512", "seed=3", "sampling.max_tokens=120", "sampling.ignore_eos=true")
    arguments = (f"model={smollm2}", f"input={path}", *settings)
    whole = run("generate", *arguments, f"output={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr

    journal, output = tmp_path / "journal", tmp_path / "answers.jsonl"
    noted = 0
    while not noted:
        process = start("generate", *arguments, f"output={output}", f"journal={journal}")
        while not journal.exists() or not _says_ready(process):
            assert process.poll() is None
        time.sleep(1.5)
        process.kill()
        process.communicate()
        with contextlib.closing(Journal(str(journal), "generate", max_bytes=2**30, keep_s=0)) as opened:
            entries = opened.unfinished(0, 100).result()
            noted = sum(bool(opened.progress_of(entry.number).result()) for entry in entries)
        assert entries, "the run ended before it was killed"

    ended = run("generate", *arguments, f"output={output}", f"journal={journal}")
    assert ended.returncode == 0, ended.stderr
    expected, found = records(tmp_path / "whole"), records(output)
    assert set(found) == set(expected)
    for number, record in expected.items():
        for name in ("text", "token_ids", "finish_reason", "completions"):
            assert found[number].get(name) == record.get(name)
        assert found[number]["usage"]["completion_tokens"] == record["usage"]["completion_tokens"]
        assert len(found[number].get("logprobs", ())) == len(record.get("logprobs", ()))
    assert int(ended.stderr.rsplit("; ", 2)[1].split()[0]) < 120 * 5  # not from the beginning
    with contextlib.closing(Journal(str(journal), "generate", max_bytes=2**30, keep_s=0)) as opened:
        assert (opened.size.unfinished, opened.size.finished) == (0, 0)


def _says_ready(process: subprocess.Popen[str]) -> bool:
    """Read what a program prints up to its report, which it prints when the engine is ready."""
    assert process.stdout is not None
    return any("KV" in line for line in iter(process.stdout.readline, ""))


def test_a_journal_needs_an_output_and_one_run(tiny: Path, tmp_path: Path, requests: Path) -> None:
    tmp_path.chmod(0o700)
    ended = run("generate", f"model={tiny}", f"input={requests}", f"journal={tmp_path / 'journal'}")
    assert "needs output=FILE.jsonl" in ended.stderr
    with contextlib.closing(Journal(str(tmp_path / "journal"), "generate", max_bytes=2**30, keep_s=0)):
        options = (f"output={tmp_path / 'answers'}", f"journal={tmp_path / 'journal'}")
        ended = run("generate", f"model={tiny}", f"input={requests}", *options)
    assert "is in use by process" in ended.stderr
