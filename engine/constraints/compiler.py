"""Grammars from what requests give: compiled within bounds, on the threads of intake, and kept for the next request."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..errors import InvalidRequest
from ..protocol.structured import StructuredOutput
from .bounded import run_bounded
from .json_schema import decode_json, find_path
from .matcher import Beginning, Matcher
from .sources import grammar_of, schema_grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

INSTALL = "structured output needs the package llguidance: pip install 'llguidance>=1.9'"
CACHED = 128
"""Compiled grammars that are kept, at most."""
CACHED_CPU_S = 2.0
"""Seconds of a processor's time that compiling all that is kept took, at most: what a grammar takes of memory grows
with its own, to about 150 MB for each second."""
EXPLAIN_S = 0.5
"""Seconds of a processor's time that are spent to find which part of a schema is wrong."""
LEXER_FUEL, GRAMMAR_SIZE = 250_000, 200_000
"""Bounds of compiling, in the library's own measures: they keep it below a second and 100 MB."""
STEP_FUEL, STEP_ITEMS, LEXER_STATES = 100_000, 20_000, 50_000
"""Bounds of one mask in the same measures: a grammar that needs more fails its request (see also MASK_CPU_S)."""


@dataclass(eq=False)
class CompiledGrammar:
    """A grammar, and the state in which every answer begins.

    Copies of the state share a lexer: what one answer made it learn, the next one finds there.
    """

    state: LLMatcher
    vocab_size: int
    library_ends: tuple[int, ...]
    compile_again: Callable[[], LLMatcher]
    """Returns the same state, with a lexer that nobody shares."""
    seconds: float
    """A processor's time that compiling it took."""
    spent: bool = False
    """Whether the shared lexer has learned all that it may."""

    def matcher(self, end_token_ids: Sequence[int], beginning: Beginning | None = None) -> Matcher:
        """A matcher for one completion that may end with any of these tokens."""
        shared = self.state.deep_copy()
        return Matcher(shared, self.vocab_size, end_token_ids, self.library_ends, beginning, self._leave)

    def _leave(self, spent: bool) -> LLMatcher:
        self.spent |= spent
        return run_bounded(self.compile_again, "the grammar")


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
            if kept is not None and not kept.spent:
                self._kept.move_to_end(structured)
                return kept
        self.prepare()
        compiled = run_bounded(partial(self._compile, structured), f"structured.{structured.kind}")
        self._keep(structured, compiled)
        return compiled

    def _compile(self, structured: StructuredOutput) -> CompiledGrammar:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise InvalidRequest(INSTALL) from None
        started = time.thread_time()
        grammar = grammar_of(structured)
        tokens = self._tokens()
        compile_again = partial(LLMatcher, tokens, grammar, limits=_limits(), log_level=0)
        state = compile_again()
        if state.is_error():
            raise InvalidRequest(self._explain(structured, state.get_error()))
        warnings = state.get_grammar_warnings()
        if warnings:
            raise InvalidRequest(f"structured.{structured.kind}: {_first_lines(warnings[0])}")

        took = time.thread_time() - started
        compiled = CompiledGrammar(state, self._vocab_size, tuple(tokens.eos_tokens), compile_again, took)
        # What no text matches is refused at once.
        probe = compiled.matcher(())
        words = probe.allowed()
        if (words is None and probe.failure is not None) or (words is not None and not words.any()):
            raise InvalidRequest(f"structured.{structured.kind} is met by no text: {probe.failure or 'it allows none'}")
        return compiled

    def _explain(self, structured: StructuredOutput, error: str) -> str:
        """The library's message, for a schema, also one of a structural tag, with the path of the part it is about."""
        from llguidance import LLMatcher

        path = field = f"structured.{structured.kind}"
        until = time.thread_time() + EXPLAIN_S

        def compile_alone(part: object) -> str:
            if time.thread_time() > until:
                return ""
            return LLMatcher(self._tokens(), schema_grammar(part), limits=_limits(), log_level=0).get_error()

        if structured.json_schema is not None:
            path = find_path(decode_json(structured.json_schema, field), field, error, compile_alone)
        elif structured.structural_tag is not None:
            for index, structure in enumerate(decode_json(structured.structural_tag, field)["structures"]):
                schema = structure.get("schema", {})
                found = compile_alone(schema)
                if found:
                    error = found
                    path = find_path(schema, f"{field}.structures[{index}].schema", error, compile_alone)
                    break
        return f"{path} cannot be made a grammar: {_first_lines(error)}"

    def _keep(self, structured: StructuredOutput, compiled: CompiledGrammar) -> None:
        with self._lock:
            self._kept[structured] = compiled
            self._kept.move_to_end(structured)
            while len(self._kept) > CACHED or sum(kept.seconds for kept in self._kept.values()) > CACHED_CPU_S:
                self._kept.popitem(last=False)

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


def _first_lines(message: str) -> str:
    """The library's message without the grammar that it may repeat."""
    text = " ".join(message.split())
    return text if len(text) <= 300 else f"{text[:300]}..."
