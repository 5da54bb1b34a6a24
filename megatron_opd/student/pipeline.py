"""Runs micro-batches through a model with Megatron's pipeline schedules: training, evaluation, teacher scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megatron_opd.core.types import MicroBatch
from megatron_opd.student import packing
from megatron_opd.student.context import Split

AtTheEnd = Callable[[MicroBatch, torch.Tensor], Any]
"""What the last stage does with the model's output for a micro-batch, or for this rank's part of it."""


def _nobody() -> None:
    """Is told nothing."""


def train(
    model: torch.nn.Module,
    batches: Sequence[MicroBatch],
    loss: AtTheEnd,
    split: Split | None = None,
    *,
    told: Callable[[], object] = _nobody,
) -> list[Any]:
    """Forward and backward over micro-batches; `loss` returns Megatron's (sum, tokens, extra).

    Where there are several stages the micro-batches must be equally shaped. Gradients are accumulated, reduced and
    divided by the global number of tokens. Returns the extras of the last stage, in order; [] on other stages. With a
    `split`, ranks and `loss` have parts of the micro-batches. `told` is called when a micro-batch begins.
    """
    shapes = {b.model_shape for b in batches}
    is_piped = get_model_config(model).pipeline_model_parallel_size > 1
    assert len(shapes) == 1 or not is_piped, f"micro-batches of one step must have one shape, not {shapes}"
    return _schedule(model, batches, lambda batch, output: loss(batch, output), split, forward_only=False, told=told)


@torch.no_grad()
def forward(
    model: torch.nn.Module, batches: Sequence[MicroBatch], collect: AtTheEnd, split: Split | None = None
) -> list[Any]:
    """Forward only; returns what `collect` returns on the last stage for each micro-batch, [] on other stages. With a
    `split`, ranks and `collect` have parts of the micro-batches."""
    results: list[Any] = []
    # Stages exchange activations of one agreed shape, so a smaller last micro-batch is a pass of its own.
    for _, same in groupby(batches, key=lambda b: b.model_shape):
        results += _schedule(
            model, list(same), lambda batch, output, non_loss_data: collect(batch, output), split, forward_only=True
        )
    return results


def _schedule(
    model: torch.nn.Module,
    batches: Sequence[MicroBatch],
    at_the_end: Callable[..., Any],
    split: Split | None,
    *,
    forward_only: bool,
    told: Callable[[], object] = _nobody,
) -> list[Any]:
    size, length = batches[0].model_shape
    of_engine = get_model_config(model).transformer_impl == "transformer_engine"

    def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(iterator)
        told()
        if split is None:
            tokens, positions, described = packing.inputs(batch, of_engine=of_engine)
        else:
            positions = split.positions(length).to(batch.tokens_BS.device).expand(size, -1)
            batch = split.part(batch)
            tokens, described = batch.tokens_BS, {}
        return model(tokens, positions, None, **described), partial(at_the_end, batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=length,  # of the whole: Megatron divides the shapes of its messages itself
        micro_batch_size=size,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
