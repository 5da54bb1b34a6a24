"""The student's output head, left to the loss: the model gives final hidden states, and logits are made where needed.

Megatron's output layer would make logits of every position, prompts and padding included. Here it only passes hidden
states on; the fused loss multiplies those of learnt tokens with the head's shard, a chunk at a time, and whatever
else wants logits gets those of learnt tokens.

Shape letters: S sequence, B batch, D hidden size, T learnt tokens, L local vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_opd.core.types import MicroBatch
from megatron_opd.loss.fused import FactoredLogits
from megatron_opd.student import packing

Product: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def give_hidden(model: GPTModel) -> None:
    """Make the model return final hidden states [B, S, D], of all positions, in place of logits [B, S, L].

    The output layer stays where it is, with its weight, its place in checkpoints and Megatron's marks for tied
    embeddings; only what it computes changes.
    """
    if model.post_process:
        model.output_layer.forward = partial(_pass_on, model.config.sequence_parallel)


def at_rows(model: GPTModel, batch: MicroBatch, hidden_BSD: torch.Tensor) -> FactoredLogits:
    """What predicts the learnt tokens: hidden states [T, D], and this rank's rows of the head.

    Every shard of the vocabulary has its part of the hidden states' gradient. Under sequence parallelism the gather
    that made them whole sums those parts; otherwise the copy below does, of learnt tokens only.
    """
    hidden_TD = hidden_BSD.flatten(0, 1)[packing.rows(batch)]
    if not model.config.sequence_parallel:
        hidden_TD = copy_to_tensor_model_parallel_region(hidden_TD)
    return FactoredLogits(hidden_TD, weight(model))


def weight(model: GPTModel) -> torch.nn.Parameter:
    """This rank's rows of the head [L, D] on the last stage: with tied embeddings, those of the embedding."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def logits(student: FactoredLogits, multiply: Product | None = None) -> torch.Tensor:
    """This shard's columns of the logits [T, L] in float32, with gradients for hidden states and head.

    `multiply`: hidden states and head to their product, where that is not the plain one.
    """
    return (multiply or F.linear)(student.hidden_TD, student.head_LD).float()


def _pass_on(is_sequence_parallel: bool, hidden_SBD: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
    """The output layer's forward: no product."""
    return gather_from_sequence_parallel_region(hidden_SBD) if is_sequence_parallel else hidden_SBD, None
