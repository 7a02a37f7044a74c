"""Where a rank's threads run: on CPUs of their own, whose NUMA node holds the rank's memory, or where the system says.

Linux puts a page on the NUMA node of the thread that first touches it. So a process is bound before it allocates, and
its weights, its KV cache and its part of shared memory then stand on its own node, or on another one when that is full:
no memory policy is set. A rank that spans several nodes needs none either. Its threads pack weights, divided as they
are divided when multiplied, so each thread first touches what it later reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...kernels import cpu
from ...parallel.topology.placement import Placement, place
from ...parallel.topology.topology import SYSFS, format_cpu_list, read_topology
from ..config import EngineConfig
from ..errors import ConfigError

_log = logging.getLogger("phalanx")


@dataclass(frozen=True)
class Binding:
    """The CPUs of one rank."""

    threads: int
    """That compute."""
    placement: Placement | None
    """None: they run where the system puts them."""
    note: str = ""
    """Why they are not bound, or what could not be read of this host."""
    whole_process: bool = False
    """The process is this rank's alone: all its threads are bound, and the one that runs the steps to one CPU."""

    def __str__(self) -> str:
        if self.placement is None:
            return f"{self.threads} thread(s), not bound to CPUs: {self.note}"
        return f"{self.placement}{f' ({self.note})' if self.note else ''}"

    @contextlib.contextmanager
    def of_steps(self) -> Iterator[None]:
        """Keep the calling thread, which runs the steps, on the first CPU: if the process is this rank's alone."""
        if self.placement is None or not self.whole_process:
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self.placement.cpus[0]})
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


def choose_binding(
    config: EngineConfig,
    device: str,
    local_rank: int,
    local_size: int,
    allowed: Collection[int] | None = None,
    sysfs: Path = SYSFS,
) -> Binding:
    """The binding of rank `local_rank` of the `local_size` on this host, of the settings bind_cpus and threads.

    `allowed` are the CPUs that all of these ranks may use; None asks the system. Binds nothing.
    Raises ConfigError for bind_cpus=always with ranks on GPUs.
    """
    topology = read_topology(os.sched_getaffinity(0) if allowed is None else allowed, sysfs)
    threads = config.threads or max(1, topology.cores // local_size)
    if device == "cuda":
        if config.bind_cpus == "always":
            raise ConfigError("bind_cpus=always is for ranks on CPUs; with device=cuda set bind_cpus=auto or never")
        return Binding(threads, None, "the ranks compute on GPUs")

    if config.bind_cpus == "never":
        return Binding(threads, None, "bind_cpus=never")
    if config.bind_cpus == "auto" and topology.nodes_with_cpus == 1:
        return Binding(threads, None, topology.problem or "bind_cpus=auto, and their CPUs are of one NUMA node")

    if topology.problem and local_rank == 0:
        _log.warning("bind_cpus=%s: %s", config.bind_cpus, topology.problem)
    placement = place(topology, local_rank, local_size, config.threads or None)
    return Binding(len(placement.cpus), placement, topology.problem)


def bind_process(config: EngineConfig, device: str, local_rank: int, local_size: int) -> Binding:
    """Bind this process, which is one rank's alone, as choose_binding says: before it allocates what is large.

    Raises ConfigError if bind_cpus=always cannot be had.
    """
    binding = dataclasses.replace(choose_binding(config, device, local_rank, local_size), whole_process=True)
    if binding.placement is not None:
        try:
            _bind_threads(binding.placement.share)
        except OSError as error:
            binding = _unbound(config, binding, str(error))
    torch.set_num_threads(binding.threads)
    return binding


def start_threads(config: EngineConfig, binding: Binding, uses_kernels: bool) -> Binding:
    """Have the kernels' threads run as `binding` says. Returns it, or what it came to.

    The calling thread and the caller's others stay as they are. Raises ConfigError if bind_cpus=always cannot be had.
    """
    if binding.placement is not None and not binding.whole_process and not uses_kernels:
        # torch's threads belong to whoever owns the process.
        binding = _unbound(config, binding, "phalanx's C++ kernels lack this dtype, or are not built")
    try:
        cpu.set_threads(binding.threads, binding.placement.cpus if binding.placement else ())
    except OSError as error:
        binding = _unbound(config, binding, str(error))
    return binding


def _bind_threads(cpus: Collection[int]) -> None:
    """Every thread of this process, the calling one first: those that it starts from now on are born so."""
    os.sched_setaffinity(0, cpus)
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cpus)


def _unbound(config: EngineConfig, binding: Binding, why: str) -> Binding:
    assert binding.placement is not None
    message = f"threads cannot be bound to CPUs {format_cpu_list(binding.placement.cpus)}: {why}"
    if config.bind_cpus == "always":
        raise ConfigError(f"bind_cpus=always, but {message}; set bind_cpus=auto or never")
    _log.warning("%s", message)
    return dataclasses.replace(binding, placement=None, note=why)
