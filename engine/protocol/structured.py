"""What an answer must match: the one form of it that a request gives."""

from __future__ import annotations

import msgspec

from ..errors import InvalidRequest
from .sampling_params import listed, plain

SOURCE_BYTES = {
    "json_schema": 1 << 18,
    "regex": 1 << 12,
    "choice": 1 << 18,
    "grammar": 1 << 15,
    "structural_tag": 1 << 18,
}
"""Bytes of each form at most, all choices together: so that compiling it is bounded."""
CHOICES = 16384
"""Choices at most."""
CHOICE_CHARACTERS = 4096
"""Characters of one choice at most."""


class StructuredOutput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Exactly one field is set; the answer as a whole matches it, from its first token to its end."""

    json_schema: str | None = None
    """The text of a JSON Schema (draft 2020-12); the answer is JSON that is valid by it."""
    json_object: bool = False
    """The answer is any JSON object."""
    regex: str | None = None
    """A regular expression (Rust's syntax, without look-around and back-references)."""
    choice: tuple[str, ...] | None = None
    """The texts of which the answer is one."""
    grammar: str | None = None
    """A context-free grammar in Lark's syntax, or in EBNF (GBNF, with ::=); its first rule is start, or root."""
    structural_tag: str | None = None
    """JSON text: {"structures": [{"begin", "schema", "end"}], "triggers": [...]}. Any text, in which each trigger
    begins a structure: its `begin`, JSON that is valid by its schema, and its `end`. With "alone": "one" or "many" in
    the place of triggers the answer is one structure, or one and more of them a line each, and no other text."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = plain(getattr(self, name))
            if name == "choice":
                value = listed(value, CHOICES + 1)
                value = tuple(value) if isinstance(value, list) else value
            elif name == "json_object" and value is None:
                value = False
            msgspec.structs.force_setattr(self, name, value)
            if not _is_right(name, value):
                wanted = {"choice": "a list of texts", "json_object": "true or false"}.get(name, "a text")
                raise InvalidRequest(f"structured.{name} must be {wanted}, not {type(value).__name__}")

    @property
    def kind(self) -> str:
        """The name of the field that is set. Raises InvalidRequest unless it is exactly one."""
        given = [name for name in self.__struct_fields__ if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(self.__struct_fields__)
            raise InvalidRequest(f"structured must have exactly one of {names}; got {', '.join(given) or 'none'}")
        return given[0]

    def check(self) -> None:
        """Raise InvalidRequest for what is too large to be looked at, or empty."""
        kind = self.kind
        if kind == "choice":
            choices = self.choice or ()
            if len(choices) > CHOICES:
                raise InvalidRequest(f"structured.choice holds {len(choices)} texts; it may hold at most {CHOICES}")
            if not all(choices):
                raise InvalidRequest(f"structured.choice[{choices.index('')}] is empty: each must be a text")
            longest = max(map(len, choices), default=0)
            if longest > CHOICE_CHARACTERS:
                most = f"each may have at most {CHOICE_CHARACTERS}"
                raise InvalidRequest(f"structured.choice holds a text of {longest} characters; {most}")
        texts = getattr(self, kind)
        if isinstance(texts, bool):
            return

        size = 0
        for text in [texts] if isinstance(texts, str) else texts:
            try:
                size += len(text.encode())
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"structured.{kind} is not valid Unicode text: {error}") from error
        if not 1 <= size <= SOURCE_BYTES[kind]:
            raise InvalidRequest(f"structured.{kind} has {size} bytes; it must have 1 to {SOURCE_BYTES[kind]}")


def _is_right(name: str, value: object) -> bool:
    """Whether a field has a value of its type: what the wire would refuse is refused within a process, too."""
    if name == "json_object":
        return isinstance(value, bool)
    if name == "choice" and value is not None:
        return isinstance(value, tuple) and all(isinstance(each, str) for each in value)
    return isinstance(value, str | None)
