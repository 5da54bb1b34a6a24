"""The contents of a model directory of either kind, by its headers: for `megatron-opd inspect`.

A checkpoint with defects is described too, with the defects; one whose headers cannot be read is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_opd.core import marker
from megatron_opd.core.run_dir import CHECKPOINTS, MARKER, saves
from megatron_opd.models.architecture import FAMILIES, Architecture, read_architecture
from megatron_opd.models.checkpoint_keys import is_optimizer
from megatron_opd.models.convert import find_like
from megatron_opd.models.headers import check_tensors
from megatron_opd.models.lora_checkpoint import open_checkpoint
from megatron_opd.models.safetensors_dir import TensorDir
from megatron_opd.models.torch_dist_dir import is_torch_dist


def describe(model_dir: str | Path, like: str | Path | None = None) -> dict[str, Any]:
    """Facts by name, in the order to show them; `problems` (a list) comes last.

    Raises ValueError where there is no model, or not even its headers can be read.
    """
    path = Path(model_dir)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory")
    if not is_torch_dist(path) and (found := saves(path / CHECKPOINTS)):
        raise ValueError(f"{path} is the directory of a run; name one of its checkpoints, such as {found[-1]}")
    facts: dict[str, Any] = {"format": "torch_dist (Megatron)" if is_torch_dist(path) else "Hugging Face"}
    problems: list[str] = []
    arch = _architecture(path, like, problems)
    if arch is not None:
        facts |= _about_architecture(arch)
    sizes, counted = _tensors(path)
    facts["tensors"] = sum(counted.values())
    facts["parameters"] = sizes
    facts["dtype"] = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in counted))
    if is_torch_dist(path):
        checkpoint = open_checkpoint(path)
        facts["optimizer"] = any(is_optimizer(key) for key in checkpoint.tensors)
        if "embedding.word_embeddings.weight" in checkpoint.tensors:
            facts["vocabulary as stored"] = checkpoint.shape("embedding.word_embeddings.weight")[0]
    facts |= _about_run(path, problems)
    facts["files"] = sum(f.is_file() for f in path.iterdir())
    facts["bytes on disk"] = sum(f.stat().st_size for f in path.iterdir() if f.is_file())
    if arch is not None:
        problems += check_tensors(path, arch)
    return {**facts, "problems": problems}


def _architecture(path: Path, like: str | Path | None, problems: list[str]) -> Architecture | None:
    try:
        return read_architecture(find_like(path, like) if is_torch_dist(path) else path)
    except ValueError as error:
        if not is_torch_dist(path) and not (path / "config.json").is_file():
            raise
        problems.append(str(error))
        return None


def _about_architecture(arch: Architecture) -> dict[str, Any]:
    names = {family: name for name, family in FAMILIES.items()}
    facts: dict[str, Any] = {
        "architecture": names[arch.family],
        "family": arch.family,
        "layers": arch.num_layers,
        "hidden size": arch.hidden_size,
        "feed-forward size": arch.ffn_size,
        "attention heads": f"{arch.num_heads} (key-value: {arch.num_kv_heads}, size {arch.head_dim})",
        "vocabulary": arch.vocab_size,
        "tied embeddings": arch.tied_embeddings,
        "positions": arch.max_positions,
        "rope": f"base {arch.rope_base:g}" + (f", llama3 scaling x{arch.rope_factor:g}" if arch.rope_factor else ""),
    }
    if arch.num_experts:
        facts["experts"] = f"{arch.num_experts}, {arch.experts_per_token} a token"
    return facts


def _tensors(path: Path) -> tuple[int, Counter[Any]]:
    """(values in weights, number of tensors by type)."""
    counted: Counter[Any] = Counter()
    total = 0
    if is_torch_dist(path):
        checkpoint = open_checkpoint(path)
        for key in checkpoint.tensors:
            if not is_optimizer(key):
                total += math.prod(checkpoint.shape(key))
                counted[checkpoint.dtype(key)] += 1
    else:
        with TensorDir(path) as tensors:
            for name in tensors.names():
                total += math.prod(tensors.shape(name))
                counted[tensors.dtype(name)] += 1
    return total, counted


def _about_run(path: Path, problems: list[str]) -> dict[str, Any]:
    """Step and layout where a run wrote the checkpoint."""
    if not (path / MARKER).is_file():
        if path.parent.name == "checkpoints" and path.name.startswith("step_"):
            problems.append(f"{path}: there is no {MARKER}: the save was cut short, this is not a whole checkpoint")
        return {}
    try:
        loop = marker.read(path)
        tensor, pipeline, data, *context = loop["layout"]
        layout = [f"tensor {tensor}", f"pipeline {pipeline}", *(f"context {size}" for size in context), f"data {data}"]
        student = loop["student"]
        return {
            "step": loop["step"],
            "saved at layout": f"{' x '.join(layout)} (loads at any)",
            "student": f"{student['family']}, {student.get('num_layers')} layers",
            **_about_adapters(student),
        }
    except (ValueError, KeyError, TypeError) as error:
        problems.append(f"{path / MARKER} is damaged: {_missing(error)}")
        return {}


def _missing(error: Exception) -> str:
    return f"student.{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)


def _about_adapters(student: dict[str, Any]) -> dict[str, Any]:
    if not student.get("lora.rank"):
        return {}
    targets = ", ".join(student["lora.targets"])
    return {
        "adapters": f"LoRA of rank {student['lora.rank']}, alpha {student['lora.alpha']:g}: {targets} (shown merged)"
    }
