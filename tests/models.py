"""The models the tests run, and what transformers says of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models" / "smollm2-135m"

TINY_SHAPE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1031,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 258,
}
"""A Qwen2 of 2 layers, for what is not about the model: its steps take about a millisecond."""

TEXTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n",
    "Water boils at",
    "List three colours: red,",
    "In 1969, the first humans to",
    "Q: What is 17 + 25?\nA:",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "A",
    "She opened the letter and read it aloud:",
    "import numpy as np\n\n" * 9,
    "To be, or not to be, that is the question: " * 5,
    "The three laws of thermodynamics state that",
    "Dear Sir or Madam,",
    "1, 1, 2, 3, 5, 8,",
    "Once more: the sea, the sea, the sea, " * 20,
)


def require_smollm2() -> Path:
    """The demo model's folder; `make test` makes it."""
    if not (SMOLLM2 / "model.safetensors").exists():
        raise FileNotFoundError(
            f"{SMOLLM2} is missing: run `python -m phalanx.launch.get_model demo`, as `make test` does"
        )
    return SMOLLM2


@dataclass(frozen=True)
class Scored:
    """transformers' view of one sequence: logits (tokens, vocabulary) at every position, in its own dtype."""

    logits: torch.Tensor

    def greedy(self, prompt_length: int) -> list[int]:
        """The token transformers would choose after each prefix that begins with the prompt."""
        return self.logits[prompt_length - 1 : -1].argmax(-1).tolist()

    def margin(self, prompt_length: int) -> float:
        """How far the logits of those choices are above the next largest, at least."""
        first, second = self.logits[prompt_length - 1 : -1].topk(2).values.unbind(-1)
        return float((first - second).min())

    def logprobs(self) -> torch.Tensor:
        """Log-probabilities (tokens, vocabulary) of each next token."""
        return self.logits.log_softmax(-1)


@functools.lru_cache(maxsize=2)
def reference_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model of a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


class _KeepFloat64(TorchFunctionMode):
    """Ignore requests to make float64 tensors float32: transformers' norms and softmaxes ask for that in every dtype.

    The angles of RoPE are float32 in every dtype too. They stay so: they define the model.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            args = tuple(_not_float32(value) for value in args)
            kwargs = {name: _not_float32(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)


def _not_float32(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def score(folder: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> Scored:
    """Run transformers once over `tokens`. In float64 it is the truth: nothing but the angles of RoPE is float32."""
    with torch.inference_mode(), _KeepFloat64():
        return Scored(reference_model(folder, dtype)(torch.tensor([tokens])).logits[0])
