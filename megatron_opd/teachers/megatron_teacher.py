"""A teacher inside the trainer: a Megatron model on the student's layout, forward only.

It has no output head of its own: scoring gives final hidden states on the last pipeline stage, and the loss applies
this rank's rows of the head (`head_LD`) a chunk at a time. So any hidden size, and any padding of the vocabulary, fits.
Scores are whole on every context-parallel rank, because the teacher's sequences are not split where the student's are:
its prompts and padding may be others. So context parallelism spares activations, and not the memory of scores. Refuses
teachers whose sizes the layout does not divide (see `architecture.check_layout`).
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_opd.config import TeacherConfig
from megatron_opd.core import batching
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.scores import Hidden
from megatron_opd.core.types import MicroBatch, Rollout
from megatron_opd.core.vocab import VocabShard
from megatron_opd.models.architecture import read_architecture
from megatron_opd.precision.fp8_plan import ModelPlan
from megatron_opd.student import context, fp8, groups, packing, pipeline, source
from megatron_opd.student.model import DTYPES, build_gpt, drop_head, transformer_config
from megatron_opd.teachers.head_shard import load_head
from megatron_opd.teachers.offload import OffloadedWeights
from megatron_opd.teachers.pinned import offloaded


class MegatronTeacher:
    """Scores rollouts with hidden states [R, D] in the teacher's dtype."""

    foreigner = None  # its tokenizer is the student's

    def __init__(
        self,
        config: TeacherConfig,
        parallel: Parallel,
        vocab: VocabShard,
        *,
        micro_batch_size: int,
        packs: bool = False,
        plan: ModelPlan | None = None,
    ) -> None:
        """`packs`: what `train.packing` says; `plan` says what of it is in FP8; None: nothing."""
        self.name = config.name
        self.parallel, self.split = parallel, context.split_of(parallel)
        self.micro_batch_size = micro_batch_size
        self.packing, self.device = batching.packing_for(packs, parallel), groups.device()
        arch = read_architecture(config.model, vocab_multiple=parallel.tensor_size)
        dtype = DTYPES[config.dtype]
        body = dataclasses.replace(arch, tied_embeddings=False)  # without a head there is nothing to tie
        plan = plan or ModelPlan(config.name, config.dtype, rules=())
        self.length_multiple = plan.multiple * parallel.length_multiple
        megatron = transformer_config(body, parallel, dtype=dtype, precision=plan.megatron())
        # With gradients on, Transformer Engine would keep resident matrices a second time, transposed for a backward
        # pass, and a third time in host memory, as they were before they were rounded.
        with torch.no_grad():
            self.model = build_gpt(body, megatron, parallel)
        drop_head(self.model)
        source.load(self.model, body, config.model, parallel)
        self.model.requires_grad_(False).eval()
        self.fp8 = fp8.install(self.model, plan, parallel)
        self.head_LD = load_head(config, parallel, vocab, plan)
        self.offloaded: OffloadedWeights | None = None
        """Its weights, where they wait in host memory; the head stays."""
        if config.offload and torch.cuda.is_available():
            self.offloaded = offloaded(self.model, ahead=config.prefetch)

    def submit(self, rollout: Rollout) -> None:
        """Nothing: its ranks are busy with the student until `score`."""

    def score(self, rollouts: list[Rollout]) -> list[Hidden]:
        """Hidden states that predict each learnt token; None inside on all but the last stage. Collective."""
        if not rollouts:
            return []
        batches = batching.pack(
            [rollout.seen_by(self.name) for rollout in rollouts],
            micro_batch_size=self.micro_batch_size,
            length_multiple=self.length_multiple,
            device=self.device,
            packing=self.packing,
        )
        with self.offloaded.there() if self.offloaded else nullcontext():
            rows = pipeline.forward(self.model, batches, self._learnt_rows, self.split)
        if not self.parallel.is_last_stage:
            return [Hidden(None) for _ in rollouts]
        if self.split is not None:
            rows = [self.split.whole(mine, batch) for mine, batch in zip(rows, batches, strict=True)]
        lengths = [r.num_learnt for r in rollouts]
        return [Hidden(hidden_RD) for hidden_RD in torch.cat(rows).split(lengths)]

    def metrics(self) -> dict[str, float]:
        """Nothing happens here that the loop does not see."""
        return {}

    def close(self) -> None:
        """Nothing runs beside the caller."""

    def _learnt_rows(self, batch: MicroBatch, hidden_SBD: torch.Tensor) -> torch.Tensor:
        if self.parallel.sequence:
            hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD)
        return hidden_SBD.transpose(0, 1).flatten(0, 1)[packing.rows(batch)]
