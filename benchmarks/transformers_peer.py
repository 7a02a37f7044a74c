"""transformers' `generate` to be measured beside, in a process of its own: neither's threads slow the other's."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from phalanx.engine.errors import EngineStopped


class TransformersPeer:
    """All prompts as one static batch, with torch's own attention (sdpa) and all cores; idle between calls."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder), dtype], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def output_tokens_per_s(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Greedy, end-of-sequence ignored, prompts of equal length. Raises EngineStopped if the peer has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([prompts, new_tokens]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise EngineStopped(f"peer=transformers ended with exit code {self._process.wait()}; its error is above")
        return len(prompts) * new_tokens / float(answer)

    def __enter__(self) -> TransformersPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main(folder: str, dtype: str) -> None:
    """Answer each line of prompts and new tokens with the seconds they took."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    for line in sys.stdin:
        prompts, new_tokens = json.loads(line)
        batch = torch.tensor(prompts)
        started = time.monotonic()
        tokens = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        seconds = time.monotonic() - started
        assert tokens.shape[1] == batch.shape[1] + new_tokens
        print(seconds, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
