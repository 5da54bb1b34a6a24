"""Writes the adapters alone as the directory that peft loads: adapter_config.json, adapter_model.safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_opd.config import LoraConfig
from megatron_opd.models import hub, output_dir


def write(adapters: Iterable[tuple[str, torch.Tensor]], out: str | Path, config: LoraConfig, *, base: str) -> None:
    """Replace the directory `out` by one with these adapters; `base` is the model that they were trained beside."""
    temporary = output_dir.temporary(out)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapters}
    save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    (temporary / "adapter_config.json").write_text(json.dumps(_config(config, base), indent=2) + "\n")
    output_dir.put_in_place(temporary, out)


def _config(config: LoraConfig, base: str) -> dict[str, object]:
    name, _, commit = hub.origin(base).partition("@")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name or base,
        **({"revision": commit} if commit else {}),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
