"""What is asked of a GPU for the next token waits for nothing: told by the operations, the same as on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from phalanx.engine.sampling import penalties, token_counts, truncation
from phalanx.engine.sampling.penalties import SampleRow
from phalanx.engine.sampling.sampler import Sampler
from phalanx.engine.sampling.token_counts import TokenCounts
from phalanx.engine.scheduling.step_plan import SlotSampling, SlotStart
from phalanx.kernels import cpu
from phalanx.kernels.host_copies import TORCH_DTYPES, copy_together
from phalanx.parallel.collectives.local import LocalCollectives
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
VOCABULARY = 3000
BRINGS_HOME = {"item", "tolist", "cpu", "nonzero", "unique", "__int__", "__bool__", "__float__", "__index__"}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "noisy": {"temperature": 0.8},
    "narrow": {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "penalized": {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    "biased": {"bias_token_ids": (4, 7), "bias_values": (3.0, -3.0), "min_tokens": 9, "end_token_ids": (8, 11)},
}


class Watched(TorchFunctionMode):
    """Raises AssertionError at operations that would make the host wait for a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = getattr(func, "__name__", ""), kwargs or {}
        assert name not in BRINGS_HOME, f"{name} brings a value to the host"
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list | np.ndarray) for part in index), f"{name} copies a list to the device"
            masks = [part for part in index if isinstance(part, torch.Tensor) and part.dtype == torch.bool]
            assert not masks, f"{name} by a mask counts it"
        moves = any(isinstance(part, torch.device | str) for part in (*args[1:], *given.values()))
        assert name != "to" or not moves or given.get("non_blocking"), "a copy from ordinary memory waits"
        assert func is not torch.tensor, "torch.tensor copies from ordinary memory"
        return func(*args, **given)


@pytest.mark.parametrize("kinds", [*KINDS, "all"])
def test_choosing_tokens_waits_for_nothing(kinds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "native", None)
    for module in (token_counts, penalties, truncation):
        monkeypatch.setattr(module, "to_device", copy_together)
    counts = TokenCounts(8, range(VOCABULARY), CPU)
    chooser = Sampler(LocalCollectives(CPU), range(VOCABULARY), VOCABULARY, token_counts=counts)
    samplings = [
        SlotSampling(**kind, seed=i) for i, (name, kind) in enumerate(KINDS.items()) if kinds in (name, "all")
    ] * (1 if kinds == "all" else 3)
    rows = []
    for slot, sampling in enumerate(samplings):
        counts.start(SlotStart(slot, 3, [3, 5, 5, 9], sampling))
        rows.append(SampleRow(sampling, np.array([3, 5, 5, 9], dtype=np.int32), 3, 4, slot))
    logits = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(0))
    slots = torch.arange(len(rows))
    expected = chooser.choose(logits.clone(), rows)[0].tolist()
    with Watched():
        tokens, logprobs = chooser.choose(logits.clone(), rows)
        counts.add(slots, tokens)
    assert tokens.tolist() == expected
    assert logprobs == [None] * len(rows)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[[0, 2]],
        lambda x: x.__setitem__([0, 2], 1.0),
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: int(x[0]),
        lambda x: x.to("cpu"),
        lambda x: x.nonzero(),
    ],
)
def test_waiting_is_noticed(wait: Any) -> None:
    with Watched(), pytest.raises(AssertionError):
        wait(torch.ones(3))


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_copied_arrays_are_what_they_were(dtype: str) -> None:
    arrays = [np.arange(6).reshape(2, 3).astype(dtype), np.zeros((0, 4), dtype=dtype), np.ones(1, dtype=dtype)]
    for array, tensor in zip(arrays, copy_together(arrays, CPU), strict=True):
        assert tensor.dtype == TORCH_DTYPES[dtype]
        assert np.array_equal(tensor.numpy(), array)
