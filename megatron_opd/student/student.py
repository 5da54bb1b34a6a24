"""The student: a Megatron model that steps, evaluates and exports itself. Nobody else sees a Megatron object."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_opd.config import Config
from megatron_opd.objective import Objective
from megatron_opd.parallel import Parallel
from megatron_opd.student import groups, optim, pipeline, weights
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
        megatron = transformer_config(self.arch, parallel, dtype=dtype, recompute=config.student.recompute)
        self.gpt = build_gpt(self.arch, megatron, parallel)
        weights.load(self.gpt, self.arch, config.student.model, parallel)
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

        Raises FloatingPointError when the loss or the gradient norm is not finite; the weights are then untouched.
        """
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = pipeline.train(self.model, batches, _at_rows(objective))
        metrics = self._means(sums, objective)
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"the loss is {metrics['loss']}; lower optim.lr, or check the models for NaN weights")
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        updated, grad_norm, _ = self.optimizer.step()
        if not updated or not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient norm is {grad_norm}; lower optim.lr or raise loss.temperature")
        self.scheduler.step(1)
        return {**metrics, "grad_norm": float(grad_norm)}

    def evaluate(self, batches: Sequence[MicroBatch], objective: Objective) -> dict[str, float]:
        """The objective's metrics without a step: means over all replicas' tokens."""
        self.model.eval()
        sums = pipeline.forward(self.model, batches, _at_rows(objective)) if batches else []
        return self._means(sums, objective)

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor) pairs on the leader of each replica; a collective (see weights.export)."""
        return weights.export(self.gpt, self.arch, self.parallel)

    def _means(self, results: list[tuple[torch.Tensor, ...]], objective: Objective) -> dict[str, float]:
        """Sum micro-batches and replicas, divide by tokens, tell every rank."""
        names = objective.metric_names()
        totals = torch.zeros(1 + len(names), dtype=torch.float64, device=groups.device())
        if self.parallel.is_last_stage and self.parallel.tensor_rank == 0:
            for num_tokens, sums_M in results:
                totals += torch.cat([num_tokens.double()[None], sums_M])
        dist.all_reduce(totals)
        num_tokens, *sums = totals.tolist()
        means = {name: total / max(num_tokens, 1) for name, total in zip(names, sums, strict=True)}
        return {"num_tokens": num_tokens, **means}


def _at_rows(objective: Objective) -> pipeline.AtTheEnd:
    """The objective at the end of the last stage, on the logits that predict response tokens."""

    def at_rows(batch: MicroBatch, logits_BSL: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss, num_tokens, sums_M = objective(batch, logits_BSL.flatten(0, 1)[batch.rows_T])
        return (loss, num_tokens, (num_tokens, sums_M)) if torch.is_grad_enabled() else (num_tokens, sums_M)

    return at_rows
