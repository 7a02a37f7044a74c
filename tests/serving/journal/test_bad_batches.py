"""Every bad input to files and batches gets its status and its message, and leaves nothing behind."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import inspect
from phalanx.serving.gateway.schemas.journal_api.batches import BatchRequest
from phalanx.tests.serving.gateway.bad_inputs import answer_to, wrong_cases, wrong_values
from phalanx.tests.serving.gateway.scripted_pool import wait_until
from phalanx.tests.serving.gateway.test_bad_inputs import FIELDS
from phalanx.tests.serving.journal.gate import KEYS
from phalanx.tests.serving.journal.journaled import (
    COMPLETIONS,
    FORM,
    Journaled,
    create,
    journaled,
    jsonl,
    line,
    named,
    part,
    upload,
)

END = b"--x--\r\n"
FILE = named(b"file", jsonl(line()), b"a.jsonl")
PURPOSE = named(b"purpose")

FORMS: dict[str, tuple[str | None, bytes, int, str | None, str]] = {
    "JSON": ("application/json", b"{}", 415, "content-type", "multipart/form-data"),
    "no content type": (None, PURPOSE + FILE + END, 415, "content-type", "multipart/form-data"),
    "no boundary": ("multipart/form-data", PURPOSE + FILE + END, 400, "content-type", "boundary"),
    "empty boundary": ("multipart/form-data; boundary=", FILE + END, 400, "content-type", "boundary"),
    "long boundary": (f"{FORM}{'y' * 70}", FILE + END, 400, "content-type", "boundary"),
    "boundary that cannot be": (f"{FORM}<>", FILE + END, 400, "content-type", "boundary"),
    "another boundary": (f"{FORM}y", PURPOSE + FILE + END, 400, None, "begin with the boundary"),
    "no body": (FORM, b"", 400, None, "begin with the boundary"),
    "no form": (FORM, b"\xff\xfe\0", 400, None, "begin with the boundary"),
    "nothing in it": (FORM, END, 400, None, "part 1"),
    "cut off": (FORM, PURPOSE + FILE[:-9], 400, None, "cut off in its part 2"),
    "no end": (FORM, PURPOSE + FILE, 400, None, "cut off in its part 2"),
    "many parts": (FORM, b"".join(named(b"%d" % i) for i in range(9)) + END, 400, None, "more than 8 parts"),
    "part without a head": (FORM, b"--x\r\nbatch\r\n" + END, 400, None, "part 1"),
    "part of a long head": (FORM, named(b"file", b"", b"a" * 5000) + END, 400, None, "4096"),
    "part without a name": (FORM, part(b"Content-Disposition: form-data") + END, 400, None, "name"),
    "name in another field": (FORM, part(b'X: content-disposition: form-data; name="file"') + END, 400, None, "name"),
    "name twice": (FORM, part(b'Content-Disposition: form-data; name="a"; name="file"') + END, 400, None, "twice"),
    "encoded part": (
        FORM,
        PURPOSE + part(b'Content-Disposition: form-data; name="file"\r\nContent-Transfer-Encoding: base64') + END,
        400,
        None,
        "content-transfer-encoding=b'base64'",
    ),
    "name that is no text": (FORM, named(b"\xff") + END, 400, None, "part 1"),
    "no purpose": (FORM, FILE + END, 400, "purpose", "required"),
    "other purpose": (FORM, named(b"purpose", b"fine-tune") + FILE + END, 400, "purpose", "fine-tune"),
    "empty purpose": (FORM, named(b"purpose", b"") + FILE + END, 400, "purpose", "must be batch"),
    "purpose twice": (FORM, PURPOSE + PURPOSE + FILE + END, 400, "purpose", "twice"),
    "long purpose": (FORM, named(b"purpose", b"a" * 5000) + FILE + END, 400, "purpose", "4096"),
    "purpose that is no text": (FORM, named(b"purpose", b"\xff") + FILE + END, 400, "purpose", "UTF-8"),
    "no file": (FORM, PURPOSE + END, 400, "file", "required"),
    "file twice": (FORM, PURPOSE + FILE + FILE + END, 400, "file", "twice"),
    "long filename": (FORM, PURPOSE + named(b"file", b"", b"a" * 256) + END, 400, "file", "255"),
    "filename that is no text": (FORM, PURPOSE + named(b"file", b"", b"\xff") + END, 400, "file", "UTF-8"),
    "unknown field": (FORM, PURPOSE + named(b"color") + FILE + END, 400, "color", "unknown field"),
    "unsupported field": (
        FORM,
        PURPOSE + named(b"expires_after[seconds]") + FILE + END,
        400,
        "expires_after[seconds]",
        "journal_keep_s",
    ),
}
"""By name: (content type, body, status, the field that is named, what else the message says)."""

LINES: dict[str, tuple[bytes, int | None, str | None, str]] = {
    "nothing": (b"", None, None, "no requests"),
    "empty lines": (b"\n \r\n\n", None, None, "no requests"),
    "no text": (b"\xff\xfe\n", 1, None, "the line is not valid UTF-8"),
    "no JSON": (jsonl(line()) + b"{oops}\n", 2, None, "the line is not valid JSON"),
    "half a line": (jsonl(line())[:-9], 1, None, "the line is not valid JSON"),
    "a list": (b"[]\n", 1, None, "must be a JSON object"),
    "deep nesting": (b'{"a":' + b"[" * 5000 + b"\n", 1, None, "levels"),
    "a name twice": (b'{"custom_id": "a", "custom_id": "b"}\n', 1, None, "'custom_id' occurs twice"),
    "no custom_id": (b"{}\n", 1, "custom_id", "required"),
    "custom_id of no characters": (jsonl(line(custom_id="")), 1, "custom_id", ">= 1"),
    "custom_id too long": (jsonl(line(custom_id="a" * 513)), 1, "custom_id", "<= 512"),
    "custom_id that is a number": (jsonl(line(custom_id=1)), 1, "custom_id", "str"),
    "custom_id twice": (jsonl(line(1), line(2), line(1)), 3, "custom_id", "'line 1' occurs twice"),
    "another method": (jsonl(line(method="GET")), 1, "method", "POST"),
    "unknown route": (jsonl(line(url="/v1/embeddings")), 1, "url", COMPLETIONS),
    "another route": (jsonl(line(url="/v1/chat/completions")), 1, "url", COMPLETIONS),
    "route of a path": (jsonl(line(url="/v1/../v1/completions")), 1, "url", COMPLETIONS),
    "body that is a list": (jsonl(line(body=[])), 1, "body", "object"),
    "body that streams": (jsonl(line(body={"prompt": "a", "stream": True})), 1, "body.stream", "not supported"),
    "unknown field": (jsonl(line(color="red")), 1, "color", "unknown field"),
    "long line": (jsonl(line(body={"prompt": "a" * 100_000})), 1, None, "max_body_bytes"),
    "long line of nothing": (b" " * 99_999 + b"{}\n", 1, None, "max_body_bytes"),
    "many lines": (jsonl(*map(line, range(50_001))), None, None, "at most 50000"),
}
"""By name: (content, number of the line, the field that is named, what else the message says)."""

IDS = ["file-none", "batch_none", "%2e%2e", "..%5c..%5cetc", "%00", "%ff", "'%20OR%201=1", "a" * 5000, "%F0%9F%8D%8E"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journaled]:
    sizes = {"max_body_bytes": 65536, "max_file_bytes": 16 * 2**20, "body_timeout_s": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phalanx.serving.gateway.http.exchange.LINGER_S", 0.5)
        with journaled(tmp_path_factory.mktemp("journal"), **sizes) as server:
            yield server


def check_error(answer: httpx.Response, status: int, param: str | None, message: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == FIELDS
    assert error["param"] == param, error
    assert message in error["message"]
    assert len(error["message"]) < 600


@pytest.mark.parametrize("name", FORMS)
def test_a_form_that_cannot_be_is_refused_and_not_kept(shared: Journaled, name: str) -> None:
    content_type, body, status, param, message = FORMS[name]
    before = shared.kept_bytes
    headers = {} if content_type is None else {"content-type": content_type}
    check_error(shared.http.post("/v1/files", content=body, headers=headers), status, param, message)
    assert (shared.kept_bytes, shared.held_bytes) == (before, 0)


@pytest.mark.parametrize(
    ("head", "filename"),
    [
        (b"Content-Disposition: form-data; name=file; filename=a.jsonl; filename*=utf-8''a.jsonl", "a.jsonl"),  # .NET
        (b'content-disposition:form-data;filename="a.jsonl";name="file"', "a.jsonl"),
        (rb'Content-Disposition: form-data; name="file"; filename="a\"b\\c.jsonl"', 'a"b\\c.jsonl'),  # curl
        (b'Content-Disposition: form-data; name="file"; filename="a; name=b"', "a; name=b"),
        (b'Content-Type: text/plain\r\nContent-Disposition: Form-Data; Name="file"', ""),
        (b'Content-Disposition: form-data; name="file"\r\nContent-Transfer-Encoding: binary', ""),
    ],
)
def test_a_part_may_be_named_as_any_client_writes_it(shared: Journaled, head: bytes, filename: str) -> None:
    answer = shared.http.post("/v1/files", content=PURPOSE + part(head, b"{}") + END, headers={"content-type": FORM})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["filename"], answer.json()["bytes"]) == (filename, 2)


def test_forms_that_may_be_are_taken(shared: Journaled) -> None:
    content = jsonl(line())
    for content_type in (
        FORM,
        'multipart/form-data; charset=utf-8; boundary="x"',
        "Multipart/Form-Data; boundary=x; a=b",
    ):
        answer = shared.http.post("/v1/files", content=FILE + PURPOSE + END, headers={"content-type": content_type})
        assert answer.status_code == 200, answer.text
        made = answer.json()
        assert (made["filename"], made["bytes"]) == ("a.jsonl", len(content))
        assert made["expires_at"] == made["created_at"] + 86400
    for name in ("../../etc/passwd", "a b.jsonl", "\U0001f34e.jsonl", "a" * 255):
        files = {"file": (name, content)}
        answer = shared.http.post("/v1/files", data={"purpose": "batch"}, files=files)
        assert answer.json()["filename"] == name
        assert shared.http.get(f"/v1/files/{answer.json()['id']}/content").content == content


def test_every_field_of_a_batch_of_a_wrong_type_or_out_of_range_is_named(shared: Journaled) -> None:
    right = {"input_file_id": "file-none", "endpoint": COMPLETIONS, "completion_window": "24h"}
    for field in inspect.type_info(BatchRequest).fields:  # type: ignore[attr-defined]
        if field.required:
            without = {name: value for name, value in right.items() if name != field.name}
            check_error(shared.http.post("/v1/batches", json=without), 400, field.name, "required")
        tried = 0
        for value in wrong_values(field.type):
            answer = shared.http.post("/v1/batches", json={**right, field.name: value})
            if field.name == "input_file_id" and isinstance(value, str) and len(value) <= 100:
                check_error(answer, 404, "input_file_id", "is not known")
            elif answer.status_code != 404:  # it is one that may be, of a file that there is not
                tried += 1
                assert answer.status_code == 400, answer.text
                assert answer.json()["error"]["param"].startswith(field.name), answer.text
        assert tried > 4, field.name
    long = {f"{number}": "" for number in range(17)}
    for metadata in (long, {"a" * 65: ""}, {"a": "b" * 513}):
        assert shared.http.post("/v1/batches", json={**right, "metadata": metadata}).status_code == 400
    check_error(shared.http.post("/v1/batches", json={**right, "color": 1}), 400, "color", "unknown field")
    refused = shared.http.post("/v1/batches", json={**right, "output_expires_after": {}})
    check_error(refused, 400, "output_expires_after", "journal_keep_s")


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
def test_queries_that_cannot_be_are_refused(shared: Journaled, path: str) -> None:
    for query in ("limit=0", "limit=101", "limit=a", "limit=", "limit=1&limit=2", "after=none", "after=%ff", "a=b"):
        check_error(shared.http.get(f"{path}?{query}"), 400, query.partition("=")[0], "")
    many = "&".join(f"{number}=" for number in range(65))
    check_error(shared.http.get(f"{path}?{many}"), 400, None, "64")


def test_files_are_listed_by_purpose_and_in_either_order(tmp_path: Path) -> None:
    with journaled(tmp_path) as server:
        put = [server.openai.files.create(file=(f"{number}.jsonl", b"{}"), purpose="batch").id for number in range(3)]
        for order, expected in (("asc", put), ("desc", put[::-1])):
            for purpose in (httpx.QueryParams(), httpx.QueryParams(purpose="batch")):
                listed = server.http.get("/v1/files", params=purpose.set("order", order)).json()
                assert [file["id"] for file in listed["data"]] == expected
            assert [file.id for file in server.openai.files.list(order=order, limit=1)] == expected  # type: ignore[arg-type]
        assert server.openai.files.list(purpose="batch_output").data == []
        check_error(server.http.get("/v1/files?order=up"), 400, "order", "")
        check_error(server.http.get("/v1/batches?order=asc"), 400, "order", "")


@pytest.mark.parametrize("given", IDS)
def test_ids_of_nothing_are_not_found(shared: Journaled, given: str) -> None:
    routes = [
        ("GET", f"/v1/files/{given}", "file_id"),
        ("GET", f"/v1/files/{given}/content", "file_id"),
        ("DELETE", f"/v1/files/{given}", "file_id"),
        ("GET", f"/v1/batches/{given}", "batch_id"),
        ("POST", f"/v1/batches/{given}/cancel", "batch_id"),
    ]
    for method, path, field in routes:
        request = b"%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" % (method.encode(), path.encode())
        status, body = answer_to(shared.port, request)
        error = json.loads(body)["error"]
        assert (status, error["param"]) == (404, field)
        assert len(error["message"]) < 400


@pytest.mark.parametrize("given", ["%2e%2e%2f%2e%2e%2fetc", "../..", "a/b", ""])
def test_ids_that_are_paths_are_routes_that_there_are_not(shared: Journaled, given: str) -> None:
    for path in ("/v1/files/", "/v1/batches/"):
        request = b"GET %s%s HTTP/1.1\r\nHost: x\r\n\r\n" % (path.encode(), given.encode())
        assert answer_to(shared.port, request)[0] == 404


@pytest.mark.parametrize("name", LINES)
def test_a_file_with_a_wrong_line_is_a_failed_batch(shared: Journaled, name: str) -> None:
    content, number, param, message = LINES[name]
    batch = create(shared.http, content)
    assert (batch["status"], batch["request_counts"]["total"]) == ("failed", 0)
    error = batch["errors"]["data"][0]
    assert (error["line"], error["param"]) == (number, param), error
    assert message in error["message"]
    assert shared.http.post(f"/v1/batches/{batch['id']}/cancel").json()["status"] == "failed"


def test_a_byte_order_mark_before_the_first_line_is_none_of_it(shared: Journaled) -> None:
    batch = create(shared.http, b"\xef\xbb\xbf" + jsonl(line()))
    assert batch["status"] != "failed"
    assert batch["errors"] is None


def test_lines_with_a_wrong_body_fail_alone_and_name_the_field(shared: Journaled) -> None:
    wrong = [case for case in wrong_cases() if case.path == COMPLETIONS and case.field not in ("stream", "background")]
    lines = [line(number, body=case.body) for number, case in enumerate(wrong)]
    batch = create(shared.http, jsonl(*lines, line("unknown", body={"model": "none", "prompt": "a"}), line("right")))

    def now() -> Any:
        return shared.http.get(f"/v1/batches/{batch['id']}").json()

    wait_until(lambda: now()["status"] == "completed", 60)
    counts = {"total": len(wrong) + 2, "completed": 1, "failed": len(wrong) + 1}
    assert now()["request_counts"] == counts
    content = shared.http.get(f"/v1/files/{now()['error_file_id']}/content").text
    errors = [json.loads(each) for each in content.splitlines()]
    assert errors.pop()["response"]["status_code"] == 404
    for case, error in zip(wrong, errors, strict=True):
        assert error["response"]["status_code"] == 400
        assert error["response"]["body"]["error"]["param"].startswith(case.field), case

    # It is told of, and not deleted by itself.
    for file_id in (now()["error_file_id"], now()["output_file_id"]):
        assert shared.http.get(f"/v1/files/{file_id}").json()["purpose"] == "batch_output"
        check_error(shared.http.delete(f"/v1/files/{file_id}"), 400, "file_id", "journal_keep_s")
        body = {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
        check_error(shared.http.post("/v1/batches", json=body), 400, "input_file_id", "upload a file")


def test_a_file_that_is_too_long_is_refused_and_not_kept(shared: Journaled) -> None:
    before = shared.kept_bytes
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\n".encode()
    begin = PURPOSE + b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    chunk = b"100000\r\n" + b"a" * 2**20 + b"\r\n"
    chunks = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(begin), begin) + chunk * 100
    for rest in (b"Content-Length: 104857600\r\n\r\n" + begin, chunks):
        status, body = answer_to(shared.port, head + rest)
        assert status == 413
        assert "max_file_bytes" in json.loads(body)["error"]["message"]
    wait_until(lambda: shared.held_bytes == 0)
    assert shared.kept_bytes == before


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 1000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nfffff\r\n"]
)
def test_a_client_that_goes_away_in_mid_upload_leaves_nothing(shared: Journaled, framing: bytes) -> None:
    before = shared.kept_bytes
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\n".encode()
    with socket.create_connection(("127.0.0.1", shared.port)) as leaving:
        leaving.sendall(head + framing + PURPOSE + FILE)
        if b"Length" in framing:
            wait_until(lambda: shared.held_bytes > 0)
    wait_until(lambda: shared.held_bytes == 0)
    # One that stays, and sends no more, is told so.
    status, body = answer_to(shared.port, head + framing + PURPOSE + FILE)
    assert (status, json.loads(body)["error"]["code"]) == (408, "body_timeout")
    wait_until(lambda: shared.held_bytes == 0)
    assert shared.kept_bytes == before


def test_what_belongs_to_another_key_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n".join(KEYS.values()))
    (tmp_path / "keys").chmod(0o600)
    with journaled(tmp_path, keys=True) as server:
        ann, bob = (httpx.Client(base_url=server.url, headers={"x-api-key": KEYS[who]}) for who in ("ann", "bob"))
        with ann, bob:
            batch = create(ann, jsonl(line()))
            wait_until(lambda: ann.get(f"/v1/batches/{batch['id']}").json()["status"] == "completed")
            output = ann.get(f"/v1/batches/{batch['id']}").json()["output_file_id"]
            for file_id in (batch["input_file_id"], output):
                for method, more in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
                    answer = bob.request(method, f"/v1/files/{file_id}{more}")
                    check_error(answer, 404, "file_id", "another key")
                body = {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
                check_error(bob.post("/v1/batches", json=body), 404, "input_file_id", "another key")
            for method, more in (("GET", ""), ("POST", "/cancel")):
                answer = bob.request(method, f"/v1/batches/{batch['id']}{more}")
                check_error(answer, 404, "batch_id", "another key")
            for path, known in (("/v1/files", batch["input_file_id"]), ("/v1/batches", batch["id"])):
                assert bob.get(path).json()["data"] == []
                check_error(bob.get(f"{path}?after={known}"), 400, "after", "is not the id")
                assert [each["id"] for each in ann.get(path).json()["data"]] == [known]
                assert httpx.get(f"{server.url}{path}").status_code == 401
            assert ann.get(f"/v1/files/{output}/content").status_code == 200


def test_files_and_batches_are_kept_up_to_their_bounds(tmp_path: Path) -> None:
    sizes = {"journal_max_mb": 2, "max_file_bytes": 600_000, "max_body_bytes": 600_000}
    with journaled(tmp_path, max_files=3, max_batches=2, **sizes) as server:

        def refused(content: bytes) -> httpx.Response:
            return server.http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", content)})

        first, second, _ = (upload(server.http, jsonl(line())) for _ in range(3))
        check_error(refused(b"{}"), 429, None, "keeps 3 of this kind (file) for one caller, and may keep 3 (max_files)")
        for each in (first, second):
            assert server.http.delete(f"/v1/files/{each['id']}").json()["deleted"]
        upload(server.http, b"a" * 500_000)
        check_error(refused(b"a" * 590_000), 429, None, "half of journal_max_mb=2")
        assert "journal_keep_s=86400" in refused(b"a" * 590_000).json()["error"]["message"]

        # A batch has the requests of its file once more.
        large = upload(server.http, jsonl(line(body={"prompt": "a" * 300_000})))
        body = {"input_file_id": large["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
        check_error(server.http.post("/v1/batches", json=body), 429, None, "half of journal_max_mb=2")
        assert server.http.delete(f"/v1/files/{large['id']}").json()["deleted"]
        for _ in range(2):
            small = upload(server.http, b"{}")
            answer = server.http.post("/v1/batches", json={**body, "input_file_id": small["id"]})
            assert answer.json()["status"] == "failed"
            assert server.http.delete(f"/v1/files/{small['id']}").json()["deleted"]
        small = upload(server.http, jsonl(line()))
        answer = server.http.post("/v1/batches", json={**body, "input_file_id": small["id"]})
        check_error(answer, 429, None, "keeps 2 of this kind (batch) for one caller, and may keep 2 (max_batches)")
        # Others find room.
        assert server.http.post(COMPLETIONS, json={"prompt": "a" * 500_000}).status_code == 200


def test_files_that_are_read_count_as_held(tmp_path: Path) -> None:
    sizes = {"max_file_bytes": 400_000, "max_body_bytes": 1000, "max_open_body_bytes": 500_000}
    with journaled(tmp_path, **sizes) as server:
        file = upload(server.http, b"a" * 300_000)
        server.gateway.bodies.held += 300_000
        answer = server.http.get(f"/v1/files/{file['id']}/content")
        check_error(answer, 429, None, "max_open_body_bytes")
        server.gateway.bodies.held -= 300_000
        assert server.http.get(f"/v1/files/{file['id']}/content").content == b"a" * 300_000
        wait_until(lambda: server.held_bytes == 0)
