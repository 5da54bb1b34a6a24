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
    no_teacher = Distillation(loss, 1.0, vocab, (), ())  # nobody samples, so the temperature of samples does not matter
    objective = Objective(no_teacher, (CrossEntropy(),))
    answers = [
        (source.name, [as_answer(p, p.answer_ids) for p in prompts if p.answer_ids]) for source, prompts in sources
    ]
    found = token_means(student, objective, "sft/nll", answers, packing=packing)
    return {f"eval/nll/{name}": value for name, value in found.items()}


def token_means(
    student: Student,
    objective: Objective,
    metric: str,
    answers: Sequence[tuple[str, Sequence[Rollout]]],
    *,
    packing: Mapping[str, Any],
) -> dict[str, float]:
    """By source, and for `all`, the mean of a metric of the objective over the tokens of the answers of all replicas;
    nothing of sources without answers. Every rank has all `answers`. Collective over all ranks."""
    parallel = student.parallel
    means, total, tokens = {}, 0.0, 0.0
    for source, its in answers:
        mine = its[parallel.data_rank :: parallel.data_size]
        found = student.evaluate(_packed(mine, packing), objective)
        if metric in found:
            means[source] = found[metric]
            total, tokens = total + found[metric] * found["num_tokens"], tokens + found["num_tokens"]
    return means | ({ALL: total / tokens} if tokens else {})


def as_answer(prompt: Prompt, ids: tuple[int, ...]) -> Rollout:
    """Tokens of the data set, as a rollout."""
    return Rollout(
        prompt=prompt,
        sample=0,
        token_ids=ids,
        learnt=(True,) * len(ids),
        logps=(0.0,) * len(ids),
        finish="stop",
        versions=(0,) * len(ids),
        origin="dataset",
    )


def _packed(answers: Sequence[Rollout], packing: Mapping[str, Any]) -> list[MicroBatch]:
    """With the weights of a plain cross-entropy."""
    if not answers:
        return []
    batches = pack(answers, **packing)
    return [batch.weighing(sft=torch.ones_like(batch.behaviour_logp_T)) for batch in batches]
