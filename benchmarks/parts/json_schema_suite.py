"""Whether grammars say what their JSON Schemas say, by the official JSON-Schema test suite (draft 2020-12).

    python -m phalanx.benchmarks.parts.json_schema_suite --suite FOLDER --model models/smollm2-135m

FOLDER holds the suite's .json files; the source archive of the package jsonschema has them, in json/tests/draft2020-12.
Each schema is either refused, with a reason, or all its instances are fed to a matcher, token by token: the valid ones
must be accepted, the invalid ones not. An instance is accepted if one of its texts is: properties come in the schema's
order, and 1.0 is the same number as 1. Formats are asserted: instances that the suite calls valid because a format is
"only an annotation by default" are counted, not judged, for the folder optional/format says the opposite of each. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phalanx.benchmarks.lab.common import machine, versions
from phalanx.engine.constraints.compiler import CompiledGrammar, GrammarCompiler
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.errors import InvalidRequest
from phalanx.engine.protocol.structured import StructuredOutput

TEXTS = 720
"""Texts of one instance that are tried at most."""


@dataclass
class Verdict:
    """What became of the schemas and instances of some files."""

    right: int = 0  # schemas all of whose instances were told apart
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    valid: int = 0  # instances
    invalid: int = 0
    annotations: int = 0


def texts_of(value: Any) -> Iterator[str]:
    """Yield texts of a JSON value: in every order of its properties, and whole numbers with and without a fraction."""
    if isinstance(value, dict):
        for names in itertools.permutations(value):
            parts = (
                [f"{json.dumps(name, ensure_ascii=False)}: {text}" for text in texts_of(value[name])] for name in names
            )
            for chosen in itertools.product(*parts):
                yield "{" + ", ".join(chosen) + "}"
    elif isinstance(value, list):
        for chosen in itertools.product(*(list(texts_of(each)) for each in value)):
            yield "[" + ", ".join(chosen) + "]"
    elif isinstance(value, float) and value.is_integer():
        yield str(int(value))
        yield json.dumps(value)
    else:
        yield json.dumps(value, ensure_ascii=False)


def accepts(grammar: CompiledGrammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the matcher lets every token of a text through, and then allows an end."""
    end = tokenizer.eos_token_id or 0
    matcher = grammar.matcher([end])
    for token in [*tokenizer.encode(text, special=False), end]:
        words = matcher.allowed()
        if words is None:
            return matcher.finished and token == end
        if not words[token >> 5] >> (token & 31) & 1:
            return False
        if token != end:
            matcher.advance(token)
    return True


def judge(compiler: GrammarCompiler, tokenizer: Tokenizer, group: dict[str, Any], name: str, verdict: Verdict) -> None:
    """Judge one schema with its instances."""
    try:
        grammar = compiler.compile(StructuredOutput(json_schema=json.dumps(group["schema"])))
    except InvalidRequest as error:
        verdict.refused.append(f"{name}: {error}")
        return
    wrong = []
    for test in group["tests"]:
        if "only an annotation by default" in test["description"]:
            verdict.annotations += 1
            continue
        texts = itertools.islice(texts_of(test["data"]), TEXTS)
        accepted = any(accepts(grammar, tokenizer, text) for text in texts)
        verdict.valid += test["valid"]
        verdict.invalid += not test["valid"]
        if accepted != test["valid"]:
            wrong.append(
                f"{name}: {test['description']}: {'accepted' if accepted else 'not accepted'}: {test['data']!r}"
            )
    verdict.right += not wrong
    verdict.wrong += wrong


def run_suite(folder: Path, tokenizer: Tokenizer, compiler: GrammarCompiler) -> Verdict:
    """Judge every schema of every file in a folder, those of optional/ and optional/format too."""
    verdict = Verdict()
    for path in sorted([*folder.glob("*.json"), *folder.glob("optional/**/*.json")]):
        for group in json.loads(path.read_text()):
            judge(compiler, tokenizer, group, f"{path.stem}: {group['description']}", verdict)
    return verdict


def main() -> None:
    """Judge the suite, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    arguments = parser.parse_args()

    tokenizer = Tokenizer(arguments.model)
    compiler = GrammarCompiler(tokenizer.definition, tokenizer.size, tokenizer.eos_token_id)
    verdict = run_suite(arguments.suite, tokenizer, compiler)
    for line in [*verdict.refused, *verdict.wrong]:
        print(line[:300])
    by_file = Counter(line.partition(":")[0] for line in verdict.refused)
    print(
        json.dumps(
            {
                "benchmark": "json_schema_suite",
                "right": verdict.right,
                "refused": len(verdict.refused),
                "wrong": len(verdict.wrong),
                "valid_instances": verdict.valid,
                "invalid_instances": verdict.invalid,
                "formats_as_annotations": verdict.annotations,
                "refused_by_file": by_file,
                "machine": machine(),
                "versions": {**versions(), **{name: version(name) for name in ("llguidance", "tokenizers")}},
            }
        )
    )


if __name__ == "__main__":
    main()
