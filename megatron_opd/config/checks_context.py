"""Problems of context parallelism that the settings alone reveal."""

from __future__ import annotations

from megatron_opd.config import ParallelConfig, TeacherConfig, TrainConfig
from megatron_opd.config.models import crosses_tokenizers


def check_context(
    parallel: ParallelConfig, teachers: list[TeacherConfig], train: TrainConfig, *, longest: int
) -> list[str]:
    """Problems of parallel.context, each naming the setting to change; `longest` is a sequence's, in tokens."""
    if parallel.context <= 1:
        return []
    problems = []
    if crosses_tokenizers(teachers):
        problems.append(
            "parallel.context: a teacher with its own tokenizer is compared span by span, and a span may lie on two"
            " ranks; set it to 1, or give the teachers the student's tokenizer"
        )
    if train.packing:
        problems.append("train.packing does not work with parallel.context > 1; set packing to false, or context to 1")
    if parallel.length_multiple > longest:
        problems.append(
            f"parallel.context={parallel.context} splits sequences into {parallel.length_multiple} pieces, more than"
            f" the {longest} tokens of the longest sequence (data.max_prompt_tokens + rollout.max_new_tokens, or"
            " environment.max_tokens); lower it"
        )
    return problems
