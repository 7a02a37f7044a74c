"""Which engines benchmarks/compare.py runs, and where their parts lie in the folder that install.py fills."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from phalanx.engine.config import unknown_name
from phalanx.engine.errors import ConfigError
from phalanx.kernels.weight_formats import get_weight_format
from phalanx.kernels.weight_formats.base import PANEL_ROWS

PROGRAMS = Path(__file__).resolve().parent / "programs"
OPENVINO_INT8_BYTES = 1.0  # of a weight: a whole row shares a scale and a zero point
Q8_0_BYTES = 34 / 32  # of a weight: 32 of one byte share a scale of two
LONG_ROW = 2**20  # columns, beside which one scale of a whole row is nothing


@dataclass(frozen=True)
class Peer:
    """How a peer is run. `environment` and `model` are in the peers' folder; NAME in `model` is the model's."""

    program: str
    environment: str | None  # None: this one
    model: str | None  # None: the Hugging Face folder itself
    options: tuple[str, ...] = ()  # it takes, of ranks and Sizes' fields
    weight_bytes: float = 2.0
    arrivals: bool = True  # takes requests while others run


PEERS: Mapping[str, Peer] = {
    "vllm": Peer("run_vllm.py", "vllm", None, ("ranks", "max_model_len")),
    "openvino": Peer("run_openvino.py", "openvino", "models/NAME-openvino-fp16"),
    "openvino_int8": Peer("run_openvino.py", "openvino", "models/NAME-openvino-int8", weight_bytes=OPENVINO_INT8_BYTES),
    "llamacpp": Peer("run_llamacpp.py", "llama", "models/NAME-bf16.gguf", ("context",)),
    "llamacpp_q8": Peer("run_llamacpp.py", "llama", "models/NAME-q8_0.gguf", ("context",), weight_bytes=Q8_0_BYTES),
    "transformers": Peer("run_transformers.py", None, None, arrivals=False),
}


@dataclass(frozen=True)
class Sizes:
    """What the cases need: tokens of one request, and of all at once."""

    max_model_len: int
    context: int


@dataclass(frozen=True)
class Planned:
    """An engine to be started."""

    name: str
    command: tuple[str, ...]
    weight_bytes: float
    arrivals: bool = True

    @property
    def ours(self) -> bool:
        """Whether it is phalanx."""
        return self.name.startswith("phalanx")


def plan_phalanx(folder: Path, variants: Sequence[str], ranks: Sequence[int], sizes: Sizes) -> list[Planned]:
    """phalanx on each number of ranks, for each variant: fields of EngineConfig as NAME=VALUE,NAME=VALUE."""
    planned = []
    for variant in variants:
        fields = [field for field in variant.split(",") if field]
        if not all("=" in field for field in fields):
            raise ConfigError(f"variants={variant!r} must be NAME=VALUE,NAME=VALUE, fields of EngineConfig")
        for count in ranks:
            name = " ".join(["phalanx", f"ranks={count}", *fields])
            given = (f"ranks={count}", f"max_model_len={sizes.max_model_len}", *fields)
            command = (sys.executable, str(PROGRAMS / "run_phalanx.py"), str(folder), *given)
            planned.append(Planned(name, command, weight_bytes(dict(field.split("=", 1) for field in fields))))
    return planned


def plan_peers(
    folder: Path, names: Sequence[str], ranks: Sequence[int], sizes: Sizes, installed: Path
) -> tuple[list[Planned], list[str]]:
    """The peers that are installed, and what to do about each that is not. Raises ConfigError for an unknown one."""
    planned = []
    missing = []
    for name in names:
        if name not in PEERS:
            raise ConfigError(unknown_name("peer", name, list(PEERS)))

        peer = PEERS[name]
        python = Path(sys.executable) if peer.environment is None else installed / peer.environment / "bin" / "python"
        model = folder if peer.model is None else installed / peer.model.replace("NAME", folder.name)
        absent = [str(path) for path in (python, model) if not path.exists()]
        if absent:
            missing.append(
                f"{name} is left out: there is no {' and no '.join(absent)}; "
                f"python benchmarks/lab/peers/install.py {installed} {folder} {name.partition('_')[0]} makes it"
            )
            continue

        for count in ranks if "ranks" in peer.options else (1,):
            values = {"ranks": count, **asdict(sizes)}
            given = (f"{option}={values[option]}" for option in peer.options)
            title = f"{name} ranks={count}" if "ranks" in peer.options else name
            command = (str(python), str(PROGRAMS / peer.program), str(model), *given)
            planned.append(Planned(title, command, peer.weight_bytes, peer.arrivals))
    return planned, missing


def weight_bytes(fields: Mapping[str, str]) -> float:
    """Bytes of one weight of phalanx's layers under some fields of EngineConfig; under int4 the head has more.

    bfloat16 takes 12 bits where the kernels expand that, if a model's numbers allow it (see PlainPanels).
    """
    dtype = torch.float32 if fields.get("dtype") == "float32" else torch.bfloat16
    weight_format = get_weight_format(fields.get("quantization", "none")).preferred(dtype)
    return weight_format.nbytes(PANEL_ROWS, LONG_ROW, dtype.itemsize) / (PANEL_ROWS * LONG_ROW)
