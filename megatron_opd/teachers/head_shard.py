"""A teacher's output head: the rows of this rank's shard of the student's vocabulary."""

from __future__ import annotations

from megatron_opd.config import TeacherConfig
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.scores import Head
from megatron_opd.core.vocab import VocabShard
from megatron_opd.models.architecture import read_architecture
from megatron_opd.precision.fp8_plan import ModelPlan
from megatron_opd.precision.overflow import check_fp16
from megatron_opd.precision.scaled import ScaledHead
from megatron_opd.student import groups, source
from megatron_opd.student.model import DTYPES


def load_head(
    config: TeacherConfig, parallel: Parallel, vocab: VocabShard, plan: ModelPlan | None = None
) -> Head | None:
    """Rows [L, D] in the teacher's dtype where the loss is computed, None on the other ranks.

    In FP8 where the `plan` says so, unless it is emulated. Raises ValueError where a number is too large for fp16.
    """
    if not parallel.is_last_stage:
        return None
    arch = read_architecture(config.model, vocab_multiple=parallel.tensor_size)
    rows_LD = source.load_head_rows(config.model, arch, vocab.start, vocab.stop)
    head_LD = rows_LD.to(DTYPES[config.dtype])
    check_fp16(head_LD, rows_LD, f"teacher '{config.name}': the output head of {config.model}")
    head_LD = head_LD.to(groups.device())
    if plan is None or plan.head_products is None or plan.emulate:
        return head_LD
    return ScaledHead(head_LD, plan.head_products)
