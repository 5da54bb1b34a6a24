"""The checkpoints of a run with LoRA, read as if adapters had been merged: converting, verifying and inspecting them
needs no more. What the adapters are, loop.json tells."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megatron_opd.config import LoraConfig
from megatron_opd.core import marker
from megatron_opd.core.run_dir import MARKER
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.lora_layout import SUFFIX, Place, merged, places
from megatron_opd.models.torch_dist_dir import Region, TorchDistDir


def open_checkpoint(directory: str | Path) -> TorchDistDir:
    """A torch_dist checkpoint of any kind. Raises ValueError for one that is damaged, or whose loop.json is."""
    plain = TorchDistDir(directory)
    return _Merged(plain) if has_adapters(plain) else plain


def has_adapters(checkpoint: TorchDistDir) -> bool:
    """Whether adapters are among the tensors."""
    return any(f"{SUFFIX}." in key for key in checkpoint.tensors)


class _Merged(TorchDistDir):
    """Shows no adapters, and weights with them."""

    def __init__(self, plain: TorchDistDir) -> None:
        super().__init__(plain.dir)
        self._plain = plain
        self._config, arch = _told_by(plain.dir)
        self._places: dict[str, Place] = {
            f"decoder.layers.{place.megatron}.weight": place for place in places(arch, self._config)
        }
        self.tensors = {key: known for key, known in self.tensors.items() if f"{SUFFIX}." not in key}

    def read(self, region: Region) -> torch.Tensor:
        """As without adapters; of a weight that has some, one layer's whole matrix at a time."""
        weight = super().read(region)
        place = self._places.get(region.key)
        if place is None:
            return weight
        assert region.shape == (1, *region.whole[1:])
        stem, layer = region.key.removesuffix(".weight") + SUFFIX, region.offset[0]
        pairs = {
            part: (self._layer(f"{stem}.{part}.lora_A", layer), self._layer(f"{stem}.{part}.lora_B", layer))
            for part in place.parts
            if part in self._config.modules
        }
        return merged(weight[0], place, pairs, self._config.scale)[None]

    def _layer(self, key: str, layer: int) -> torch.Tensor:
        whole = self._plain.shape(key)
        return self._plain.read(Region(key, whole, (layer, 0, 0), (1, *whole[1:])))[0]


def _told_by(checkpoint: Path) -> tuple[LoraConfig, Architecture]:
    try:
        student: dict[str, Any] = marker.read(checkpoint)["student"]
        rank, alpha, targets = (student[f"lora.{name}"] for name in ("rank", "alpha", "targets"))
        names = {field.name for field in dataclasses.fields(Architecture)} - {"padded_vocab_size"}
        arch = Architecture(**{name: student[name] for name in names}, padded_vocab_size=student["vocab_size"])
        return LoraConfig(rank=rank, alpha=alpha, targets=targets), arch
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint} has adapters, but their settings in {checkpoint / MARKER} cannot be read: {error}"
        ) from None
