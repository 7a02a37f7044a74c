"""OpenAI's Batch API over the journal, driven by the official client; the gateway is killed again and again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.durable.batch_lines import read_lines
from phalanx.serving.gateway.http.errors import ApiError
from phalanx.serving.gateway.http.multipart import boundary_of, parse_form
from phalanx.tests.serving.journal.test_journaled_gateway import Gate, client, gate, gateway, kill, until, whole
from phalanx.tests.serving.servers import RunningServer, running

__all__ = ["gate"]
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
        cancelled = http.batches.cancel(batch.id)
        assert (cancelled.status, cancelled.output_file_id is not None) == ("cancelled", True)
        for submit in gate.engine.requests[4:]:
            gate.engine.send(*whole(submit)[1:])
        assert http.batches.retrieve(batch.id).request_counts == cancelled.request_counts

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
    for body in (b"", request.read()[:-10], request.read() * 10, b"--" + boundary[4:] + b"\r\n\r\n\r\n"):
        with pytest.raises(ApiError):
            parse_form(body, boundary)
    for content_type in ("application/json", "multipart/form-data", "multipart/form-data; boundary="):
        with pytest.raises(ApiError):
            boundary_of(content_type)


def test_settings_that_cannot_be_are_refused() -> None:
    for changes in ({"journal_max_mb": 4}, {"max_file_bytes": 2**30}):
        with pytest.raises(Exception, match="raise it"):
            GatewayConfig(journal="/tmp/j", **changes)
