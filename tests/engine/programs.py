"""What the correctness tests run on real ranks; tests/ranks.py calls these functions in processes of their own."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from phalanx.benchmarks.lab.sequence_logits import sequence_logits
from phalanx.engine.client.in_group import GroupLLM
from phalanx.engine.client.requests import RequestOutput
from phalanx.engine.errors import CheckpointError, PhalanxError
from phalanx.engine.execution.rank_worker import LaunchedStep
from phalanx.engine.protocol.messages import Timings
from phalanx.engine.protocol.sampling_params import SamplingParams
from phalanx.engine.scheduling.step_plan import StepPlan
from phalanx.tests.threads import other_cpus

Calls = list[tuple[list[list[int]], list[SamplingParams]]]


def generate_at_each_size(
    rank: int, count: int, folder: str, sizes: list[int], calls: Calls, config: dict[str, Any]
) -> dict[int, list[list[RequestOutput]]]:
    """For each N of `sizes`, an engine on the first N ranks, and what it answers to every call."""
    results = {}
    for size in sizes:
        group = dist.new_group(list(range(size)), backend="gloo")
        if rank < size:
            llm = GroupLLM(group, folder, **config)
            results[size] = [llm.generate(prompts, sampling) for prompts, sampling in calls]
            llm.close()
    return results


def logits_at_each_size(
    rank: int, count: int, folder: str, sizes: list[int], tokens: list[int], chunk: int, config: dict[str, Any]
) -> dict[int, np.ndarray]:
    """For each N, the logits (tokens, vocabulary) of one sequence computed in chunks; whole on rank 0 alone."""
    results = {}
    for size in sizes:
        group = dist.new_group(list(range(size)), backend="gloo")
        if rank < size:
            llm = GroupLLM(group, folder, **config)
            worker, collectives = llm._engine.worker, llm._group.collectives
            shard = sequence_logits(worker, tokens, chunk).T.contiguous()
            # Shards differ in size; pad them to the largest for the gather, and cut the padding off again.
            widths = collectives.gather(torch.tensor([len(shard)]))
            widest = collectives.broadcast(torch.tensor([max(map(int, widths or [0]))]))
            padded = torch.zeros(int(widest), len(tokens))
            padded[: len(shard)] = shard
            gathered = collectives.gather(padded)
            if gathered is not None and widths is not None:
                whole = [part[: int(width)] for part, width in zip(gathered, widths, strict=True)]
                results[size] = torch.cat(whole).T.numpy()
            llm.close()
    return results


def live_in_a_group(rank: int, count: int, folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """A caller's program around an engine: what it got, and what its process and its group were like meanwhile."""
    import rich.style  # noqa: F401  # what others import draws a random number when it is first imported

    seen: dict[str, Any] = {"sums": [_sum(rank)], "before": _process_state()}
    group = dist.group.WORLD
    assert group is not None
    llm = GroupLLM(group, folder, **config)
    greedy = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    seen["binding"] = str(llm._engine.worker.settings.binding)
    seen["outputs"] = llm.generate([[5, 6, 7], [8]], greedy)
    seen["sums"].append(_sum(rank))
    seen["refused"] = _error(lambda: llm.generate([[5], [99999]], greedy))
    seen["mistyped"] = _error(lambda: llm.generate([[5], 7], greedy))
    seen["chat"] = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=8, temperature=1, seed=3))
    seen["again"] = llm.generate([[5, 6, 7], [8]], greedy)
    llm.close()
    llm.close()
    seen["closed"] = _error(lambda: llm.generate([[5]], greedy))
    seen["after"] = _process_state()
    seen["sums"].append(_sum(rank))
    for output in (*seen["outputs"], *seen["again"], seen["chat"]):
        # A request's id and times are its own; the rest is compared.
        output.id, output.timings = "", Timings(0, 0, 0, 0)
    return seen


def fail_in_a_group(rank: int, count: int, folder: str, config: dict[str, Any]) -> list[tuple[str, str]]:
    """What generate raises when every rank's step fails, and what it raises afterwards."""
    group = dist.group.WORLD
    assert group is not None
    llm = GroupLLM(group, folder, **config)

    def broken(plan: StepPlan) -> None:
        raise RuntimeError("a card fell out")

    llm._engine.worker.launch = broken  # type: ignore[method-assign]
    errors = [_error(lambda: llm.generate([[5], [6], [7]])) for _ in range(2)]
    llm.close()
    return errors


