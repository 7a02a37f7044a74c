"""Regular expressions of JSON Schema, which are ECMA-262's, as the library reads them: where the same text says two
things, it is written so that it says the first."""

from __future__ import annotations

import re

SPACE = r"\t\n\x0B\f\r \x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}\x{FEFF}"
"""What \\s stands for (ECMA-262, section 22.2.2.9)."""
LINE_ENDS = r"\n\r\x{2028}\x{2029}"
"""What a dot does not stand for."""
NOTHING = r"[^\x{0}-\x{10FFFF}]"
"""What the class of no characters stands for."""
_ESCAPE = (
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u(?:\{[0-9a-fA-F]+\}|[0-9a-fA-F]{4})"
    r"|\\[pP]\{[^}]*\}|\\c[A-Za-z]|\\."
)
_OUTSIDE = re.compile(rf"{_ESCAPE}|\[\^\]|\[\]|\[\^?|\{{\d+(?:,\d*)?\}}|\{{,\d+\}}|.", re.DOTALL)
_INSIDE = re.compile(rf"{_ESCAPE}|.", re.DOTALL)
_PAIR = re.compile(r"\\u([dD][89abAB]..)\\u([dD][c-fC-F]..)")
_SETS = tuple(rf"\{letter}" for letter in "dDwWsSpP")
"""How an escape begins that stands for several characters."""


def from_ecma(pattern: str) -> str:
    """Return an expression in Rust's syntax that matches what `pattern` does in ECMA-262's."""
    made = []
    at = 0
    while at < len(pattern):
        found = _OUTSIDE.match(pattern, at)
        assert found is not None  # it matches any character
        piece, at = found[0], found.end()
        if piece in ("[", "[^"):
            text, at = _class(pattern, at)
            made.append(piece + text)
        elif piece.startswith("\\"):
            made.append(f"[{SPACE}]" if piece == r"\s" else _escape(piece))
        elif piece == "{":  # it begins no quantifier
            made.append(r"\{")
        else:
            made.append({"[^]": r"(?s:.)", "[]": NOTHING, ".": f"[^{LINE_ENDS}]"}.get(piece, piece))
    return "".join(made)


def _class(pattern: str, at: int) -> tuple[str, int]:
    """(the class of characters that begins at a place, after its bracket; the place behind it)."""
    pieces: list[str] = []
    while at < len(pattern) and (not pieces or pieces[-1] != "]"):
        found = _INSIDE.match(pattern, at)
        assert found is not None
        pieces.append(found[0])
        at = found.end()

    made = []
    begun = ranging = False  # whether the piece before may begin a range, and whether it is a range's hyphen
    for piece, after in zip(pieces, [*pieces[1:], "]"], strict=True):
        if piece == "-" and begun and not ranging and after != "]" and not after.startswith(_SETS):
            made.append("-")
            ranging = True
            continue
        made.append(_in_class(piece))
        begun = not ranging and not piece.startswith(_SETS)
        ranging = False
    return "".join(made), at


def _in_class(piece: str) -> str:
    if piece == r"\s":
        return SPACE
    if piece == r"\b":
        return r"\x08"
    # The others make intersections, differences and classes within classes in Rust.
    return f"\\{piece}" if piece in "-[&~" else _escape(piece)


def _escape(piece: str) -> str:
    """A piece of which ECMA-262 and Rust write the same characters in other ways."""
    if pair := _PAIR.fullmatch(piece):
        high, low = (int(half, 16) for half in pair.groups())
        return f"\\x{{{0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00):X}}}"
    if piece.startswith("\\c") and len(piece) == 3:
        return f"\\x{ord(piece[2]) % 32:02X}"
    return {r"\S": f"[^{SPACE}]", r"\0": r"\x00", r"\<": "<", r"\>": ">"}.get(piece, piece)
