"""Whether answers are valid by their schemas, and calls well-formed, with the functions of the package bfcl-eval.

    python -m phalanx.benchmarks.parts.structured_answers --bfcl bfcl_eval-....whl --model models/smollm2-135m

The parameters of the Berkeley Function-Calling Leaderboard's functions are the schemas; each is answered at temperature
1, and so are calls of the functions of its simple and parallel cases. An answer that max_tokens cut off does not count.
The last line is JSON. Needs the package jsonschema_rs.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

import jsonschema_rs
from phalanx import LLM, InvalidRequest, SamplingParams, StructuredOutput
from phalanx.engine.client.requests import RequestOutput
from phalanx.serving.gateway.generation.tool_grammar import BEGIN, END, tool_grammar

TYPES = {"dict": "object", "float": "number", "tuple": "array", "list": "array", "bool": "boolean", "any": "string"}
"""The leaderboard's names of types that JSON Schema has others for."""
BATCH = 32


def cases(wheel: Path, name: str) -> list[dict[str, Any]]:
    """The cases of one of the leaderboard's files: questions and functions."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(f"bfcl_eval/data/BFCL_v4_{name}.json").decode().splitlines()
    return [json.loads(line) for line in lines]


def as_schema(value: Any) -> Any:
    """The leaderboard's description of parameters as a JSON Schema."""
    if isinstance(value, list):
        return [as_schema(each) for each in value]
    if not isinstance(value, dict):
        return value
    made = {name: as_schema(each) for name, each in value.items() if name not in ("optional", "format")}
    if isinstance(made.get("type"), str):
        made["type"] = TYPES.get(made["type"], made["type"])
    return made


def answer(llm: LLM, forms: list[StructuredOutput], prompts: list[str], tokens: int) -> list[RequestOutput | str]:
    """The answers, or why one was refused, in batches."""
    outputs: list[RequestOutput | str] = []
    for first in range(0, len(forms), BATCH):
        batch = slice(first, first + BATCH)
        sampling = [
            SamplingParams(temperature=1.0, seed=first + i, max_tokens=tokens) for i in range(len(forms[batch]))
        ]
        try:
            outputs += llm.generate(prompts[batch], sampling, forms[batch])
        except InvalidRequest:
            for prompt, params, form in zip(prompts[batch], sampling, forms[batch], strict=True):
                try:
                    outputs += llm.generate([prompt], params, form)
                except InvalidRequest as error:
                    outputs.append(str(error))
    return outputs


def well_formed(text: str, functions: list[dict[str, Any]]) -> bool:
    """Whether a text is calls of these functions and nothing else, each with arguments that are valid."""
    schemas = {function["name"]: as_schema(function["parameters"]) for function in functions}
    if not (text.startswith(BEGIN) and text.endswith(END)):
        return False
    for body in text[len(BEGIN) : -len(END)].split(f"{END}\n{BEGIN}"):
        call = json.loads(body)
        if call["name"] not in schemas or not jsonschema_rs.is_valid(schemas[call["name"]], call["arguments"]):
            return False
    return True


def main() -> None:
    """Answer, judge, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bfcl", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--calls", type=int, default=200, help="of each of the two kinds of cases")
    parser.add_argument("--tokens", type=int, default=200)
    arguments = parser.parse_args()

    simple = cases(arguments.bfcl, "simple_python")
    result: dict[str, Any] = {"benchmark": "structured_answers"}
    with LLM(arguments.model, max_num_seqs=BATCH, max_model_len=1024, kv_memory=2**30) as llm:
        schemas = [as_schema(case["function"][0]["parameters"]) for case in simple[: arguments.schemas]]
        forms = [StructuredOutput(json_schema=json.dumps(schema)) for schema in schemas]
        prompts = [f"{case['question'][0][0]['content']}\nAs JSON:" for case in simple[: arguments.schemas]]
        outputs = answer(llm, forms, prompts, arguments.tokens)
        good = [jsonschema_rs.is_valid(schema, json.loads(t)) for schema, o in zip(schemas, outputs, strict=True)
                if (t := ended(o)) is not None]  # fmt: skip
        result["schemas"] = verdict(outputs, good)

        for name, kind, parallel in (("simple", simple, False), ("parallel", cases(arguments.bfcl, "parallel"), True)):
            some = kind[: arguments.calls]
            tools = [
                [{"function": {**f, "parameters": as_schema(f["parameters"])}} for f in c["function"]] for c in some
            ]
            forms = [tool_grammar(each, parallel=parallel) for each in tools]
            outputs = answer(llm, forms, [case["question"][0][0]["content"] + "\n" for case in some], arguments.tokens)
            good = [well_formed(t, case["function"]) for case, o in zip(some, outputs, strict=True)
                    if (t := ended(o)) is not None]  # fmt: skip
            result[name] = verdict(outputs, good)
    print(json.dumps(result))


def ended(output: RequestOutput | str) -> str | None:
    """The text of an answer that came to its end."""
    if isinstance(output, str):
        print(output[:200])
        return None
    completion = output.outputs[0]
    return completion.text if completion.finish_reason == "stop" else None


def verdict(outputs: list[RequestOutput | str], good: list[bool]) -> dict[str, int]:
    """How many were asked for, refused, came to an end, and are valid."""
    refused = sum(isinstance(output, str) for output in outputs)
    return {"asked": len(outputs), "refused": refused, "ended": len(good), "valid": sum(good)}


if __name__ == "__main__":
    main()
