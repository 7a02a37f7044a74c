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
    """What stands between the parts of a form. Raises ApiError (415) for another content type."""
    found = _BOUNDARY.fullmatch(content_type)
    if found is None:
        raise ApiError(415, f"content-type={content_type[:100]!r} is not supported: send multipart/form-data")
    return b"\r\n--" + found[1].rstrip().encode("ascii")


def parse_form(body: bytes, boundary: bytes) -> Form:
    """The form in a body; its file is the field "file". Raises ApiError (400)."""
    parts = (b"\r\n" + body).split(boundary, _MOST_PARTS + 2)
    if len(parts) < 3 or not parts[-1].startswith(b"--"):
        raise invalid(f"the form is cut off, or has more than {_MOST_PARTS} parts", code="invalid_form")
    form = Form()
    for part in parts[1:-1]:
        head, separator, content = part.partition(b"\r\n\r\n")
        found = _NAME.search(head)
        if not separator or found is None or len(head) > _MOST_HEAD_BYTES:
            raise invalid("a part of the form has no name", code="invalid_form")
        name = found[1].decode("utf-8", "replace")
        if name == "file" and form.content is None:
            form.content, form.filename = content, (found[2] or b"").decode("utf-8", "replace")[:255]
        elif name in form.fields or name == "file" or len(content) > _MOST_FIELD_BYTES:
            raise invalid(f"{name[:100]} occurs twice, or is longer than {_MOST_FIELD_BYTES} bytes", name[:100])
        else:
            form.fields[name] = content.decode("utf-8", "replace")
    return form
