"""Runs micro-batches through a model with Megatron's pipeline schedules: training, evaluation, teacher scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_opd.types import MicroBatch

AtTheEnd = Callable[[MicroBatch, torch.Tensor], Any]
"""What the last stage does with the model's output for a micro-batch."""


def train(model: torch.nn.Module, batches: Sequence[MicroBatch], loss: AtTheEnd) -> list[Any]:
    """Forward and backward over equally shaped micro-batches; `loss` returns Megatron's (sum, tokens, extra).

    Gradients are accumulated, reduced and divided by the global number of tokens. Returns the extras of the last
    stage, in order; [] on other stages.
    """
    shapes = {b.tokens_BS.shape for b in batches}
    assert len(shapes) == 1, f"micro-batches of one step must have one shape, not {shapes}"
    return _schedule(model, batches, lambda batch, output: loss(batch, output), forward_only=False)


@torch.no_grad()
def forward(model: torch.nn.Module, batches: Sequence[MicroBatch], collect: AtTheEnd) -> list[Any]:
    """Forward only; returns what `collect` returns on the last stage for each micro-batch, [] on other stages."""
    results: list[Any] = []
    # Stages exchange activations of one agreed shape, so a smaller last micro-batch is a pass of its own.
    for _, same in groupby(batches, key=lambda b: b.tokens_BS.shape):
        results += _schedule(
            model, list(same), lambda batch, output, non_loss_data: collect(batch, output), forward_only=True
        )
    return results


def _schedule(
    model: torch.nn.Module, batches: Sequence[MicroBatch], at_the_end: Callable[..., Any], *, forward_only: bool
) -> list[Any]:
    size, length = batches[0].tokens_BS.shape

    def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(iterator)
        positions = torch.arange(length, device=batch.tokens_BS.device).expand(size, length)
        return model(batch.tokens_BS, positions, None), partial(at_the_end, batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=size,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
