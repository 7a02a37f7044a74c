"""The repository's root is the package: `phalanx` maps to "." and its sub-packages are listed one by one."""

from setuptools import setup

PACKAGES = [
    "phalanx",
    "phalanx.engine",
    "phalanx.engine.models",
    "phalanx.parallel",
    "phalanx.parallel.collectives",
    "phalanx.kernels",
    "phalanx.launch",
    "phalanx.configs",
]

setup(
    name="phalanx",
    version="0.1.0",
    description="Tensor-parallel inference for decoder language models, on any number of ranks",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"phalanx": "."},
    packages=PACKAGES,
    package_data={"phalanx.configs": ["*.yaml", "*/*.yaml"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "transformers>=4.51",
        "tokenizers>=0.21.1",
        "safetensors>=0.5",
        "hydra-core>=1.3",
        "msgspec>=0.19",
        "pyzmq>=26",
        "rich>=13",
        "pyyaml>=6",
        "numpy>=1.26",
    ],
    extras_require={
        "gguf": ["gguf>=0.10"],
        "dev": ["pytest>=8", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.14", "pre-commit>=4", "psutil>=5"],
    },
)
