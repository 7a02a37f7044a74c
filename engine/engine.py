"""Puts one rank's engine together: the model and its worker everywhere, the coordinator on rank 0."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from ..kernels.torch_threads import one_torch_thread
from ..parallel.collectives.base import Collectives
from ..parallel.collectives.rendezvous import all_gather_ints, all_gather_texts
from ..parallel.group import Group
from ..parallel.loading.checkpoint import LoadReport, Progress
from ..parallel.loading.safetensors_files import ADAPTER, MERGE, name_some
from ..parallel.topology.topology import format_cpu_list
from .config import EngineConfig
from .coordinator.coordinator import Coordinator
from .coordinator.input_processor import InputProcessor
from .coordinator.tokenizer import Tokenizer, read_generation_config
from .errors import ERRORS_BY_NAME, CheckpointError, ConfigError, EngineStopped
from .execution.cpu_binding import Binding
from .execution.heartbeat import Heartbeat
from .execution.worker_factory import build_worker
from .models.hub import resolve_model
from .models.resolve import resolve_max_model_len
from .models.spec import ModelSpec, check_transformers, read_config, spec_from_config, window_words
from .models.stored import has_own_head, read_stored
from .protocol.messages import ModelInfo
from .protocol.transport import Transport, ZmqTransport
from .scheduling.scheduler import Scheduler

T = TypeVar("T")
_log = logging.getLogger(__name__)
TOKENIZER_STORE = "~/.cache/phalanx/tokenizers"
"""The folder that tokenizer_store=auto means."""


class Engine:
    """One rank of an engine. Every rank of the group makes one at the same time; rank 0 gives a transport.

    A process that is this rank's alone gives its `binding` (engine/execution/cpu_binding.py), and one that somebody
    supervises a `heartbeat`, and memory in which the weights outlive the process (build_worker()).
    """

    def __init__(
        self,
        config: EngineConfig,
        group: Group,
        transport: Transport | None,
        on_progress: Progress | None = None,
        binding: Binding | None = None,
        heartbeat: Heartbeat | None = None,
        kept_memory: int | None = None,
    ) -> None:
        self.config = config
        self.group = group
        heartbeat = heartbeat or Heartbeat()
        heartbeat.shares(group.collectives.segment)
        heartbeat.phase("reading")
        folder = resolve_model(config.model, weights=config.load_format != "dummy")
        spec = spec_from_config(read_config(folder), str(folder))
        self._untied = config.load_format != "dummy" and has_own_head(spec, read_stored(spec, folder))
        self._adapter = (folder / ADAPTER).is_file()
        if self._untied:
            spec = dataclasses.replace(spec, tied_embeddings=False)

        # What rank 0 alone reads is read before the weights, and refused on every rank: none waits for one that left.
        tokenizer, inputs = raise_on_all(group.host, lambda: _inputs(config, folder, spec, transport)) or (None, None)
        self.worker = build_worker(config, spec, folder, group, on_progress, binding, kept_memory, heartbeat)
        self.worker.heartbeat = heartbeat

        # What each rank chose, for rank 0's report.
        self._threads = [threads for [threads] in all_gather_ints(group.host, [self.worker.settings.binding.threads])]
        self._bindings = all_gather_texts(group.host, str(self.worker.settings.binding))

        self.coordinator: Coordinator | None = None
        if group.rank == 0:
            assert transport is not None
            assert inputs is not None
            self.coordinator = self._coordinator(spec, tokenizer, inputs, transport)
        heartbeat.phase("waiting")

    def run(self, payload: Callable[[], bytes] = lambda: b"") -> bytes:
        """Run steps until the engine is stopped, and return the stop's payload. Rank 0's must have been started."""
        if self.group.device.type == "cuda":
            torch.cuda.set_device(self.group.device)  # each thread has its own current device
        with self._computing():
            if self.coordinator is None:
                return self.worker.follow_plans(self.group.control)
            self.coordinator.run(payload)
            return b""

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Set the calling thread up to run the steps.

        It is bound to a single CPU, which torch's own threads would inherit. So without phalanx's kernels, which do not
        need torch's threads, it stays unbound.
        """
        if not self.worker.settings.uses_kernels:
            yield
            return
        with one_torch_thread(), self.worker.settings.binding.of_steps():
            yield

    def close(self) -> None:
        """Deliver what is due, and give up what holds on to the group: after run(), and before that is closed."""
        if self.coordinator is not None:
            self.coordinator.close()
        self.worker.close()

    def _coordinator(
        self, spec: ModelSpec, tokenizer: Tokenizer | None, input_processor: InputProcessor, transport: Transport
    ) -> Coordinator:
        config = self.config
        capacity = self.worker.capacity
        scheduler = Scheduler(
            num_blocks=capacity.num_blocks,
            block_size=capacity.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=capacity.max_model_len,
            max_queue=config.max_queue,
            # With dynamic scaling a token's keys depend on its sequence's length: they are nobody else's.
            prefix_cache=config.prefix_cache and spec.rope.kind != "dynamic",
        )

        info = ModelInfo(
            version=str(sys.modules[__name__.partition(".")[0]].__version__),
            model=config.model,
            dtype=str(self.worker.settings.dtype).removeprefix("torch."),
            ranks=self.group.size,
            max_model_len=capacity.max_model_len,
            max_num_seqs=config.max_num_seqs,
            block_size=capacity.block_size,
            total_blocks=scheduler.total_blocks,
            vocab_size=spec.vocab_size,
            eos_token_ids=list(input_processor.eos_token_ids),
            tokenizer_class=tokenizer.kind if tokenizer else None,
            chat_template=tokenizer.chat_template if tokenizer else None,
            prefix_cache=scheduler.prefix_cache,
            report=[*self._report(), *self._surprises(spec), input_processor.defaults_report],
            sampling_defaults=input_processor.server_defaults,
        )
        return Coordinator(
            worker=self.worker,
            scheduler=scheduler,
            input_processor=input_processor,
            tokenizer=tokenizer,
            control=self.group.control,
            transport=transport,
            info=info,
            heartbeat_s=config.timeout_s / 4,
            rank_waits=lambda: self.group.collectives.waited_s,
        )

    def _surprises(self, spec: ModelSpec) -> list[str]:
        """Report lines on what the engine does otherwise than config.json says."""
        untied = "the checkpoint's lm_head is not its embeddings: it is used, although tie_word_embeddings is true"
        computed = str(self.worker.settings.dtype).removeprefix("torch.")
        other_dtype = (
            f"the checkpoint is in {spec.dtype}, but computed with in {computed}, as dtype={self.config.dtype} has it "
            f"on this device; dtype=float32 loses nothing"
        )
        left_out = self.worker.load_report.left_out
        no_place = (
            f"{spec.architecture} of {spec.num_layers} layers has no place for tensors of the checkpoint: "
            f"{name_some(left_out)} left out"
        )
        surprises = {
            no_place: bool(left_out),
            f"the model's folder holds an adapter ({ADAPTER}), which is left out: {MERGE}": self._adapter,
            untied: self._untied,
            other_dtype: computed not in (spec.dtype, "float32"),
            window_words(spec): bool(window_words(spec)),
        }
        return [words for words, holds in surprises.items() if holds]

    def _report(self) -> list[str]:
        group = self.group
        settings = self.worker.settings
        capacity = self.worker.capacity
        loaded = self.worker.load_report
        threads = sorted({min(self._threads), max(self._threads)})
        return [
            f"{group.size} rank(s) on {group.device.type}, {' to '.join(map(str, threads))} thread(s) each, "
            f"{settings.dtype}, attention={settings.backend.name}",
            settings.backend.reason,
            f"{settings.graphs_reason}; steps overlap: {'yes' if settings.overlap else 'no'}",
            _of_ranks(self._bindings),
            *filter(None, [group.words]),
            _loading(loaded),
            f"KV cache: {capacity.num_blocks * capacity.block_size:,} tokens in blocks of {capacity.block_size}, "
            f"max_model_len={capacity.max_model_len}",
        ]


