"""A form as browsers and clients send files (RFC 7578): a few short fields and one file, strictly and within bounds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import ApiError, invalid
from .json_body import shown

_MOST_PARTS = 8
_MOST_HEAD_BYTES = 4096
_MOST_FIELD_BYTES = 4096
_MOST_NAME_BYTES = 100
_MOST_FILENAME_BYTES = 255
_FORM = re.compile(r"\s*multipart/form-data\s*(?:;.*)?", re.IGNORECASE | re.DOTALL)
_BOUNDARY_CHARS = r"[0-9A-Za-z'()+_,\-./:=?"
_BOUNDARY = re.compile(
    rf';\s*boundary=(?:"({_BOUNDARY_CHARS} ]{{1,70}})"|({_BOUNDARY_CHARS}]{{1,70}}))\s*(?:;|$)', re.IGNORECASE
)
_PARAMETER = re.compile(rb"""[ \t]*;[ \t]*([\w*-]+)=(?:"((?:[^"\\\r\n]|\\.)*)"|([^\s";]+))""")
_PLAIN_CODINGS = (b"7bit", b"8bit", b"binary")


@dataclass
class Form:
    """What a form holds."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    content: bytes | None = None
    """The file's."""


def boundary_of(content_type: str) -> bytes:
    """What stands before each part of a form.

    Raises ApiError: 415 for another content type, 400 for one without a boundary that may be.
    """
    if not _FORM.fullmatch(content_type):
        raise ApiError(
            415,
            f"content-type={content_type[:100]!r} is not supported: send multipart/form-data",
            param="content-type",
        )
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise invalid(
            f"content-type={content_type[:200]!r} has no boundary, which has 1 to 70 characters (RFC 2046)",
            "content-type",
            "invalid_form",
        )
    return b"--" + (found[1] or found[2]).rstrip().encode("ascii")


def parse_form(body: bytes, boundary: bytes) -> Form:
    """The form in a body; its file is the field "file". Raises ApiError (400)."""
    if not body.startswith(boundary):
        raise invalid("the form does not begin with the boundary that content-type has", code="invalid_form")
    form = Form()
    begin = len(boundary)
    for number in range(1, _MOST_PARTS + 1):
        end = body.find(b"\r\n" + boundary, begin)
        if end < 0:
            raise invalid(f"the form is cut off in its part {number}", code="invalid_form")
        _take_part(form, body, begin, end, number)
        begin = end + 2 + len(boundary)
        if body.startswith(b"--", begin):
            return form
    raise invalid(f"the form has more than {_MOST_PARTS} parts", code="invalid_form")


def _take_part(form: Form, body: bytes, begin: int, end: int, number: int) -> None:
    """Take in the part of a body between two boundaries."""
    head_end = body.find(b"\r\n\r\n", begin, min(end, begin + _MOST_HEAD_BYTES))
    if head_end < 0:
        why = f"has no head, or one of more than {_MOST_HEAD_BYTES} bytes"
        raise invalid(f"part {number} of the form {why}", code="invalid_form")
    found = _parameters(body[begin:head_end], number)
    if not 1 <= len(found.get(b"name", b"")) <= _MOST_NAME_BYTES:
        raise invalid(
            f"part {number} of the form has no name of 1 to {_MOST_NAME_BYTES} bytes: send Content-Disposition: "
            f'form-data; name="file"; filename="NAME"',
            code="invalid_form",
        )

    name = _text(found[b"name"], f"the name of part {number}", None)
    begin = head_end + 4
    if name in form.fields or (name == "file" and form.content is not None):
        raise invalid(f"{name} occurs twice in the form", name)
    if name == "file":
        form.content, form.filename = body[begin:end], _filename(found.get(b"filename", b""))
    elif end - begin > _MOST_FIELD_BYTES:
        raise invalid(f"{name} has {end - begin} bytes, and may have {_MOST_FIELD_BYTES}", name)
    else:
        form.fields[name] = _text(body[begin:end], name, name)


def _parameters(head: bytes, number: int) -> dict[bytes, bytes]:
    """The parameters of a part's Content-Disposition: in any order, quoted or not, as clients write them.

    Raises ApiError (400) for one that occurs twice, and for a part that is encoded.
    """
    found: dict[bytes, bytes] = {}
    for line in head.split(b"\r\n"):
        field, _, value = line.partition(b":")
        field, kind = field.strip().lower(), value.partition(b";")[0].strip().lower()
        if field == b"content-transfer-encoding" and kind not in _PLAIN_CODINGS:
            why = f"content-transfer-encoding={shown(value.strip())}: send its bytes as they are"
            raise invalid(f"part {number} of the form has {why}", code="invalid_form")
        if field != b"content-disposition" or kind != b"form-data":
            continue

        at = value.find(b";")
        while at >= 0 and (parameter := _PARAMETER.match(value, at)):
            name, quoted, plain = parameter.groups()
            if name.lower() in found:
                raise invalid(f"part {number} of the form has {shown(name)} twice", code="invalid_form")
            given = plain if quoted is None else re.sub(rb'\\(["\\])', rb"\1", quoted)
            found[name.lower()], at = given, parameter.end()
    return found


def _filename(given: bytes) -> str:
    if len(given) > _MOST_FILENAME_BYTES:
        raise invalid(f"the file's filename has {len(given)} bytes, and may have {_MOST_FILENAME_BYTES}", "file")
    return _text(given, "the file's filename", "file")


def _text(given: bytes, what: str, param: str | None) -> str:
    try:
        return given.decode()
    except UnicodeDecodeError:
        raise invalid(f"{what} is not valid UTF-8; got {shown(given)}", param) from None
