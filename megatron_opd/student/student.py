"""The student: a Megatron model that steps, evaluates and exports itself. Nobody else sees a Megatron object."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.config import Config
from megatron_opd.config.checks_precision import STUDENT
from megatron_opd.objective import Objective
from megatron_opd.parallel import Parallel
from megatron_opd.precision.plan import plan_of
from megatron_opd.student import fp8, groups, optim, pipeline, source, weights
from megatron_opd.student.architecture import read_architecture
from megatron_opd.student.model import DTYPES, build_gpt, transformer_config
from megatron_opd.types import MicroBatch
from megatron_opd.vocab import VocabShard


class Student:
    """Built from a Hugging Face directory on this rank's place in the grid."""

    def __init__(self, config: Config, parallel: Parallel) -> None:
        self.parallel = parallel
        self.arch = read_architecture(config.student.model, vocab_multiple=config.student.vocab_multiple)
        dtype = DTYPES[config.student.dtype]
        plan = plan_of(config, STUDENT, self.arch)
        megatron = transformer_config(
            self.arch, parallel, dtype=dtype, recompute=config.student.recompute, precision=plan.megatron()
        )
        self.gpt = build_gpt(self.arch, megatron, parallel)
        source.load(self.gpt, self.arch, config.student.model, parallel)
        self.fp8 = fp8.install(self.gpt, plan, parallel)
        self.model = optim.wrap(self.gpt, megatron, distributed=config.optim.distributed)
        self.optimizer, self.scheduler = optim.build_optimizer(
            self.model, config.optim, dtype, num_steps=config.train.steps
        )
        megatron.grad_scale_func = self.optimizer.scale_loss

    def vocab_shard(self, size: int) -> VocabShard:
        """This rank's columns of the logits; `size` is the number of real entries to normalise over."""
        columns = self.arch.padded_vocab_size // self.parallel.tensor_size
        start = self.parallel.tensor_rank * columns
        group = self.parallel.tensor_group if self.parallel.tensor_size > 1 else None
        return VocabShard(start, start + columns, size, group)

    def step(self, batches: Sequence[MicroBatch], objective: Objective) -> dict[str, float]:
        """One optimizer step on this replica's micro-batches; metrics are means over all replicas' tokens.

        Raises FloatingPointError on every rank when the loss is not finite (the weights are then untouched) or the
        gradient norm is not (the weights are then lost, and the run should end).
        """
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        metrics = self._means(pipeline.train(self.model, batches, _at_rows(objective)), objective)
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"the loss is {metrics['loss']}; lower optim.lr, or look for NaN in the models")
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        updated, grad_norm, _ = self.optimizer.step()
        if not updated or not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient norm is {grad_norm}; lower optim.lr or raise loss.temperature")
        self.scheduler.step(1)
        return {**metrics, "grad_norm": float(grad_norm)}

    def evaluate(self, batches: Sequence[MicroBatch], objective: Objective) -> dict[str, float]:
        """The objective's metrics without a step: means over all replicas' tokens."""
        self.model.eval()
        results = pipeline.forward(self.model, batches, _at_rows(objective)) if batches else []
        return self._means(results, objective)

    def logits(self, batch: MicroBatch) -> torch.Tensor | None:
        """Of one micro-batch at its response tokens, [T, L], on the last stage; None elsewhere."""
        self.model.eval()
        found = pipeline.forward(self.model, [batch], lambda b, logits_BSL: logits_BSL.flatten(0, 1)[b.rows_T])
        return found[0] if found else None

    def gradients(self, batches: Sequence[MicroBatch], objective: Objective) -> list[torch.Tensor]:
        """This rank's gradients of the summed loss in host memory, not reduced over anything. No step is made."""
        self.model.train()
        self.model.zero_grad_buffer()
        config = self.gpt.config
        reduce, config.finalize_model_grads_func = config.finalize_model_grads_func, None
        try:
            pipeline.train(self.model, batches, _at_rows(objective))
        finally:
            config.finalize_model_grads_func = reduce
        made = [p.main_grad.float().cpu().clone() for p in self.gpt.parameters() if p.requires_grad]
        self.model.zero_grad_buffer()
        return made

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor) pairs on the leader of each replica; a collective (see weights.export)."""
        return weights.export(self.gpt, self.arch, self.parallel)

    def _means(self, results: list[torch.Tensor], objective: Objective) -> dict[str, float]:
        """Means over the tokens of all micro-batches and replicas, on every rank; without those that have no token."""
        names = objective.metric_names()
        totals_M2 = torch.zeros(len(names), 2, dtype=torch.float64, device=groups.device())
        if self.parallel.is_last_stage and self.parallel.tensor_rank == 0:
            for metrics_M2 in results:
                totals_M2 += metrics_M2
        dist.all_reduce(totals_M2)
        sums = dict(zip(names, totals_M2.tolist(), strict=True))
        means = {name: total / count for name, (total, count) in sums.items() if count}
        return {"num_tokens": sums["loss"][1], **means}


def _at_rows(objective: Objective) -> pipeline.AtTheEnd:
    """The objective at the end of the last stage, on the logits that predict response tokens."""

    def at_rows(batch: MicroBatch, logits_BSL: torch.Tensor) -> Any:
        loss, num_tokens, metrics_M2 = objective(batch, logits_BSL.flatten(0, 1)[batch.rows_T])
        return (loss, num_tokens, metrics_M2) if torch.is_grad_enabled() else metrics_M2

    return at_rows