class EngineThread:
    """Runs rank 0's step loop on a thread; calls `on_stopped` with the error if one ends it."""

    def __init__(
        self,
        engine: Engine,
        on_stopped: Callable[[BaseException], None],
        payload: Callable[[], bytes] = lambda: b"",
    ) -> None:
        self._engine = engine
        self._on_stopped = on_stopped
        self._payload = payload
        self._thread = threading.Thread(target=self._run, name="phalanx-steps", daemon=True)
        self._thread.start()

    def stop(self) -> bool:
        """End the loop after the step under way, and wait for it, for the configuration's timeout_s at most.

        Returns whether it has ended: a step that hangs is left behind with the memory that it may be using.
        """
        assert self._engine.coordinator is not None
        self._engine.coordinator.stop()
        timeout_s = self._engine.config.timeout_s
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _log.error("a step has not ended within timeout_s=%g s; it is left behind with its memory", timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._engine.run(self._payload)
        except BaseException as error:
            # Whatever ends this thread, be it SystemExit, nobody may wait for it any longer.
            self._on_stopped(error)


def run_rank(
    config: EngineConfig,
    group: Group,
    address: str | None,
    binding: Binding,
    on_progress: Progress | None = None,
    on_ready: Callable[[Engine], None] | None = None,
    secret: bytes | None = None,
    heartbeat: Heartbeat | None = None,
    kept_memory: int | None = None,
) -> None:
    """Run a rank in a process of its own, from start to end; rank 0 serves clients over ZeroMQ at `address`.

    Over tcp:// clients need the `secret`. `binding` is what bind_process() returned; it was called before the group was
    joined, so that the group's memory lies on the right NUMA node. Blocks until a client or a signal handler (through
    on_ready's engine) ends the group.
    """
    transport = ZmqTransport(address, secret) if group.rank == 0 and address is not None else None
    try:
        engine = Engine(config, group, transport, on_progress, binding, heartbeat, kept_memory)
    except BaseException:
        if transport is not None:
            transport.close()
        raise

    if engine.coordinator is not None:
        engine.coordinator.start()
    if on_ready is not None:
        on_ready(engine)

    try:
        engine.run()
    finally:
        engine.close()


def device_type(config: EngineConfig) -> str:
    """Return "cpu" or "cuda" for the setting `device`. Raises ConfigError if it asks for a GPU and there is none."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch finds no GPU here: set device=cpu, or install a CUDA build of torch")
    return config.device


def _loading(loaded: LoadReport) -> str:
    if loaded.kept_bytes:
        return f"weights: {loaded.kept_bytes / 1e9:.2f} GB a rank, kept from before the restart"
    return f"loaded {loaded.bytes_read / 1e9:.2f} GB a rank in {loaded.seconds:.1f} s"


def _of_ranks(texts: list[str]) -> str:
    """Join the ranks' texts, each text once, with the ranks that have it."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(rank)
    return "; ".join(f"rank {format_cpu_list(of)}: {text}" for text, of in ranks.items())


def raise_on_all(host: Collectives, action: Callable[[], T]) -> T | None:
    """Return what `action` returns on rank 0, and None on the others; an error of rank 0 is raised on every rank."""
    result: T | None = None
    raised: Exception | None = None
    if host.rank == 0:
        try:
            result = action()
        except Exception as error:
            raised = error

    if host.size > 1:
        failure = "" if raised is None else f"{type(raised).__name__}\n{raised}"
        name, _, message = all_gather_texts(host, failure)[0].partition("\n")
        if name and raised is None:
            kind = ERRORS_BY_NAME.get(name)
            raise EngineStopped(f"rank 0 failed: {name}: {message}") if kind is None else kind(message)
    if raised is not None:
        raise raised
    return result


def _inputs(
    config: EngineConfig, folder: Path, spec: ModelSpec, transport: Transport | None
) -> tuple[Tokenizer | None, InputProcessor]:
    """Return what rank 0, the one with a transport, makes requests of text with."""
    assert transport is not None
    tokenizer = _tokenizer(config, folder, spec)
    defaults = read_generation_config(folder)
    keeps_priorities = {"always": True, "never": False}.get(config.client_priorities, transport.is_local)
    limit = resolve_max_model_len(config, spec)
    return tokenizer, InputProcessor(config, spec, tokenizer, defaults, limit, keeps_priorities)


def _tokenizer(config: EngineConfig, folder: Path, spec: ModelSpec) -> Tokenizer | None:
    if config.tokenizer == "none":
        return None
    check_transformers(spec, importlib.metadata.version("transformers"))
    store = TOKENIZER_STORE if config.tokenizer_store == "auto" else config.tokenizer_store
    try:
        return Tokenizer(
            resolve_model(config.tokenizer, weights=False) if config.tokenizer else folder,
            None if store == "none" else Path(os.path.expanduser(store)),
        )
    except CheckpointError:
        # Dummy weights are for measuring: token ids are enough, and the folder may hold config.json alone.
        if config.load_format == "dummy" and config.tokenizer is None:
            return None
        raise
