"""The held-out cross-entropy: how likely the student finds the reference answers of `data.eval`, nobody sampling.

Shape suffix: T learnt tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_opd.config import LossConfig, SourceConfig, TrainConfig
from megatron_opd.core.batching import pack
from megatron_opd.core.types import MicroBatch, Prompt, Rollout
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.distillation import Distillation
from megatron_opd.loss.objective import Objective
from megatron_opd.loss.sampled_tokens import CrossEntropy
from megatron_opd.student.student import Student
from megatron_opd.trainer.evaluate import ALL


def nll(
    student: Student,
    vocab: VocabShard,
    sources: Sequence[tuple[SourceConfig, Sequence[Prompt]]],
    *,
    train: TrainConfig,
    loss: LossConfig,
    packing: Mapping[str, Any],
) -> dict[str, float]:
    """`eval/nll/<source>` and `eval/nll/all`: the mean of -log q(y) over the answers' tokens at temperature 1, in nats;
    nothing with `train.eval_nll` off, or of sources without answers. `packing` are the arguments of `pack`. Collective
    over all ranks."""
    if not train.eval_nll:
        return {}
    parallel = student.parallel
    no_teacher = Distillation(loss, 1.0, vocab, (), ())  # nobody samples, so the temperature of samples does not matter
    objective = Objective(no_teacher, (CrossEntropy(),))
    metrics, total, tokens = {}, 0.0, 0.0
    for source, prompts in sources:
        answers = [_as_rollout(prompt) for prompt in prompts if prompt.answer_ids]
        mine = answers[parallel.data_rank :: parallel.data_size]
        found = student.evaluate(_packed(mine, packing), objective)
        if "sft/nll" in found:
            metrics[f"eval/nll/{source.name}"] = found["sft/nll"]
            total, tokens = total + found["sft/nll"] * found["num_tokens"], tokens + found["num_tokens"]
    return metrics | ({f"eval/nll/{ALL}": total / tokens} if tokens else {})


def _as_rollout(prompt: Prompt) -> Rollout:
    size = len(prompt.answer_ids)
    return Rollout(
        prompt=prompt,
        sample=0,
        token_ids=prompt.answer_ids,
        learnt=(True,) * size,
        logps=(0.0,) * size,
        finish="stop",
        versions=(0,) * size,
        origin="dataset",
    )


def _packed(answers: Sequence[Rollout], packing: Mapping[str, Any]) -> list[MicroBatch]:
    """With the weights of a plain cross-entropy."""
    if not answers:
        return []
    batches = pack(answers, **packing)
    return [batch.weighing(sft=torch.ones_like(batch.behaviour_logp_T)) for batch in batches]
