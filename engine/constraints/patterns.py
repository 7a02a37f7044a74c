"""Regular expressions of JSON Schema, which are ECMA-262's, as the library reads them: where the same text says two
things, it is written so that it says the first."""

from __future__ import annotations

import re

SPACE = r"\t\n\x0B\f\r \x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}\x{FEFF}"
"""What \\s stands for (ECMA-262, section 22.2.2.9)."""
LINE_ENDS = r"\n\r\x{2028}\x{2029}"
"""What a dot does not stand for."""
_PIECE = re.compile(r"\\c[A-Za-z]|\\.|\[\^\]|\[\^?|.", re.DOTALL)


def from_ecma(pattern: str) -> str:
    """Return an expression in Rust's syntax that matches what `pattern` does in ECMA-262's."""
    made = []
    in_class = False
    for piece in _PIECE.findall(pattern):
        if piece.startswith("\\c") and len(piece) == 3:
            made.append(f"\\x{ord(piece[2]) % 32:02X}")
        elif piece in (r"\s", r"\S"):
            outside = f"[{SPACE}]" if piece == r"\s" else f"[^{SPACE}]"
            made.append(SPACE if in_class and piece == r"\s" else outside)
        elif piece.startswith("\\"):
            made.append(piece)
        elif in_class:
            in_class = piece != "]"
            # These make intersections, differences and classes within classes there.
            made.append(f"\\{piece[0]}{piece[1:]}" if piece[0] in "[&~" else piece)
        elif piece == "[^]":
            made.append(r"(?s:.)")
        elif piece.startswith("["):
            in_class = True
            made.append(piece)
        else:
            made.append(f"[^{LINE_ENDS}]" if piece == "." else piece)
    return "".join(made)
