"""benchmarks/parts/compare_servers.py: what it takes for a difference of two servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from phalanx.benchmarks.lab.server_questions import KNOWN, QUESTIONS
from phalanx.benchmarks.parts.compare_servers import _joined, _plain, compare, differences, read_answers


def part(text: str, **fields: Any) -> dict[str, Any]:
    return {"index": 0, "delta": {"content": text}, "finish_reason": None, **fields}


def test_numbers_may_differ_by_the_tolerance_and_nothing_else_may() -> None:
    one = {"text": "a", "logprobs": [-1.0, -2.0]}
    assert list(differences(one, {"text": "a", "logprobs": [-1.0009, -2.0]})) == []
    assert [path for path, _ in differences(one, {"text": "b", "logprobs": [-1.0, -2.002]})] == [
        ".logprobs[1]",
        ".text",
    ]
    assert [path for path, _ in differences({"text": "a"}, {"usage": 1})] == [".text", ".usage"]
    assert [path for path, _ in differences([1], [1, 2])] == [""]


def test_a_stream_is_compared_as_what_it_says_in_all() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    chunks = [
        {"choices": [part("He", logprobs={"content": [{"token": "He"}]})]},
        {"choices": [part("llo", logprobs={"content": [{"token": "llo"}]})]},
        {"choices": [part("", finish_reason="stop")]},
        {"choices": [], "usage": usage},
    ]
    assert _joined(chunks) == _plain(
        {
            "choices": [
                {
                    "index": 0,
                    "text": "Hello",
                    "finish_reason": "stop",
                    "logprobs": {"content": [{"token": "He"}, {"token": "llo"}]},
                }
            ],
            "usage": usage,
        }
    )


def test_questions_have_names_of_their_own_and_known_differences_are_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name, _, _ in QUESTIONS]
    assert len(set(names)) == len(names) >= 50
    assert KNOWN.keys() <= set(names)
    same = {name: {"status": 200, "text": "a"} for name in names}
    known, half, unknown = "chat: n", "text: n", "chat: short"
    changed = {known: {"status": 400, "text": "a"}, half: {"status": 400, "text": "b"}, unknown: {"status": 500}}
    verdict = compare({**same, **changed}, same)
    # What differs beside the known paths is not known.
    assert (verdict["same"], list(verdict["known"])) == (len(names) - 3, [known])
    assert sorted(verdict["other"]) == [unknown, half]
    assert f"{known} (known: {KNOWN[known][1]})" in capsys.readouterr().out


def test_answers_that_cannot_be_had_are_said_in_one_line(tmp_path: Path) -> None:
    other, old = tmp_path / "other.txt", tmp_path / "old.json"
    other.write_text("no JSON")
    old.write_text("{}")
    for server, why in (
        ("http://127.0.0.1:1", "does not answer"),
        (str(tmp_path / "absent.json"), "cannot be read (No such file or directory)"),
        (str(tmp_path), "cannot be read (Is a directory)"),
        (str(other), "is no file of --record"),
        (str(old), "record it again"),
    ):
        with pytest.raises(SystemExit) as ended:
            read_answers(server)
        assert str(ended.value).startswith(f"error: {server} ")
        assert why in str(ended.value)
        assert "\n" not in str(ended.value)
