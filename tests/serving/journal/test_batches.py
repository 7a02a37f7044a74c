"""OpenAI's Batch API over the journal, driven by the official client; the gateway is killed again and again."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.durable.batch_lines import read_lines
from phalanx.serving.gateway.http.errors import ApiError
from phalanx.serving.gateway.http.multipart import boundary_of, parse_form
from phalanx.tests.serving.fake_engine import address
from phalanx.tests.serving.journal.gate import Gate, client, gateway, kill, until, whole
from phalanx.tests.serving.servers import RunningServer, running

CHAT = "/v1/chat/completions"


def official(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def lines_of(count: int, url: str = CHAT, **body: Any) -> bytes:
    lines = [
        {
            "custom_id": f"line {number}",
            "method": "POST",
            "url": url,
            "body": {"model": "fake", "messages": [{"role": "user", "content": f"Number {number}"}], **body},
        }
        for number in range(count)
    ]
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()


def create(http: openai.OpenAI, content: bytes) -> openai.types.Batch:
    file = http.files.create(file=("requests.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (len(content), "requests.jsonl", "batch")
    return http.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"a": "b"})


def test_every_request_of_a_batch_completes_once_though_the_gateway_is_killed(gate: Gate, tmp_path: Path) -> None:
    gate.open = False
    with gateway(tmp_path, "max_open_requests=64") as server, official(server) as http:
        batch = create(http, lines_of(40))
        assert (batch.status, batch.request_counts and batch.request_counts.total) == ("in_progress", 40)
        until(lambda: len(gate.engine.requests) == 16)  # a part of max_open_requests
        for submit in gate.engine.requests[:5]:
            gate.engine.send(*whole(submit)[1:])
        until(lambda: (http.batches.retrieve(batch.id).request_counts or batch.request_counts).completed == 5)
        kill(server)
    answered = {submit.sampling.seed for submit in gate.engine.requests[:5]}

    gate.open = True
    with gateway(tmp_path) as server, official(server) as http:
        until(lambda: http.batches.retrieve(batch.id).status == "completed")
        ended = http.batches.retrieve(batch.id)
        assert ended.request_counts is not None
        assert (ended.request_counts.completed, ended.request_counts.failed) == (40, 0)
        assert (ended.error_file_id, ended.metadata) == (None, {"a": "b"})
        assert ended.output_file_id is not None
        content = http.files.content(ended.output_file_id).read()
        assert http.files.retrieve(ended.output_file_id).bytes == len(content)
        output = [json.loads(line) for line in content.splitlines()]
        assert [line["custom_id"] for line in output] == [f"line {number}" for number in range(40)]
        assert all(line["response"]["status_code"] == 200 and line["error"] is None for line in output)
        assert [each.id for each in http.batches.list()] == [batch.id]
        assert [each.id for each in http.files.list()] == [batch.input_file_id]
        assert http.files.content(batch.input_file_id).read() == lines_of(40)
        assert http.files.delete(batch.input_file_id).deleted
    # Each was computed once, or again only if nobody had its answer.
    seeds = [submit.sampling.seed for submit in gate.finished]
    assert len(set(seeds)) == len(seeds) == 35
    assert not answered & set(seeds)


@pytest.mark.slow
def test_a_batch_tells_what_failed_and_can_be_cancelled(gate: Gate, tmp_path: Path) -> None:
    with gateway(tmp_path, "max_open_requests=8") as server, official(server) as http:
        wrong = lines_of(1).replace(b'"fake"', b'"none"')
        mixed = create(http, lines_of(3) + wrong.replace(b"line 0", b"line 3"))
        until(lambda: http.batches.retrieve(mixed.id).status == "completed")
        ended = http.batches.retrieve(mixed.id)
        assert ended.error_file_id is not None
        [failed] = [json.loads(line) for line in http.files.content(ended.error_file_id).read().splitlines()]
        assert (failed["custom_id"], failed["response"]["status_code"]) == ("line 3", 404)

        gate.open = False
        batch = create(http, lines_of(10))
        until(lambda: len(gate.engine.requests) == 5)
        gate.engine.send(*whole(gate.engine.requests[3])[1:])
        until(lambda: (http.batches.retrieve(batch.id).request_counts or batch.request_counts).completed == 1)
        assert http.batches.cancel(batch.id).status == "cancelling"
        until(lambda: http.batches.retrieve(batch.id).status == "cancelled")
        until(lambda: len(gate.engine.aborted) == 2)  # those that were computed, in the engine
        cancelled = http.batches.retrieve(batch.id)
        assert cancelled.output_file_id is not None
        assert cancelled.request_counts is not None
        assert (cancelled.request_counts.completed, cancelled.request_counts.total) == (1, 10)

        bad = create(http, lines_of(2, stream=True) + b"no JSON\n" + lines_of(1, url="/v1/embeddings"))
        assert bad.status == "failed"
        assert bad.errors is not None
        assert [error.line for error in bad.errors.data or ()] == [1, 2, 3, 4]
        with pytest.raises(openai.NotFoundError, match="file_id="):
            http.files.content("file-none")
        with pytest.raises(openai.BadRequestError, match="purpose="):
            http.files.create(file=("a", b"{}"), purpose="assistants")
        with client(server) as plain:
            assert plain.post("/v1/files", json={}).status_code == 415


def test_without_a_journal_there_are_no_files_and_batches(tmp_path: Path, gate: Gate) -> None:
    with running("gateway", f"engines=[{gate.engine.address}]", "port=0") as server, client(server) as http:
        for path in ("/v1/files", "/v1/batches", "/v1/requests/a", "/v1/files/a/content"):
            assert http.get(path).status_code == 404
        assert "journal" in http.get("/v1/batches").json()["error"]["message"]


def test_lines_are_checked_before_any_is_accepted() -> None:
    def errors(content: bytes) -> list[str]:
        return [error.message for error in read_lines(content, CHAT, "b", "", "", 1000)[1]]

    assert errors(b"\n\n") == ["the file has no requests"]
    assert errors(lines_of(3)) == []
    assert "occurs twice" in errors(lines_of(1) * 2)[0]
    assert "max_body_bytes" in errors(lines_of(1, user="x" * 1000))[0]
    assert len(errors(b"{}\n" * 100)) == 20
    assert errors(lines_of(50_001)) == ["a batch has at most 50000 requests"]


def test_forms_are_read_strictly() -> None:
    content = b"a\r\n--other\r\nb\r\n"
    request = httpx.Request("POST", "http://a", data={"purpose": "batch"}, files={"file": ("n.jsonl", content)})
    boundary = boundary_of(request.headers["content-type"])
    form = parse_form(request.read(), boundary)
    assert (form.fields, form.filename, form.content) == ({"purpose": "batch"}, "n.jsonl", content)
    many = boundary + request.read().removeprefix(boundary).removesuffix(b"--\r\n") * 10
    for body in (b"", request.read()[:-10], many, boundary + b"\r\n\r\n\r\n" + boundary + b"--"):
        with pytest.raises(ApiError):
            parse_form(body, boundary)
    for content_type in ("application/json", "multipart/form-data", "multipart/form-data; boundary="):
        with pytest.raises(ApiError):
            boundary_of(content_type)


def test_settings_that_cannot_be_are_refused() -> None:
    for changes in ({"journal_max_mb": 4}, {"max_file_bytes": 2**30}):
        with pytest.raises(Exception, match="raise it"):
            GatewayConfig(journal="/tmp/j", **changes)


@pytest.mark.slow
def test_a_batch_of_a_real_model_survives_kills_at_random_moments(smollm2: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    engine = address(tmp_path)
    samplings: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 1, "seed": 7}, {"temperature": 0.8, "seed": 8, "n": 2},
        {"temperature": 1, "seed": 9, "logprobs": 1, "stop": [" sea"], "presence_penalty": 0.5},
    ]  # fmt: skip
    bodies = [
        {"model": "demo", "prompt": f"Tale {number}", "max_tokens": 32, "ignore_eos": True, **samplings[number % 4]}
        for number in range(32)
    ]
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
        for number, body in enumerate(bodies)
    ]
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    options = (f"engines=[{engine}]", "port=0", "poll_interval_s=0.05", "served_model_names=[demo]")
    journal = (*options, f"journal={tmp_path}/journal")
    moments = random.Random(3)

    with running("worker", f"model={smollm2}", "max_model_len=512", "dtype=float32", f"address={engine}"):
        with running("gateway", *options) as server, client(server) as http, ThreadPoolExecutor(32) as threads:
            asked = [threads.submit(http.post, "/v1/completions", json=body, timeout=300) for body in bodies]
            expected = [essence(each.result().json()) for each in asked]

        with running("gateway", *journal) as server, official(server) as http:
            file = http.files.create(file=("a", content), purpose="batch")
            batch = http.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            time.sleep(moments.uniform(0.0, 2.0))
            kill(server)
        for _ in range(4):
            with running("gateway", *journal) as server, official(server) as http:
                assert http.batches.retrieve(batch.id).request_counts is not None
                time.sleep(moments.uniform(0.0, 3.0))
                kill(server)
        with running("gateway", *journal) as server, official(server) as http:
            until(lambda: http.batches.retrieve(batch.id).status == "completed")
            output_id = http.batches.retrieve(batch.id).output_file_id
            assert output_id is not None
            output = [json.loads(line) for line in http.files.content(output_id).read().splitlines()]
    assert [line["custom_id"] for line in output] == [str(number) for number in range(32)]
    assert [essence(line["response"]["body"]) for line in output] == expected


def essence(answer: dict[str, Any]) -> Any:
    """What of an answer does not depend on when it was computed."""
    choices = [(each["text"], each["finish_reason"], _tokens(each)) for each in answer["choices"]]
    return choices, answer["usage"]["completion_tokens"]


def _tokens(choice: dict[str, Any]) -> list[str] | None:
    return choice["logprobs"] and choice["logprobs"]["tokens"]
