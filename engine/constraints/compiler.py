"""Grammars from what requests give: compiled within bounds, on the threads of intake, and kept for the next request."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InvalidRequest
from ..protocol.structured import StructuredOutput
from .json_schema import decode_json, find_path
from .matcher import Beginning, Matcher
from .sources import grammar_of, schema_grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

INSTALL = "structured output needs the package llguidance: pip install 'llguidance>=1.9'"
CACHED = 128
"""Compiled grammars that are kept, at most."""
CACHED_BYTES = 1 << 22
"""Bytes of the sources of the grammars that are kept, at most: what a compiled one takes grows with its source."""
LEXER_FUEL, GRAMMAR_SIZE = 1_000_000, 200_000
"""Bounds of compiling, in the library's own measures: they keep it below two seconds and 200 MB."""
STEP_FUEL, STEP_ITEMS, LEXER_STATES = 100_000, 20_000, 50_000
"""Bounds of one mask: about 15 milliseconds; a grammar that needs more fails its request."""


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar, and the state in which every answer begins."""

    state: LLMatcher
    vocab_size: int
    library_ends: tuple[int, ...]

    def matcher(self, end_token_ids: Sequence[int], beginning: Beginning | None = None) -> Matcher:
        """A matcher for one completion that may end with any of these tokens."""
        return Matcher(self.state.deep_copy(), self.vocab_size, end_token_ids, self.library_ends, beginning)


class GrammarCompiler:
    """Compiles what requests give. Thread-safe; compiling releases the GIL, so that no step waits for it."""

    def __init__(self, definition: Callable[[], str], vocab_size: int, eos_token_id: int | None) -> None:
        """`definition` returns the text of a tokenizer.json, and is called when it is first needed.

        `vocab_size` is the model's: it may be larger than the tokenizer's.
        """
        self._definition = definition
        self._vocab_size = vocab_size
        self._eos_token_id = eos_token_id
        self._lock = threading.Lock()
        self._vocabulary_lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._kept: OrderedDict[StructuredOutput, CompiledGrammar] = OrderedDict()
        self._kept_bytes = 0

    def prepare(self) -> None:
        """Read the vocabulary, which takes up to a second once. Does nothing without the library."""
        try:
            import llguidance  # noqa: F401
        except ImportError:
            return
        self._tokens()

    def compile(self, structured: StructuredOutput) -> CompiledGrammar:
        """Return the grammar of `structured`. Raises InvalidRequest, with the path of what is wrong in it."""
        structured.check()
        with self._lock:
            kept = self._kept.get(structured)
            if kept is not None:
                self._kept.move_to_end(structured)
                return kept
        compiled = self._compile(structured)
        self._keep(structured, compiled)
        return compiled

    def _compile(self, structured: StructuredOutput) -> CompiledGrammar:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise InvalidRequest(INSTALL) from None
        grammar = grammar_of(structured)
        tokens = self._tokens()
        state = LLMatcher(tokens, grammar, limits=_limits(), log_level=0)
        if state.is_error():
            raise InvalidRequest(self._explain(structured, state.get_error()))
        warnings = state.get_grammar_warnings()
        if warnings:
            raise InvalidRequest(f"structured.{structured.kind}: {_first_lines(warnings[0])}")

        compiled = CompiledGrammar(state, self._vocab_size, tuple(tokens.eos_tokens))
        # What no text matches is refused at once.
        probe = compiled.matcher(())
        words = probe.allowed()
        if (words is None and probe.failure is not None) or (words is not None and not words.any()):
            raise InvalidRequest(f"structured.{structured.kind} is met by no text: {probe.failure or 'it allows none'}")
        return compiled

    def _explain(self, structured: StructuredOutput, error: str) -> str:
        """The library's message, for a schema with the path of the part that it is about."""
        path = field = f"structured.{structured.kind}"
        if structured.json_schema is not None:

            def compile_alone(part: object) -> str:
                return LLMatcher(self._tokens(), schema_grammar(part), limits=_limits(), log_level=0).get_error()

            from llguidance import LLMatcher

            path = find_path(decode_json(structured.json_schema, field), field, error, compile_alone)
        return f"{path} cannot be made a grammar: {_first_lines(error)}"

    def _keep(self, structured: StructuredOutput, compiled: CompiledGrammar) -> None:
        with self._lock:
            if structured in self._kept:
                return
            self._kept[structured] = compiled
            self._kept_bytes += _size(structured)
            while len(self._kept) > CACHED or self._kept_bytes > CACHED_BYTES:
                dropped, _ = self._kept.popitem(last=False)
                self._kept_bytes -= _size(dropped)

    def _tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._vocabulary_lock:
            if self._vocabulary is None:
                try:
                    self._vocabulary = LLTokenizer(
                        self._definition(), n_vocab=self._vocab_size, eos_token=self._eos_token_id
                    )
                except (ValueError, RuntimeError) as error:
                    raise InvalidRequest(f"structured output cannot use the model's tokenizer: {error}") from error
            return self._vocabulary


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=LEXER_FUEL,
        max_grammar_size=GRAMMAR_SIZE,
        step_lexer_fuel=STEP_FUEL,
        step_max_items=STEP_ITEMS,
        max_lexer_states=LEXER_STATES,
        verbose_errors=False,
    )


def _size(structured: StructuredOutput) -> int:
    texts = getattr(structured, structured.kind)
    if isinstance(texts, bool):
        return 0
    return len(texts) if isinstance(texts, str) else sum(map(len, texts))


def _first_lines(message: str) -> str:
    """The library's message without the grammar that it may repeat."""
    text = " ".join(message.split())
    return text if len(text) <= 300 else f"{text[:300]}..."
