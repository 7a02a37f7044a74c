"""The repository's root is the package: `phalanx` maps to "." and its sub-packages are listed one by one.

The C++ extensions are optional and know nothing of torch: where they cannot be built, torch's operations serve instead.
"""

import os
import sys
from glob import glob

from setuptools import Extension, setup

PACKAGES = [
    "phalanx",
    "phalanx.engine",
    "phalanx.engine.client",
    "phalanx.engine.client.resume",
    "phalanx.engine.constraints",
    "phalanx.engine.coordinator",
    "phalanx.engine.coordinator.text",
    "phalanx.engine.execution",
    "phalanx.engine.memory",
    "phalanx.engine.models",
    "phalanx.engine.protocol",
    "phalanx.engine.sampling",
    "phalanx.engine.scheduling",
    "phalanx.parallel",
    "phalanx.parallel.collectives",
    "phalanx.parallel.loading",
    "phalanx.parallel.topology",
    "phalanx.kernels",
    "phalanx.kernels.cpu",
    "phalanx.kernels.cuda",
    "phalanx.kernels.weight_formats",
    "phalanx.serving",
    "phalanx.serving.pool",
    "phalanx.serving.gateway",
    "phalanx.serving.gateway.generation",
    "phalanx.serving.gateway.http",
    "phalanx.serving.gateway.page",
    "phalanx.serving.gateway.routes",
    "phalanx.serving.gateway.routes.messages_api",
    "phalanx.serving.gateway.routes.responses_api",
    "phalanx.serving.gateway.schemas",
    "phalanx.serving.gateway.schemas.messages_api",
    "phalanx.serving.gateway.schemas.responses_api",
    "phalanx.launch",
    "phalanx.launch.cli",
    "phalanx.launch.model_files",
    "phalanx.launch.ranks",
    "phalanx.configs",
]


def extensions() -> list[Extension]:
    """The C++ parts: arithmetic on CPUs, and collectives in shared memory."""
    if not sys.platform.startswith("linux"):
        return []
    try:
        import pybind11
    except ImportError:
        print("pybind11 is missing: phalanx is built without its C++ extensions", file=sys.stderr)
        return []

    sanitizers = ["-fsanitize=address,undefined"] if os.environ.get("PHALANX_SANITIZE") else []

    def extension(name: str, folder: str) -> Extension:
        return Extension(
            name,
            sources=sorted(glob(f"{folder}/**/*.cpp", recursive=True)),
            depends=sorted(glob(f"{folder}/**/*.h", recursive=True)),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=[
                "-std=c++17",
                "-fvisibility=hidden",
                "-ffp-contract=fast",
                "-Wall",
                "-Wno-psabi",
                "-Wno-uninitialized",
                "-pthread",
                *(["-O1", "-g", *sanitizers] if sanitizers else ["-O3", "-g0"]),
            ],
            extra_link_args=["-pthread", *sanitizers],
            language="c++",
            optional=True,
        )

    return [
        extension("phalanx.kernels.cpu._native", "kernels/cpu"),
        extension("phalanx.parallel.collectives._native", "parallel/collectives"),
    ]


setup(
    name="phalanx",
    version="0.1.0",
    description="Tensor-parallel inference for decoder language models, on any number of ranks",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"phalanx": "."},
    packages=PACKAGES,
    ext_modules=extensions(),
    package_data={"phalanx.configs": ["*.yaml", "*/*.yaml"], "phalanx.serving.gateway.page": ["*.html"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "transformers>=4.51",
        "tokenizers>=0.21.1",
        "jinja2>=3.1.6",
        "safetensors>=0.5",
        "hydra-core>=1.3",
        "msgspec>=0.19",
        "llguidance>=1.9,<2",
        "pyzmq>=26",
        "rich>=13",
        "pyyaml>=6",
        "numpy>=1.26",
    ],
    extras_require={
        "gguf": ["gguf>=0.10"],
        "serve": [
            "starlette>=0.40",
            "uvicorn>=0.30",
            "uvloop>=0.19",
            "httptools>=0.6",
            "prometheus-client>=0.20",
        ],
        "otel": [
            "opentelemetry-sdk>=1.30",
            "opentelemetry-exporter-otlp-proto-http>=1.30",
        ],
        "dev": [
            "pytest>=8",
            "hypothesis>=6.100",
            "bandit>=1.8",
            # Guides the fuzzers of tests/fuzz by coverage; the fast tests do without it.
            "atheris>=3; platform_system == 'Linux' and platform_machine == 'x86_64' "
            "and python_version >= '3.11' and python_version < '3.14'",
            "ruff>=0.9",
            "mypy>=1.14",
            "pre-commit>=4",
            "psutil>=5",
            "anthropic>=0.60",
            "openai>=1.60",
            "httpx>=0.27",
            "schemathesis>=4",
            "jsonschema-rs>=0.30",
            "clang-format==23.1.5",
            # Runs the kernels for GPUs in its interpreter, and compiles them without one: torch's own version of it.
            "triton>=3.6,<3.8; platform_system == 'Linux'",
        ],
    },
)
