"""Which attention backend is chosen, for any settings, device and outcome of trials, and what is said about it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from phalanx.engine.config import ATTENTION_BACKENDS
from phalanx.kernels import backend_selector, cpu, cuda
from phalanx.kernels.attention import AttentionBackend
from phalanx.kernels.backend_selector import DeviceFacts, choose_backend, probe, select
from phalanx.tests.kernels.cuda import flash_attn_stubs as stubs

CPU = torch.device("cpu")
H100 = DeviceFacts("cuda", (9, 0), torch.bfloat16, 128, triton=True)
MISSING = "ModuleNotFoundError: No module named 'it'"
WORKS = {"flash_attn_3": None, "flash_attn_2": None, "triton": None}
CHOICES = [
    # capability, dtype, what fails its trial, block_size; prompts, decodes, block_size
    ((9, 0), "bfloat16", (), None, ("flash_attn_3", "triton", 128)),
    ((9, 0), "float16", (), 256, ("flash_attn_3", "triton", 256)),
    ((9, 0), "bfloat16", (), 16, ("triton", "triton", 16)),
    ((9, 0), "bfloat16", ("flash_attn_3",), None, ("flash_attn_2", "triton", 256)),
    ((9, 0), "bfloat16", ("flash_attn_3",), 512, ("flash_attn_2", "triton", 512)),
    ((9, 0), "bfloat16", ("flash_attn_3",), 128, ("triton", "triton", 128)),
    ((9, 0), "bfloat16", ("flash_attn_3", "flash_attn_2"), None, ("triton", "triton", 128)),
    ((9, 0), "bfloat16", ("flash_attn_3", "triton"), None, ("flash_attn_2", "flash_attn_2", 256)),
    ((9, 0), "bfloat16", ("flash_attn_3", "flash_attn_2", "triton"), None, ("torch", "torch", 16)),
    ((9, 0), "float32", (), None, ("triton", "triton", 128)),
    ((9, 0), "float32", ("triton",), None, ("torch", "torch", 16)),
    ((8, 0), "bfloat16", (), None, ("flash_attn_2", "triton", 256)),
    ((8, 0), "bfloat16", (), 64, ("triton", "triton", 64)),
    ((8, 0), "bfloat16", (), 768, ("flash_attn_2", "flash_attn_2", 768)),
    ((8, 0), "bfloat16", (), 48, ("torch", "torch", 48)),
    ((10, 0), "bfloat16", (), None, ("flash_attn_2", "triton", 256)),
    ((10, 0), "bfloat16", ("flash_attn_2",), None, ("triton", "triton", 128)),
    ((7, 5), "float16", (), None, ("triton", "triton", 128)),
]


@pytest.mark.parametrize(("capability", "dtype", "failing", "block_size", "chosen"), CHOICES)
def test_auto_takes_the_best_that_can_serve_prompts_and_decodes_from_one_pool(
    capability: tuple[int, int],
    dtype: str,
    failing: tuple[str, ...],
    block_size: int | None,
    chosen: tuple[str, str, int],
) -> None:
    facts = DeviceFacts("cuda", capability, getattr(torch, dtype), 128, triton=True)
    selection = select("auto", facts, {**WORKS, **dict.fromkeys(failing, MISSING)}, block_size)
    assert (selection.prefill, selection.decode, selection.block_size) == chosen
    for name in {selection.prefill, selection.decode}:
        assert selection.block_size % backend_selector.BACKENDS[name].block_multiple == 0


@pytest.mark.parametrize("probes", [WORKS, dict.fromkeys(WORKS, MISSING)], ids=["all work", "none works"])
@pytest.mark.parametrize("name", ["triton", "flash_attn_2", "flash_attn_3"])
def test_a_backend_that_was_asked_for_computes_all_or_is_refused_with_the_trials_words(
    name: str, probes: dict[str, str | None]
) -> None:
    if probes[name] is None:
        selection = select(name, H100, probes, None)
        assert selection.prefill == selection.decode == name
        assert selection.block_size == backend_selector.BACKENDS[name].default_block_size
    else:
        with pytest.raises(ValueError, match=f"attention={name} cannot serve here: .*'it'; set attention=auto"):
            select(name, H100, probes, None)


@pytest.mark.parametrize(
    ("name", "block_size", "message"),
    [
        ("flash_attn_2", 16, "block_size=16 must be a multiple of 256; set block_size=256, or attention=auto"),
        ("flash_attn_2", 384, "block_size=384 must be a multiple of 256; set block_size=512, or attention=auto"),
        ("flash_attn_3", 192, "block_size=192 must be a multiple of 128; set block_size=256, or attention=auto"),
        ("triton", 8, "block_size=8 must be a multiple of 16; set block_size=16, or attention=auto"),
        ("triton", 48, "block_size=48 must be a power of two; set block_size=64, or attention=auto"),
    ],
)
def test_a_block_size_that_does_not_fit_is_refused_with_one_that_does(name: str, block_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"attention={name} cannot serve here: {message}"):
        select(name, H100, WORKS, block_size)
    fitting = int(message.partition("set block_size=")[2].partition(",")[0])
    assert select(name, H100, WORKS, fitting).block_size == fitting


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("flash_attn_3", {"capability": (8, 0)}, "it needs sm_90 .*, here is sm_80; set attention=auto"),
        ("flash_attn_3", {"capability": (10, 0)}, "it needs sm_90 .*, here is sm_100"),
        ("flash_attn_2", {"capability": (7, 5)}, "it needs sm_80 or newer, here is sm_75"),
        ("flash_attn_2", {"dtype": torch.float32}, "torch.float32; set dtype=bfloat16, or attention=auto"),
        ("flash_attn_3", {"head_dim": 20}, "heads of 20 are no multiple of 8"),
        ("flash_attn_3", {"head_dim": 512}, "heads of 512 are larger than 256"),
        ("triton", {"head_dim": 512}, "heads of 512 are larger than 256"),
        ("triton", {"triton": False}, "Triton is not installed"),
        ("flash_attn_2", {"triton": False}, "Triton is not installed"),
        ("triton", {"capability": None}, "torch finds no NVIDIA GPU"),
        ("triton", {"device": "cpu", "capability": None, "triton": False}, "it needs a GPU, here is cpu"),
        ("flash_attn_3", {"device": "cpu", "capability": None, "triton": False}, "it needs a GPU, here is cpu"),
        ("flash_attn_2", {"device": "cpu", "capability": None}, "it needs a GPU, here is cpu"),
    ],
)
def test_a_backend_that_was_asked_for_is_refused_where_it_cannot_serve(
    name: str, changes: dict[str, Any], message: str
) -> None:
    facts = DeviceFacts(**{**vars(H100), **changes})
    with pytest.raises(ValueError, match=f"attention={name} cannot serve here: .*{message}"):
        select(name, facts, {}, 1)  # without a trial, and before the block size counts


@pytest.mark.parametrize(
    ("name", "facts", "failing", "block_size", "reason"),
    [
        (
            "auto",
            H100,
            (),
            None,
            "attention=auto: flash_attn_3 for prompts, triton for decodes (sm_90; block_size 128)",
        ),
        (
            "auto",
            H100,
            ("flash_attn_3",),
            None,
            "attention=auto: flash_attn_2 for prompts, triton for decodes "
            f"(flash_attn_3: {MISSING}; sm_90; block_size 256)",
        ),
        (
            "auto",
            H100,
            ("flash_attn_3",),
            16,
            "attention=auto: triton for prompts and decodes (flash_attn_3: block_size=16 must be a multiple of 128; "
            "flash_attn_2: block_size=16 must be a multiple of 256; sm_90; block_size 16)",
        ),
        ("triton", H100, (), None, "attention=triton: triton for prompts and decodes (block_size 128)"),
        ("torch", H100, (), 24, "attention=torch: torch for prompts and decodes (block_size 24)"),
        (
            "auto",
            DeviceFacts("cpu", None, torch.bfloat16, 64, cpu_kernels=True),
            (),
            None,
            "attention=auto: cpu for prompts and decodes (block_size 16)",
        ),
        (
            "auto",
            DeviceFacts("cpu", None, torch.bfloat16, 24, cpu_kernels=True),
            (),
            4,
            "attention=auto: torch for prompts and decodes (cpu: heads of 24 are no multiple of 16; block_size 4)",
        ),
    ],
)
def test_the_reason_says_what_was_chosen_and_what_was_not_and_why(
    name: str, facts: DeviceFacts, failing: tuple[str, ...], block_size: int | None, reason: str
) -> None:
    probes = {**WORKS, **dict.fromkeys(failing, MISSING)}
    assert select(name, facts, probes, block_size).reason == reason


def test_only_what_may_be_chosen_is_tried() -> None:
    assert select("auto", H100, {"flash_attn_3": None, "triton": None}, None).decode == "triton"
    assert select("torch", H100, {}, None).decode == "torch"
    assert select("auto", DeviceFacts("cuda", (9, 0), torch.float32, 64, triton=True), {"triton": None}, None)
    assert select("auto", DeviceFacts("cpu", None, torch.float32, 64, cpu_kernels=True), {}, None).decode == "cpu"


def test_the_settings_are_the_configurations() -> None:
    assert ("auto", *backend_selector.BACKENDS) == ATTENTION_BACKENDS


def _choose(name: str, **changes: Any) -> AttentionBackend:
    fits = {"device": CPU, "dtype": torch.bfloat16, "head_dim": 64, "block_size": None}
    return choose_backend(name, **{**fits, **changes})


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'magic' is not one of auto, cpu, torch, triton, flash_attn_2, flash_attn_3"):
        _choose("magic")


@pytest.mark.skipif(cpu.native is None, reason="not built; see test_extensions.py")
def test_the_cpu_kernels_are_chosen_where_they_can_serve() -> None:
    assert _choose("auto").name == _choose("cpu").name == _choose("auto", block_size=64).name == "cpu"
    assert _choose("auto").reason == "attention=auto: cpu for prompts and decodes (block_size 16)"
    assert _choose("torch").name == "torch"
    for change in ({"block_size": 4}, {"head_dim": 24}, {"dtype": torch.float16}):
        assert _choose("auto", **change).name == "torch"
    for change in ({"block_size": 4}, {"head_dim": 24}, {"dtype": torch.float16}, {"device": torch.device("cuda")}):
        with pytest.raises(ValueError, match=r"attention=cpu needs .*set attention=auto"):
            _choose("cpu", **change)
        with pytest.raises(ValueError, match=r"kv_cache_dtype=int8 needs .*set kv_cache_dtype=auto"):
            _choose("auto", kv_cache_dtype="int8", **change)
    for name in ("torch", "triton", "flash_attn_3"):
        with pytest.raises(ValueError, match=rf"attention={name}.*set kv_cache_dtype=auto"):
            _choose(name, kv_cache_dtype="int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_torch_is_chosen_for_cuda_and_the_reason_says_so() -> None:
    backend = _choose("auto", device=torch.device("cuda"))
    assert backend.name == "torch"
    assert "triton: torch finds no NVIDIA GPU" in backend.reason


def test_triton_serves_a_cpu_in_its_interpreter_alone() -> None:
    with pytest.raises(ValueError, match="attention=triton cannot serve here: it needs a GPU, here is cpu"):
        _choose("triton")
    cuda.interpret(True)
    try:
        backend = _choose("triton", block_size=32)
        assert (backend.name, backend.block_multiple, backend.default_block_size) == ("triton", 16, 128)
        assert backend.reason == "attention=triton: triton for prompts and decodes (block_size 32)"
        assert _choose("auto").name != "triton"
        assert probe("triton", CPU, torch.bfloat16, 64, 5) is None
    finally:
        cuda.interpret(False)


@pytest.mark.parametrize("group", [1, 5, 8])
def test_a_trial_passes_packages_that_compute_as_torch_does(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    for install, name in (
        (stubs.install_flash_attn_3, "flash_attn_3"),
        (stubs.install_fa3_fwd, "flash_attn_3"),
        (stubs.install_flash_attn_2, "flash_attn_2"),
    ):
        stubs.remove_all(monkeypatch)
        install(monkeypatch)
        assert probe(name, CPU, torch.bfloat16, 64, group) is None


def test_a_trial_says_why_a_package_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    stubs.remove_all(monkeypatch)
    assert "flash_attn_interface" in str(probe("flash_attn_3", CPU, torch.bfloat16, 64, 1))
    # The wheel is built without float16, and without pages that its tiles of other head sizes do not fit.
    stubs.install_fa3_fwd(monkeypatch)
    assert probe("flash_attn_3", CPU, torch.float16, 64, 1) == (
        "RuntimeError: This flash attention build does not support FP16."
    )
    assert probe("flash_attn_3", CPU, torch.bfloat16, 96, 1) == (
        "RuntimeError: This flash attention build does not support paged KV."
    )
    # An old version, without the arguments of a paged cache.
    stubs.install_flash_attn_2(monkeypatch)
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_with_kvcache", lambda q, k_cache, v_cache: q)
    assert "unexpected keyword argument" in str(probe("flash_attn_2", CPU, torch.bfloat16, 64, 1))


@pytest.mark.parametrize("wrong", [torch.zeros_like, lambda out: out * torch.nan, lambda out: out.roll(1, 0)])
def test_a_trial_fails_a_package_that_computes_something_else(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    stubs.remove_all(monkeypatch)
    stubs.install_flash_attn_2(monkeypatch)
    right = sys.modules["flash_attn"].flash_attn_with_kvcache
    monkeypatch.setattr(
        sys.modules["flash_attn"], "flash_attn_with_kvcache", lambda *args, **named: wrong(right(*args, **named))
    )
    assert "results differed from torch's by" in str(probe("flash_attn_2", CPU, torch.bfloat16, 64, 5))


def test_a_mixed_choice_is_one_backend_whose_blocks_suit_both(monkeypatch: pytest.MonkeyPatch) -> None:
    stubs.remove_all(monkeypatch)
    stubs.install_flash_attn_2(monkeypatch)
    cuda.interpret(True)
    try:
        selection = select("auto", DeviceFacts("cuda", (8, 0), torch.bfloat16, 64, triton=True), WORKS, None)
        backend = backend_selector._backend(selection, CPU, False)
    finally:
        cuda.interpret(False)
    assert backend.name == "flash_attn_2 for prompts, triton for decodes"
    assert backend.block_multiple == backend.default_block_size == selection.block_size == 256
    assert backend.supports_graph
