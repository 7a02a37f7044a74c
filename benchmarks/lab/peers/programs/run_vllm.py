"""vLLM's CPU build: run_vllm.py MODEL [ranks=] [max_model_len=] [kv_gib=] [VARIABLE=] [CASE ...]; see program.py.

A VARIABLE in capitals is one of the environment.
"""

from __future__ import annotations

import os
from typing import Any

from program import Engine, Stepping, cores, main


class Vllm:
    """vLLM's own step loop, as its LLM class runs it."""

    def __init__(self, model: str, ranks: int, max_model_len: int) -> None:
        from vllm import LLM

        llm = LLM(
            model=model,
            tensor_parallel_size=ranks,
            dtype="bfloat16",
            max_model_len=max_model_len,
            max_num_seqs=64,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        self._engine: Any = llm.llm_engine

    def add(self, number: int, prompt: list[int], new_tokens: int) -> None:
        """As Stepper's."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)

    def step(self) -> dict[int, list[int]]:
        """As Stepper's."""
        return {int(output.request_id): list(output.outputs[0].token_ids) for output in self._engine.step()}


def make(model: str, options: dict[str, str]) -> Engine:
    """Every core computes: left alone, vLLM keeps one for itself, and on few cores that costs more than it gains."""
    ranks = int(options.get("ranks", "1"))
    mine = cores()
    shares = [mine[rank::ranks] for rank in range(ranks)]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in shares)
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = options.get("kv_gib", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.update({name: value for name, value in options.items() if name.isupper()})
    stepper = Vllm(model, ranks, int(options.get("max_model_len", "2048")))
    import vllm

    return Stepping(stepper, f"vllm {vllm.__version__}")


if __name__ == "__main__":
    main(make)
