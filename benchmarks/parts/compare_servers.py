"""Ask two OpenAI servers of one model the same greedy questions, and print where their answers differ.

    python benchmarks/parts/compare_servers.py http://127.0.0.1:8000 --record ours.json     # one after the other, so
    python benchmarks/parts/compare_servers.py http://127.0.0.1:8001 --record theirs.json   # that they share no core
    python benchmarks/parts/compare_servers.py ours.json theirs.json

Serve both in float32 with the same context length. Differences that are meant are in KNOWN, each with its reason.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from phalanx.benchmarks.lab.common import check_writable
from phalanx.benchmarks.lab.server_questions import KNOWN, QUESTIONS
from phalanx.engine.errors import ConfigError

TOLERANCE = 1e-3
"""Most difference of two log-probabilities."""
SHOWN_CHARACTERS = 160

Answers = dict[str, Any]


def ask_all(url: str) -> Answers:
    """The answers of the server at `url` by the question's name, in a form that leaves out names and times."""
    answers: Answers = {}
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        for name, path, body in QUESTIONS:
            answer = client.post(path, json={"model": model, **body})
            if answer.status_code != 200:
                answers[name] = {"status": answer.status_code}
            elif body.get("stream"):
                answers[name] = {"status": 200, **_joined(_events(answer.text))}
            else:
                answers[name] = {"status": 200, **_plain(answer.json())}
    return answers


def _events(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", lines[-1]
    return [json.loads(line) for line in lines[:-1]]


def _joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream as the answer in one piece that it stands for."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for event in events:
        usage = event.get("usage") or usage
        for part in event["choices"]:
            choice = choices.setdefault(part["index"], {"index": part["index"], "text": "", "logprobs": None})
            choice["text"] += (part["delta"].get("content") or "") if "delta" in part else part["text"]
            for name in ("finish_reason", "stop_reason"):
                choice[name] = part.get(name) if part.get(name) is not None else choice.get(name)
            choice["logprobs"] = _more(choice["logprobs"], part.get("logprobs"))
    return _plain({"choices": [choices[index] for index in sorted(choices)], "usage": usage})


def _more(before: dict[str, list[Any]] | None, new: dict[str, Any] | None) -> dict[str, list[Any]] | None:
    if not new:
        return before
    lists = {name: value for name, value in new.items() if isinstance(value, list)}
    return {name: [*(before or {}).get(name, []), *value] for name, value in lists.items()}


def _plain(answer: dict[str, Any]) -> dict[str, Any]:
    """What two servers of one model must agree on."""
    if "choices" not in answer:
        return {name: answer[name] for name in ("count", "tokens", "prompt") if name in answer}
    usage = answer.get("usage")
    made: dict[str, Any] = {"choices": [_choice(choice) for choice in answer["choices"]]}
    if usage:
        made["usage"] = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    for name in ("prompt_logprobs", "prompt_token_ids"):
        if answer.get(name) is not None:
            made[name] = answer[name]
    return made


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    names = ("index", "finish_reason", "stop_reason", "token_ids", "prompt_token_ids", "prompt_logprobs")
    made = {name: choice[name] for name in names if choice.get(name) is not None}
    if "message" in choice:
        made["role"], made["text"] = choice["message"]["role"], choice["message"]["content"]
    elif "text" in choice:
        made["text"] = choice["text"]
    if choice.get("logprobs"):
        made["logprobs"] = {name: value for name, value in choice["logprobs"].items() if value is not None}
    return made


def differences(ours: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, what differs) of two answers; numbers may differ by TOLERANCE."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in sorted({*ours, *theirs}):
            if name not in ours or name not in theirs:
                yield f"{path}.{name}", "only ours has it" if name in ours else "only theirs has it"
            else:
                yield from differences(ours[name], theirs[name], f"{path}.{name}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
    elif isinstance(ours, float) or isinstance(theirs, float):
        numbers = isinstance(ours, int | float) and isinstance(theirs, int | float)
        if not numbers or not math.isclose(ours, theirs, rel_tol=0.0, abs_tol=TOLERANCE):
            yield path, f"{ours} and {theirs}"
    elif ours != theirs:
        yield path, f"{repr(ours)[:SHOWN_CHARACTERS]} and {repr(theirs)[:SHOWN_CHARACTERS]}"


def compare(ours: Answers, theirs: Answers) -> dict[str, Any]:
    """Print the differences, and return how many questions had the same answer, a known difference, or another."""
    same, known, other = 0, {}, []
    for name, _, _ in QUESTIONS:
        found = list(differences(ours[name], theirs[name]))
        meant, why = KNOWN.get(name, ("", ""))
        is_known = bool(meant) and all(re.search(meant, path) for path, _ in found)
        if not found:
            same += 1
            continue
        if is_known:
            known[name] = why
        else:
            other.append(name)

        print(f"{name}{f' (known: {why})' if is_known else ''}")
        for path, what in found[:4]:
            print(f"    {path}: {what}")
        if len(found) > 4:
            print(f"    and {len(found) - 4} more")
    return {"questions": len(QUESTIONS), "same": same, "known": known, "other": other, "tolerance": TOLERANCE}


def read_answers(server: str) -> Answers:
    """The answers of a server at a URL, or those in a file. Ends the program in one line where there are none."""
    try:
        answers: Any = ask_all(server) if "://" in server else json.loads(Path(server).read_text())
    except httpx.HTTPError as error:
        sys.exit(f"error: {server} does not answer ({error or type(error).__name__}): start the server there first")
    except OSError as error:
        sys.exit(f"error: {server} cannot be read ({error.strerror}): give a server's URL, or a file of --record")
    except ValueError:
        sys.exit(f"error: {server} is no file of --record, and no URL of a server of OpenAI's API")

    questions = {name for name, _, _ in QUESTIONS}
    if not isinstance(answers, dict) or questions - answers.keys():
        sys.exit(f"error: {server} has not the answers to today's {len(questions)} questions: record it again")
    return answers


def main() -> int:
    """Record one server's answers, or compare two; each is a URL or a file that was recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", help="URL of a server, or a file that --record made; ours first")
    parser.add_argument("--record", type=Path, help="file for the answers of the one server that is named")
    options = parser.parse_args()
    if len(options.servers) != (1 if options.record else 2):
        parser.error("name two servers, or one and --record FILE")
    try:
        check_writable("--record", options.record)
    except ConfigError as error:
        sys.exit(f"error: {error}")

    answers = [read_answers(server) for server in options.servers]
    if options.record:
        options.record.write_text(json.dumps(answers[0], indent=1))
        return 0
    verdict = compare(*answers)
    print(json.dumps(verdict))
    return 1 if verdict["other"] else 0


if __name__ == "__main__":
    sys.exit(main())
