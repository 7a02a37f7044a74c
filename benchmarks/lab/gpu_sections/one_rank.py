"""What ranks on several GPUs do with each other, as far as one process can: NCCL and symmetric memory of one rank."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from phalanx import LLM, SamplingParams
from phalanx.engine.config import EngineConfig
from phalanx.engine.engine import Engine
from phalanx.engine.errors import ConfigError
from phalanx.engine.execution.cuda_graphs import CudaRecorder, EagerRecorder, Recorder
from phalanx.engine.protocol.transport import InProcess
from phalanx.parallel.collectives import peer_memory
from phalanx.parallel.collectives.autotune_table import describe
from phalanx.parallel.collectives.base import Collectives
from phalanx.parallel.collectives.process_group import ProcessGroupCollectives
from phalanx.parallel.collectives.symmetric_memory import INNER, UNFUSED, SymmetricMemoryCollectives
from phalanx.parallel.group import Group, _gloo, _group_of, local_group

from .device import best_s, synchronize

TIMEOUT_S = 20.0
REPLAYS = 50
ROWS, COLUMNS = 8, 5120
"""Shapes of the messages: decodes of QwQ-32B."""
PROMPTS = ([5, 6, 7], [9] * 20)
PROBLEM_LENGTH = 600
NO_MEMORY = "there is no symmetric memory: rendezvous says why"


def tried(action: Callable[[], Any]) -> dict[str, Any]:
    """What came of it and in how many seconds, or how it failed."""
    started = time.perf_counter()
    try:
        found = action()
    except Exception as error:  # of any kind: what fails, and how, is the result
        return {"fails": f"{type(error).__name__}: {error}"[:PROBLEM_LENGTH]}
    return {"works": True if found is None else found, "seconds": round(time.perf_counter() - started, 4)}


class OneRank:
    """A process group of this process alone, as a rank of several has it: over NCCL, or on a CPU over gloo."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._group: Group | None = None
        self._recorder: Recorder | None = None

    @property
    def _joined(self) -> Group:
        if self._group is None:
            raise ConfigError("there is no process group: see the section group")
        return self._group

    def group(self) -> dict[str, Any]:
        """Make the group, and let each of its operations run once: NCCL connects with the first."""
        started = time.perf_counter()
        self._group = self._join()
        made = time.perf_counter()

        carrier = self._group.collectives
        ones = torch.ones(ROWS, COLUMNS, device=self._device)
        operations: dict[str, Callable[[], bool]] = {
            "first_all_reduce": lambda: _equal(carrier.all_reduce(ones.clone()), ones),
            "all_reduce": lambda: _equal(carrier.all_reduce(ones.clone()), ones),
            "broadcast": lambda: _equal(carrier.broadcast(ones.clone()), ones),
            "gather": lambda: _equal((carrier.gather(ones.clone()) or [])[0], ones),
            "host_all_reduce": lambda: _equal(self._joined.host.all_reduce(torch.ones(4)), torch.ones(4)),
        }

        return {
            "backend": dist.get_backend(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if self._on_gpu else None,
            "made_s": round(made - started, 3),
            "carrier": type(carrier).__name__,
            "control": type(self._group.control).__name__,
            **{name: tried(operation) for name, operation in operations.items()},
            "barrier": tried(carrier.barrier),
        }

    def graph(self) -> dict[str, Any]:
        """An all-reduce between two other operations, in a CUDA graph of the engine's own kind, replayed."""
        carrier = self._joined.collectives
        self._recorder = _recorder(self._device)
        x = torch.zeros(ROWS, COLUMNS, device=self._device)

        def compute() -> torch.Tensor:
            return carrier.all_reduce(x.add_(1)) * 2

        with torch.inference_mode():
            replay, result = self._recorder.record(compute)
            synchronize(self._device)
            x.zero_()
            for _ in range(REPLAYS):
                replay()
            right = _equal(result, torch.full_like(result, 2.0 * REPLAYS))
            seconds = best_s([replay], self._device, repeats=20)
        return {"right": right, "replays": REPLAYS, "replay_us": round(1e6 * seconds, 2), "kernels": self._seen(replay)}

    def engine(self, folder: Path) -> dict[str, Any]:
        """A small engine over the group, its all-reduces in its graphs: does it choose the tokens of one without?"""
        alone, among = self._generate(folder, local_group(self._device)), self._generate(folder, self._joined)
        return {"equal": alone["tokens"] == among["tokens"], "report": among["report"], "closed_s": among["closed_s"]}

    def teardown(self) -> dict[str, Any]:
        """In the engine's order, graphs before the group; then all of it again, as by the next engine."""
        group = self._joined
        recorder = self._recorder
        result = {"graphs": tried(recorder.close) if recorder else None, "group": tried(group.close)}
        self._group = self._recorder = None
        result["gone"] = not dist.is_initialized()

        def again() -> bool:
            joined = self._join()
            ones = torch.ones(4, device=self._device)
            right = _equal(joined.collectives.all_reduce(ones.clone()), ones)
            joined.close()
            return right

        return {**result, "again": tried(again)}

    def _join(self) -> Group:
        return _group_of(
            join_alone(self._on_gpu),
            self._device,
            1,
            "nccl" if self._on_gpu else "gloo",
            TIMEOUT_S,
            destroy=dist.destroy_process_group,
        )

    def _seen(self, replay: Callable[[], None]) -> list[str] | str:
        """The kernels of one replay: NCCL need not do anything for one rank."""
        if not self._on_gpu:
            return "device=cpu has none"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            replay()
            synchronize(self._device)
        events = profiler.events() or []
        return [event.name[:80] for event in events if event.device_type == torch.autograd.DeviceType.CUDA]

    def _generate(self, folder: Path, group: Group) -> dict[str, Any]:
        link = InProcess()
        config = EngineConfig(
            model=str(folder),
            device=self._device.type,
            dtype="float32",
            load_format="dummy",
            tokenizer="none",
            max_model_len=128,
            max_num_seqs=4,
            kv_memory=2.0**26,
            graphs="all" if self._on_gpu else "none",
        )

        greedy = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        llm = LLM.from_engine(Engine(config, group, link.transport), link)
        try:
            outputs = llm.generate([list(prompt) for prompt in PROMPTS], greedy)
            report = llm.status().report
        finally:
            started = time.perf_counter()
            llm.close()

        closed = round(time.perf_counter() - started, 3)
        return {"tokens": [o.outputs[0].token_ids for o in outputs], "report": report, "closed_s": closed}


class OneMemory:
    """Symmetric memory of one rank, step by step: what works, and what exactly does not."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: Collectives | None = None
        self._memory: peer_memory.PeerMemory | None = None

    def rendezvous(self) -> dict[str, Any]:
        """torch's own parts one by one, then phalanx's connect()."""
        from torch.distributed import _symmetric_memory as symmetric_memory

        group = join_alone(self._device.type == "cuda")
        host = self._host = _gloo(group, TIMEOUT_S)
        result: dict[str, Any] = {
            "identity": tried(lambda: peer_memory.gpu_identity(self._device) > 0),
            "backend": tried(lambda: str(symmetric_memory.get_backend(self._device))),
        }
        kept: list[Any] = []

        def allocate() -> None:
            kept.append(symmetric_memory.empty(3 * peer_memory.CAPACITY, dtype=torch.uint8, device=self._device))

        def meet() -> dict[str, Any]:
            handle = symmetric_memory.rendezvous(kept[0], group)
            kept.append(handle)
            names = ("rank", "world_size", "buffer_size", "signal_pad_size", "multicast_ptr")
            return {name: getattr(handle, name, "missing") for name in names}

        def wait() -> None:
            kept[1].barrier(0, int(1000 * TIMEOUT_S))
            synchronize(self._device)

        def connect() -> list[str]:
            self._memory = peer_memory.connect(group, host, self._device, TIMEOUT_S)
            return list(self._memory.algorithms)

        steps = {"empty": allocate, "rendezvous": meet, "barrier": wait}
        for name, step in steps.items():
            result[name] = tried(step)
            if "fails" in result[name]:
                break
        return {**result, "connect": tried(connect)}

    def sums(self) -> dict[str, Any]:
        """Every way to sum, at once and in a CUDA graph: of one rank the sum is what it was."""
        if self._memory is None:
            return {"skipped": NO_MEMORY}
        memory = self._memory
        x = torch.randn(ROWS, COLUMNS, device=self._device, dtype=torch.bfloat16)
        found: dict[str, Any] = {}
        with torch.inference_mode():
            for name in (*peer_memory.SUMS, peer_memory.FUSED):
                if name not in memory.algorithms:
                    found[name] = "not offered"
                    continue
                run, expected = self._norm(memory, x) if name == peer_memory.FUSED else self._sum(memory, name, x)
                found[name] = {
                    "eager": tried(partial(lambda run, expected: _close(run(), expected), run, expected)),
                    "graph": tried(partial(self._in_graph, run, expected)),
                }
        return found

    def tune(self) -> dict[str, Any]:
        """The tables that a start would measure; then the group is given up."""
        found: dict[str, Any] = {"skipped": NO_MEMORY}
        if self._memory is not None and self._host is not None:
            carrier = ProcessGroupCollectives(dist.group.WORLD, self._device)
            found = {"tables": tried(partial(self._tables, carrier, self._host, self._memory))}
        return {**found, "teardown": tried(dist.destroy_process_group)}

    def _tables(self, carrier: Collectives, host: Collectives, memory: peer_memory.PeerMemory) -> dict[str, str]:
        collectives = SymmetricMemoryCollectives(carrier, host, memory)
        collectives.tune(COLUMNS, torch.bfloat16, 64)
        return {"sums": describe(collectives._sums, INNER), "norms": describe(collectives._norms, UNFUSED)}

    def _sum(
        self, memory: peer_memory.PeerMemory, name: str, x: torch.Tensor
    ) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
        return lambda: memory.sum(name, x.clone()), x

    def _norm(self, memory: peer_memory.PeerMemory, x: torch.Tensor) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
        total = torch.randn(ROWS, COLUMNS, device=self._device)
        weight = torch.ones(COLUMNS, device=self._device)
        expected = torch.nn.functional.rms_norm(total + x.float(), (COLUMNS,), weight, 1e-6).to(x.dtype)
        return lambda: memory.add_norm(x, None, total.clone(), weight, 1e-6, x.dtype), expected

    def _in_graph(self, run: Callable[[], torch.Tensor], expected: torch.Tensor) -> dict[str, Any]:
        recorder = _recorder(self._device)
        try:
            replay, result = recorder.record(run)
            for _ in range(REPLAYS):
                replay()
            right = _close(result, expected)
            seconds = statistics.median(best_s([replay], self._device, repeats=5) for _ in range(3))
            return {"right": right, "replay_us": round(1e6 * seconds, 2)}
        finally:
            recorder.close()


def join_alone(on_gpu: bool) -> dist.ProcessGroup:
    """A default process group of one rank, which meets nobody."""
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    if on_gpu:
        torch.cuda.set_device(0)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    # The kind of store that torchrun gives its ranks.
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timeout)
    dist.init_process_group(backend, rank=0, world_size=1, store=store, timeout=timeout)
    world = dist.group.WORLD
    assert world is not None
    return world


def _recorder(device: torch.device) -> Recorder:
    return CudaRecorder(device) if device.type == "cuda" else EagerRecorder()


def _equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(torch.equal(found, expected))


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0.02))
