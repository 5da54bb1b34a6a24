"""Megatron's DDP wrapper, optimizer and learning-rate schedule for the student."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_opd.config import OptimConfig


class _HalfModule(Float16Module):
    """A model in half precision whose output stays so: it is hidden states, and their products make logits."""

    def forward(self, *inputs: Any, **kwargs: Any) -> torch.Tensor:
        """What the model gives, unconverted."""
        return super().forward(*inputs, fp32_output=False, **kwargs)


def wrap(model: MegatronModule, config: TransformerConfig, *, distributed: bool) -> DistributedDataParallel:
    """Gradient buffers in fp32, reduced over data-parallel replicas at the end of a step."""
    if config.bf16:
        model = _HalfModule(config, model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        # The loss adds to the head's buffer itself: autograd would not tell an overlapping reduction that it is due.
        overlap_grad_reduce=False,
        use_distributed_optimizer=distributed,
        check_for_nan_in_grad=False,  # Student.step reports a loss or norm that is not finite, with the step's number
    )
    wrapped = DistributedDataParallel(config, ddp, model)
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build_optimizer(
    model: DistributedDataParallel, config: OptimConfig, dtype: torch.dtype, *, num_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam with decoupled weight decay, and its schedule counted in steps."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            # Clipping at infinity instead of switching it off: the norm is computed and logged either way.
            clip_grad=config.clip_grad or float("inf"),
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=config.distributed,
        ),
        [model],
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        # The schedule advances after each step. Starting at lr / warmup and rising over warmup - 1 advances makes step
        # k (from 1) run at lr * k / warmup: none is wasted at 0.
        init_lr=config.lr / max(config.warmup_steps, 1),
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=max(config.warmup_steps - 1, 0),
        lr_decay_steps=max(num_steps, 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def step(optimizer: MegatronOptimizer) -> float:
    """Clip and update the weights; returns the gradient's norm before clipping, the same on every rank.

    Where the norm is not finite, weights and the optimizer's state stay as they are: Megatron looks at it in fp16 only.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if math.isfinite(norm):
        optimizer.step()
    return norm
