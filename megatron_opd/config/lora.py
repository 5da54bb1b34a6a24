"""LoRA: training small matrices beside the student's own, which stay as they are."""

from __future__ import annotations

import dataclasses

from megatron_opd.config.section import Count, Positive, section

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Modules that can be adapted, by Hugging Face's names."""
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
GROUPS = {"qkv": LORA_MODULES[:3], "all-linear": LORA_MODULES}
"""Names for several of them."""


@section
class LoraConfig:
    """Low-rank adapters in place of training the whole student (docs/lora.md)."""

    rank: Count = 0
    """Rows of A and columns of B in W + alpha / rank * B A; 0: no adapters, every weight is trained."""
    alpha: Positive = 32.0
    """Factor of the adapters' product, divided by the rank."""
    targets: list[str] = dataclasses.field(default_factory=list)
    """Modules with adapters: q_proj, k_proj, v_proj (together qkv), o_proj, gate_proj, up_proj, down_proj, or
    all-linear, which an empty list means too."""

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank

    @property
    def modules(self) -> tuple[str, ...]:
        """Hugging Face names of the modules that `targets` mean, each once, in the order of a layer."""
        wanted = {name for target in self.targets or ["all-linear"] for name in GROUPS.get(target, (target,))}
        return tuple(name for name in LORA_MODULES if name in wanted)
