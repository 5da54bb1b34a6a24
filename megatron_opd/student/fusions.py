"""Fusions and overlaps of training on GPUs, decided in one place. CPUs compute as they always did.

Gathering updated weights while the next forward pass runs is not among it: what comes after an update is the export
to whoever samples, which needs them all at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel


@dataclass(frozen=True, slots=True)
class Fusions:
    """The ones that are on."""

    swiglu: bool = False
    """SwiGLU in one kernel, which torch compiles."""
    rope: bool = False
    """Rotary embeddings in Transformer Engine's kernel, also of packed rows. It turns in fp32, as servers do; Megatron
    rounds sines and cosines to the model's type first."""
    weight_gradients: bool = False
    """Transformer Engine's products add weight gradients to the fp32 buffer: no gradient in the model's type."""
    reduction: bool = False
    """Gradients travel between replicas, a bucket at a time, while the last backward pass goes on."""

    def megatron(self) -> dict[str, Any]:
        """Settings of Megatron's TransformerConfig."""
        # gradient_accumulation_fusion is not among them: with it Megatron's own output layer asks for NVIDIA's Apex.
        return {"bias_activation_fusion": self.swiglu, "apply_rope_fusion": self.rope}


def chosen(layers: str, *, on_gpu: bool, replicas: int = 1) -> Fusions:
    """For layers of the implementation `layers` (transformer_impl), and gradients summed over so many replicas."""
    fuses = on_gpu and layers == "transformer_engine"
    return Fusions(swiglu=fuses, rope=fuses, weight_gradients=fuses, reduction=on_gpu and replicas > 1)


def fuse_weight_gradients(model: torch.nn.Module) -> int:
    """Have Transformer Engine's modules add to their trained weights' `main_grad`; how many modules do.

    What is frozen has no such buffer, and Megatron's own modules ask for Apex, so they go on giving gradients.
    """
    count = 0
    for module in model.modules():
        weights = [p for name, p in module.named_parameters(recurse=False) if name.startswith("weight")]
        if weights and hasattr(module, "fuse_wgrad_accumulation") and all(p.requires_grad for p in weights):
            module.fuse_wgrad_accumulation = True
            count += 1
    return count


def overlap(model: DistributedDataParallel, config: Any) -> None:
    """Let a model that was wrapped for it reduce gradients while the last backward pass goes on.

    The ranks reduce buckets in the order in which these are complete, so every backward pass must come to every weight.
    Ours do: experts without tokens and micro-batches without learnt ones multiply matrices without rows.
    """
    config.no_sync_func = model.no_sync
    for node in model.grad_accs:
        node.register_prehook(_StandIn(node.variable))


class _StandIn:
    """Called before autograd brings a weight its gradient. Where there is none, because the loss has added to the
    head's buffer itself, Megatron is told so, and given a gradient of no size: it insists on one."""

    def __init__(self, parameter: Any) -> None:
        self.parameter, self.is_on = parameter, False

    def __call__(self, gradients: tuple[torch.Tensor | None, ...]) -> None:
        was_on, self.is_on = self.is_on, gradients[0] is None
        if self.is_on:
            nothing = torch.zeros((), dtype=self.parameter.dtype, device=self.parameter.device)
            self.parameter.grad = nothing.expand_as(self.parameter)
        if self.is_on or was_on:  # otherwise the mark is of whoever made the gradient
            self.parameter.grad_added_to_main_grad = self.is_on


@contextmanager
def unreduced(model: DistributedDataParallel, config: Any) -> Iterator[None]:
    """Within, a backward pass leaves this rank's gradients as they are."""
    before = config.finalize_model_grads_func, config.no_sync_func
    config.finalize_model_grads_func, config.no_sync_func = None, nullcontext
    try:
        with model.no_sync():
            yield
    finally:
        config.finalize_model_grads_func, config.no_sync_func = before
