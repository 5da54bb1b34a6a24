"""The held-out cross-entropy: how likely the student finds the reference answers of `data.eval`, nobody sampling.

Shape suffix: T learnt tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_opd.config import Config, SourceConfig
from megatron_opd.core.batching import pack
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.types import MicroBatch, Prompt, Rollout
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.distillation import Distillation
from megatron_opd.loss.objective import Objective
from megatron_opd.loss.sampled_tokens import CrossEntropy
from megatron_opd.student import groups
from megatron_opd.student.student import Student
from megatron_opd.trainer.evaluate import ALL
from megatron_opd.trainer.experience import packing_settings


def nll(
    student: Student,
    vocab: VocabShard,
    sources: Sequence[tuple[SourceConfig, Sequence[Prompt]]],
    config: Config,
    parallel: Parallel,
) -> dict[str, float]:
    """`eval/nll/<source>` and `eval/nll/all`: the mean of -log q(y) over the answers' tokens at temperature 1, in nats;
    nothing with `train.eval_nll` off, or of sources without answers. Collective over all ranks."""
    if not config.train.eval_nll:
        return {}
    no_teacher = Distillation(config.loss, config.rollout.temperature, vocab, (), ())
    objective = Objective(no_teacher, (CrossEntropy(),))
    metrics, total, tokens = {}, 0.0, 0.0
    for source, prompts in sources:
        answers = [_as_rollout(prompt) for prompt in prompts if prompt.answer_ids]
        mine = answers[parallel.data_rank :: parallel.data_size]
        found = student.evaluate(_packed(mine, config, parallel), objective)
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


def _packed(answers: Sequence[Rollout], config: Config, parallel: Parallel) -> list[MicroBatch]:
    """With the weights of a plain cross-entropy."""
    if not answers:
        return []
    batches = pack(
        answers,
        **packing_settings(config, parallel),
        device=groups.device(),
    )
    return [replace(batch, sft_T=torch.ones_like(batch.behaviour_logp_T)) for batch in batches]
