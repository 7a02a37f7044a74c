"""llama.cpp, its C functions as llama-cpp-python binds them: run_llamacpp.py FILE.gguf [threads=] [ubatch=] [CASE ...]

See program.py. Requests are batched continuously, as llama.cpp's own server does it. AMX multiplies q8_0 alone, where
llama.cpp was compiled for it, as its version says.
"""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass, field
from importlib.metadata import version

import llama_cpp as lib
import numpy as np
from program import Engine, Stepping, cores, main

SEQUENCES = 64
BATCH_TOKENS = 2048


@dataclass
class Sequence:
    """A request: the tokens that are not yet computed, and how many more are wanted."""

    left: deque[int]
    wanted: int
    slot: int
    position: int = 0
    rows: list[int] = field(default_factory=list)  # of the batch, whose logits it needs


class LlamaCpp:
    """A step computes one token of each sequence that decodes, and as many of the prompts as the batch has room for."""

    def __init__(self, path: str, threads: int, context: int, ubatch: int) -> None:
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx = context
        params.n_seq_max = SEQUENCES
        params.kv_unified = True
        params.n_batch, params.n_ubatch = BATCH_TOKENS, ubatch
        params.n_threads = params.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, params)
        self._memory = lib.llama_get_memory(self._context)
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch = lib.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._sequences: dict[int, Sequence] = {}
        self._slots = list(range(SEQUENCES))

    def add(self, number: int, prompt: list[int], new_tokens: int) -> None:
        """As Stepper's."""
        self._sequences[number] = Sequence(deque(prompt), new_tokens, self._slots.pop())

    def step(self) -> dict[int, list[int]]:
        """As Stepper's."""
        self._batch.n_tokens = 0
        # Those that decode first: their one token is never kept waiting by a prompt.
        for _, sequence in sorted(self._sequences.items(), key=lambda item: (len(item[1].left) > 1, item[0])):
            self._fill(sequence)
        code = lib.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        return {
            number: [self._sample(number, sequence)]
            for number, sequence in list(self._sequences.items())
            if sequence.rows
        }

    def _fill(self, sequence: Sequence) -> None:
        sequence.rows = []
        batch = self._batch
        while sequence.left and batch.n_tokens < BATCH_TOKENS:
            row = batch.n_tokens
            batch.token[row] = sequence.left.popleft()
            batch.pos[row] = sequence.position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence.slot
            batch.logits[row] = not sequence.left
            if not sequence.left:
                sequence.rows.append(row)
            sequence.position += 1
            batch.n_tokens += 1

    def _sample(self, number: int, sequence: Sequence) -> int:
        logits = lib.llama_get_logits_ith(self._context, sequence.rows[0])
        address = ctypes.addressof(logits.contents)
        row = np.ctypeslib.as_array((ctypes.c_float * self._vocab_size).from_address(address))
        token = int(row.argmax())
        sequence.left.append(token)
        sequence.wanted -= 1
        if not sequence.wanted:
            lib.llama_memory_seq_rm(self._memory, sequence.slot, -1, -1)
            self._slots.append(sequence.slot)
            del self._sequences[number]
        return token


def make(model: str, options: dict[str, str]) -> Engine:
    """A context on all cores of this process."""
    threads = int(options.get("threads", len(cores())))
    stepper = LlamaCpp(model, threads, int(options.get("context", "32768")), int(options.get("ubatch", "512")))
    amx = " with AMX" if b"AMX_INT8 = 1" in lib.llama_print_system_info() else ""
    return Stepping(stepper, f"llama-cpp-python {version('llama-cpp-python')}{amx}")


if __name__ == "__main__":
    main(make)
