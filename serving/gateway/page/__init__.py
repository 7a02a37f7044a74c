"""The status page at /: what the server does now, and a chat. One static file, which the browser fills in."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re

from ..gateway import Gateway
from ..http.exchange import Exchange

PAGE = importlib.resources.files(__package__).joinpath("index.html").read_bytes()
"""HTML, UTF-8. It has no key, no model and no address in it, and so is served to everybody."""


def _sources(element: str) -> str:
    """The Content-Security-Policy's sources for the inline elements of a kind: their hashes, and nothing else."""
    blocks = re.findall(rf"<{element}>(.*?)</{element}>".encode(), PAGE, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(block).digest()).decode() for block in blocks]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; script-src {_sources('script')}; style-src {_sources('style')}; connect-src 'self'; "
        f"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
"""The page's own script and style run, and it speaks to this server alone."""


async def page(gateway: Gateway, exchange: Exchange) -> None:
    """Show the status page."""
    await exchange.respond(PAGE, content_type="text/html; charset=utf-8", headers=HEADERS)
