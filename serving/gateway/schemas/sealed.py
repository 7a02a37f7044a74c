"""Thinking and summaries in a form that clients send back without a look into it: encrypted_content, and signatures.

They are encoded, not encrypted: who may read an answer may read its thinking, too. A client that writes one itself says
nothing that it could not say in a history.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

from ..http.errors import invalid

PREFIX = "phalanx1."


def seal(text: str) -> str:
    """The text in a form for headers, JSON and logs: printable ASCII."""
    return PREFIX + base64.urlsafe_b64encode(text.encode()).decode()


def unseal(sealed: str, path: str) -> str:
    """The text that was sealed. Raises ApiError (400), naming `path`, for what this server did not make."""
    try:
        if not sealed.startswith(PREFIX):
            raise ValueError
        return base64.b64decode(sealed.removeprefix(PREFIX), b"-_", validate=True).decode()
    except (ValueError, binascii.Error):
        raise invalid(f"{path} was not made by this server, which cannot read it; leave it out", path) from None


def signature(text: str) -> str:
    """What names a text of thinking without holding it; it is not checked when it comes back."""
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"phalanx-think").hexdigest()
