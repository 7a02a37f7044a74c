"""The lines of `generate`: each is a request or a bad line, and one says nothing about another."""

from __future__ import annotations

import io
import json

from phalanx.engine.errors import ConfigError
from phalanx.engine.protocol.sampling_params import SamplingParams
from phalanx.launch.cli.jsonl import BadLine, LineRequest, read_done, read_requests
from phalanx.tests.fuzz.bounds import in_time
from phalanx.tests.fuzz.choices import Choices
from phalanx.tests.fuzz.folders import scratch

GOOD = {"id": "a", "prompt": "x", "sampling": {"max_tokens": 3, "stop": ["a"], "temperature": 0.5}}
OTHERS = (
    {"id": 1, "messages": [{"role": "user", "content": "hi"}], "structured": {"json_object": True}},
    {"id": "t", "token_ids": [1, 2], "sampling": {"logit_bias": {"3": 1.0}, "n": 2, "seed": 3}},
)
WORDS = (
    "id", "prompt", "messages", "token_ids", "sampling", "structured", "role", "content", "json_schema", "json_object",
    "regex", "choice", "grammar", "structural_tag", *SamplingParams.__struct_fields__,
)  # fmt: skip


def fuzz_one(data: bytes) -> None:
    """Read a file of lines, and the same file as one of answers."""
    choices = Choices(data)
    if choices.number(4) == 0:
        text = choices.rest()
    else:
        lines = []
        while not choices.exhausted and len(lines) < 6:
            line = json.dumps(choices.changed(choices.pick((GOOD, *OTHERS)), WORDS)).encode()
            lines.append(choices.mutated(line) if choices.flag() else line)
        text = choices.pick((b"\n", b"\r\n", b"\n\n")).join(lines)

    with in_time():
        items = list(read_requests(io.BytesIO(text), SamplingParams(), seed=1))
    for item in items:
        assert isinstance(item, LineRequest | BadLine)
        if isinstance(item, BadLine):
            assert item.error
            str(item.error).encode(errors="surrogatepass")
        else:
            assert item.submit.sampling.seed is not None
    assert len(items) <= text.count(b"\n") + 1

    file = scratch() / "done.jsonl"
    file.write_bytes(text)
    try:
        with in_time():
            read_done(file)
    except ConfigError:
        return