def fail_on_rank_0(rank: int, count: int, folder: str, config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """What every rank raises when rank 0 alone meets an error: in its settings, its model, a call, and a step."""
    from phalanx.engine import engine as assembly

    group = dist.group.WORLD
    assert group is not None
    raised = {}
    settings = {**config, "max_num_seqs": 0} if rank == 0 else config
    raised["settings"] = _error(lambda: GroupLLM(group, folder, **settings))

    read = assembly._tokenizer

    def unreadable(*_: object) -> None:
        raise CheckpointError("the tokenizer is damaged")

    assembly._tokenizer = unreadable  # type: ignore[assignment]
    raised["model"] = _error(lambda: GroupLLM(group, folder, **config))
    assembly._tokenizer = read

    llm = GroupLLM(group, folder, **config)
    if llm._llm is not None:
        generate = llm._llm.generate
        llm._llm.generate = _interrupted  # type: ignore[method-assign]
        raised["call"] = _error(lambda: llm.generate([[5]]), KeyboardInterrupt)
        llm._llm.generate = generate  # type: ignore[method-assign]
    else:
        raised["call"] = _error(lambda: llm.generate([[5]]))
    assert llm.generate([[5]], SamplingParams(max_tokens=2, ignore_eos=True))[0].usage.completion_tokens == 2

    if rank == 0:
        llm._engine.worker.launch = _broken  # type: ignore[method-assign]
    raised["step"] = _error(lambda: llm.generate([[5], [6]]))
    raised["afterwards"] = _error(lambda: llm.generate([[5]]))
    llm.close()
    return raised


def report(rank: int, count: int, folder: str, config: dict[str, Any]) -> list[str]:
    """The report of an engine on the ranks' group; nothing from the ranks that have none."""
    group = dist.group.WORLD
    assert group is not None
    llm = GroupLLM(group, folder, **config)
    lines = [] if llm._llm is None else llm._llm.status().report
    llm.close()
    return lines


def out_of_memory(rank: int, count: int, folder: str, config: dict[str, Any], broken: int) -> tuple[str, str]:
    """What every rank raises once the kernels' scratch memory cannot be had on rank `broken`."""
    from phalanx.engine.models.decoder import CausalLM

    group = dist.group.WORLD
    assert group is not None
    llm = GroupLLM(group, folder, **config)
    if rank == broken:
        CausalLM.forward = no_memory  # type: ignore[method-assign]
    raised = _error(lambda: llm.generate([[5], [6]]))
    llm.close()
    return raised


def no_memory(*_: object, **__: object) -> torch.Tensor:
    """Stands for a kernel whose threads get no memory."""
    raise MemoryError("the CPU kernels cannot allocate 40 bytes of scratch memory")


def _interrupted(*_: object) -> list[RequestOutput]:
    raise KeyboardInterrupt("Ctrl-C")


def _broken(plan: StepPlan) -> LaunchedStep:
    raise RuntimeError("a card fell out")


def _error(call: Callable[[], Any], expected: type[BaseException] = PhalanxError) -> tuple[str, str]:
    try:
        call()
    except expected as error:
        return type(error).__name__, str(error)
    return "", ""


def _sum(rank: int) -> float:
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    return float(total)


def _process_state() -> list[Any]:
    handlers = [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    python, numbers = hash(random.getstate()), np.random.get_state()
    generators = [python, torch.random.get_rng_state().tolist(), [str(part) for part in numbers]]
    return [handlers, generators, torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ), other_cpus()]


def generate_with_lazy_graphs(
    rank: int, count: int, folder: str, calls: Calls, config: dict[str, Any]
) -> tuple[list[list[RequestOutput]], list[int]]:
    """What ranks answer on the GPU's path, run by Triton's interpreter, and the sizes they captured while serving."""
    from phalanx.engine.coordinator import coordinator
    from phalanx.engine.execution import resolved_settings, worker_factory
    from phalanx.engine.execution.cuda_graphs import EagerRecorder
    from phalanx.engine.execution.rank_worker import Worker
    from phalanx.kernels import cpu, cuda

    cpu.native = None
    cuda.interpret(True)
    captured = []
    capture = Worker.capture

    def counted(self: Worker, rows: int) -> None:
        captured.append(rows)
        capture(self, rows)

    resolved_settings.choose_graphs = lambda *args, **facts: ("lazy", "")  # type: ignore[assignment]
    worker_factory.CudaRecorder = lambda device: EagerRecorder()  # type: ignore[assignment,misc]
    Worker.capture = counted  # type: ignore[method-assign]
    coordinator.CAPTURE_EVERY = 2
    answers = generate_at_each_size(rank, count, folder, [count], calls, config)[count]
    return answers, captured
