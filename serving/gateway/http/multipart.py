"""A form as browsers and clients send files (RFC 7578): a few short fields and one file, strictly and within bounds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import ApiError, invalid

_MOST_PARTS = 8
_MOST_HEAD_BYTES = 4096
_MOST_FIELD_BYTES = 4096
_BOUNDARY = re.compile(r"""\s*multipart/form-data\s*;\s*boundary="?([0-9A-Za-z'()+_,\-./:=? ]{1,70})"?\s*""", re.I)
_NAME = re.compile(
    rb'content-disposition:\s*form-data;\s*name="([^"\r\n]{1,100})"(?:;\s*filename="([^"\r\n]*)")?', re.I
)


@dataclass
class Form:
    """What a form holds."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    content: bytes | None = None
    """The file's."""


def boundary_of(content_type: str) -> bytes:
    """What stands before each part of a form. Raises ApiError (415) for another content type."""
    found = _BOUNDARY.fullmatch(content_type)
    if found is None:
        raise ApiError(415, f"content-type={content_type[:100]!r} is not supported: send multipart/form-data")
    return b"--" + found[1].rstrip().encode("ascii")


def parse_form(body: bytes, boundary: bytes) -> Form:
    """The form in a body; its file is the field "file". Raises ApiError (400)."""
    form = Form()
    begin = len(boundary) if body.startswith(boundary) else -1
    for _ in range(_MOST_PARTS):
        end = body.find(b"\r\n" + boundary, begin) if begin >= 0 else -1
        if end < 0:
            break
        _take_part(form, body, begin, end)
        begin = end + 2 + len(boundary)
        if body.startswith(b"--", begin):
            return form
    raise invalid(f"the form is cut off, or has more than {_MOST_PARTS} parts", code="invalid_form")


def _take_part(form: Form, body: bytes, begin: int, end: int) -> None:
    """Take in the part of a body between two boundaries."""
    head_end = body.find(b"\r\n\r\n", begin, min(end, begin + _MOST_HEAD_BYTES))
    found = _NAME.search(body, begin, head_end) if head_end >= 0 else None
    if found is None:
        raise invalid("a part of the form has no name", code="invalid_form")
    name = found[1].decode("utf-8", "replace")
    begin = head_end + 4
    if name == "file" and form.content is None:
        form.content, form.filename = body[begin:end], (found[2] or b"").decode("utf-8", "replace")[:255]
    elif name in form.fields or name == "file" or end - begin > _MOST_FIELD_BYTES:
        raise invalid(f"{name} occurs twice, or is longer than {_MOST_FIELD_BYTES} bytes", name)
    else:
        form.fields[name] = body[begin:end].decode("utf-8", "replace")
