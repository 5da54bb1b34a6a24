"""Megatron's DDP wrapper, optimizer and learning-rate schedule for the student."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_opd.config import OptimConfig
from megatron_opd.student import chained_state, fusions, groups
from megatron_opd.student.fusions import Fusions

_SETTINGS = ("max_lr", "min_lr", "betas", "eps")
"""Of a group of parameters, by the config; its weight decay and learning rate are the scheduler's."""


class _HalfModule(Float16Module):
    """A model in half precision whose output stays so: it is hidden states, and their products make logits."""

    def forward(self, *inputs: Any, **kwargs: Any) -> torch.Tensor:
        """What the model gives, unconverted."""
        return super().forward(*inputs, fp32_output=False, **kwargs)


def wrap(
    model: MegatronModule, config: TransformerConfig, *, distributed: bool, fused: Fusions
) -> DistributedDataParallel:
    """Gradient buffers in fp32, reduced over data-parallel replicas at the end of a step, or towards it."""
    if config.bf16 or config.fp16:
        model = _HalfModule(config, model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=fused.reduction,
        use_distributed_optimizer=distributed,
        check_for_nan_in_grad=False,  # Student.step reports a loss or norm that is not finite, with the step's number
    )
    wrapped = DistributedDataParallel(config, ddp, model)
    config.finalize_model_grads_func = finalize_model_grads
    if fused.reduction:
        fusions.overlap(wrapped, config)
    if fused.weight_gradients:
        fusions.fuse_weight_gradients(wrapped)
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
            fp16=dtype == torch.float16,
            initial_loss_scale=config.initial_loss_scale,
            hysteresis=1,  # the first overflow halves the scale: every skipped step then brings the next one closer
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
        # A run that ends within its warm-up has no decay; Megatron wants its end behind the warm-up all the same.
        lr_decay_steps=max(num_steps, config.warmup_steps, 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def step(optimizer: MegatronOptimizer) -> float | None:
    """Clip and update the weights; returns the gradient's norm before clipping, without the loss scale, the same on
    every rank. None: a gradient overflowed fp16, and the loss scale is half of what it was.

    Without a finite norm, weights and the optimizer's state stay as they are: Megatron looks at it in fp16 only.
    """
    if _scalers(optimizer):
        if _overflows(optimizer):
            return None
    else:
        optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()
    if math.isfinite(norm):
        for part in _parts(optimizer):
            if not getattr(part, "is_stub_optimizer", False) and part.get_parameters():
                clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, norm)
        optimizer.step_with_ready_grads()
    return float(norm)


def scaler(optimizer: MegatronOptimizer) -> DynamicGradScaler | None:
    """Factor of the loss in the backward pass; None without one: in all types but fp16."""
    return next(iter(_scalers(optimizer)), None)


def complete_state(optimizer: MegatronOptimizer) -> None:
    """Give Adam the state that its first step would begin with, where it has none: a run whose steps were all skipped
    so far has checkpoints, too, and Megatron does not save what is not there."""
    for part in _parts(optimizer):
        fused = getattr(part, "optimizer", None)
        if fused is not None and not isinstance(fused, torch.optim.Adam):
            part.init_state_fn(fused, part.config)  # Megatron's own, which fills what is empty
    for adam in _adams(optimizer):
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            slot = adam.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in slot:
                    slot[name] = torch.zeros_like(parameter)
            slot.setdefault("step", torch.zeros(()))


def load_state(optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, state: dict[str, Any]) -> None:
    """Continue from the `optimizer` and `scheduler` of a checkpoint, under the settings that both were built with.

    Megatron keeps rates, betas and epsilon in the checkpoint too, and would go on with those.
    """
    loaded = chained_state.fit(_parts(optimizer), state["optimizer"])
    _complete_loaded(optimizer, loaded)
    for group in optimizer.param_groups[:1]:  # all have the same settings; there is none on a rank without weights
        _set_loaded(loaded, {name: group[name] for name in _SETTINGS if name in group})
    optimizer.load_state_dict(loaded)
    scheduler.load_state_dict(state["scheduler"])  # which makes the learning rate of the next step


def _complete_loaded(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Give what was loaded for torch's Adam the number of its steps where that is 0, which Megatron does not save."""
    if not _adams(optimizer):
        return
    for key, value in state.items():
        if not isinstance(value, dict):
            continue
        if key != "state":
            _complete_loaded(optimizer, value)
        elif "common_step" not in value:
            for slot in value.values():
                if isinstance(slot, dict) and "exp_avg" in slot:
                    slot.setdefault("step", torch.zeros(()))


def _set_loaded(state: dict[Any, Any], own: dict[str, Any]) -> None:
    """Give the loaded groups the settings of now: newer versions of Megatron look a group up by its rates, too."""
    for key, value in state.items():
        if key == "param_groups":
            for group in value:
                group.update(own)
        elif isinstance(value, dict):
            _set_loaded(value, own)


def _overflows(optimizer: MegatronOptimizer) -> bool:
    """Divide the gradients by the loss scale; whether one of any rank is not finite. The scale follows from that.

    The optimizers of dense weights and of experts have a scaler each, over the ranks that share their gradients. They
    must not part, for there is one loss: so all ranks decide together, and each scaler moves once, as all do.
    """
    scalers = _scalers(optimizer)
    before = [scaler.state_dict() for scaler in scalers]
    found = torch.tensor(float(optimizer.prepare_grads()), device=groups.device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    for scaler, state in zip(scalers, before, strict=True):
        scaler.load_state_dict(state)
        scaler.update(bool(found))
    return bool(found)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _adams(optimizer: MegatronOptimizer) -> list[torch.optim.Adam]:
    """Those of torch; a fused one keeps its steps elsewhere."""
    found = [getattr(part, "optimizer", None) for part in _parts(optimizer)]
    return [adam for adam in found if isinstance(adam, torch.optim.Adam)]


def _scalers(optimizer: MegatronOptimizer) -> list[DynamicGradScaler]:
    found = [getattr(part, "grad_scaler", None) for part in _parts(optimizer)]
    return [scaler for scaler in found if scaler is not None]
