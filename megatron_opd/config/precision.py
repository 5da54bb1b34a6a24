"""In what numbers the models compute where that is not simply their dtype: FP8, and whose layers do it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_opd.config.section import AtLeastOne, Count, Positive, section


@section
class Fp8Config:
    """FP8 matrix products. Each part is chosen by itself; all others compute in their model's dtype."""

    student: Literal["off", "forward", "full"] = "off"
    """FP8 of the student's layers: off, forward (in the forward pass alone; the backward pass uses the rounded
    operands, and its gradients stay in student.dtype; needs emulate), or full (in both passes)."""
    teachers: list[str] = dataclasses.field(default_factory=list)
    """Names of the in-process teachers whose layers compute in FP8; [all]: every one of them."""
    heads: list[str] = dataclasses.field(default_factory=list)
    """Models whose output head computes in FP8: student, names of teachers with the carrier hidden, or [all]. Without
    emulate this needs the recipe tensorwise, and a teacher's head stays in FP8, whatever resident says."""
    recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """Recipe of the scales: tensorwise (one a tensor, from its own values), delayed (one a tensor, from earlier
    passes), blockwise (one for 1x128 activations and 128x128 weights), or mxfp8 (a power of two for 1x32;
    Blackwell)."""
    first_layers_bf16: Count = 0
    """Layers at the start of each model that stay in its dtype (not with delayed)."""
    last_layers_bf16: Count = 0
    """Layers at the end of each model that stay in its dtype (not with delayed)."""
    resident: bool = False
    """Keep the matrices of FP8 teachers in FP8 between passes too: half the memory of bf16."""
    emulate: bool = False
    """Round operands to FP8 and back, and multiply in the model's dtype: FP8's effect on any device, slowly."""
    max_kl_ratio: Positive = 0.1
    """Largest KL(without FP8||with FP8) of a teacher, the ensemble or the student, as a share of the KL between
    student and teachers that is to be learned, measured on held-out answers before the first step."""
    on_exceed: Literal["refuse", "warn"] = "refuse"
    """Reaction above max_kl_ratio: refuse (the run stops before it trains), or warn."""
    check_prompts: AtLeastOne = 32
    """Prompts answered for that measurement, from data.eval, or data.train where there is none."""

    @property
    def has_layers(self) -> bool:
        """Whether layers compute in FP8, which is Transformer Engine's work where it is not emulated."""
        return self.student != "off" or bool(self.teachers)

    @property
    def is_on(self) -> bool:
        """Whether anything computes in FP8."""
        return self.has_layers or bool(self.heads)


@section
class PrecisionConfig:
    """FP8, and whose layers are used on a GPU."""

    layers: Literal["auto", "local"] = "auto"
    """Implementation of the layers: auto (Transformer Engine's where it and CUDA are there, else Megatron's own), or
    local (Megatron's own)."""
    fp8: Fp8Config = dataclasses.field(default_factory=Fp8Config)
    """FP8 matrix products."""
