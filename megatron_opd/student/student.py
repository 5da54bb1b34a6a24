"""The student: a Megatron model that steps, evaluates and exports itself. Nobody else sees a Megatron object."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.config import Config
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.types import MicroBatch
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.fused import Logits
from megatron_opd.loss.metrics import Sums, means, rows
from megatron_opd.loss.objective import Objective
from megatron_opd.models.architecture import read_architecture
from megatron_opd.precision.fp8_plan import student_plan
from megatron_opd.student import (
    context,
    fp8,
    fusions,
    groups,
    head,
    lora,
    nonfinite,
    optim,
    pipeline,
    source,
    weights,
)
from megatron_opd.student.model import DTYPES, build_gpt, transformer_config


class Student:
    """Built from a Hugging Face directory on this rank's place in the grid."""

    def __init__(self, config: Config, parallel: Parallel) -> None:
        self.parallel, self.split = parallel, context.split_of(parallel)
        self.arch = read_architecture(config.student.model, vocab_multiple=config.student.vocab_multiple)
        dtype = DTYPES[config.student.dtype]
        plan = student_plan(config.precision, config.student, config.parallel, self.arch)
        megatron = transformer_config(
            self.arch, parallel, dtype=dtype, recompute=config.student.recompute, precision=plan.megatron()
        )
        self.gpt = build_gpt(self.arch, megatron, parallel)
        head.give_hidden(self.gpt)
        source.load(self.gpt, self.arch, config.student.model, parallel)
        self.path, self.lora = config.student.model, config.lora
        if self.lora.rank:
            lora.attach(self.gpt, self.arch, self.lora, parallel, seed=config.run.seed)
        self.fp8 = fp8.install(self.gpt, plan, parallel)
        replicas = parallel.data_size * parallel.context_size
        fused = fusions.chosen(megatron.transformer_impl, on_gpu=torch.cuda.is_available(), replicas=replicas)
        self.model = optim.wrap(self.gpt, megatron, distributed=config.optim.distributed, fused=fused)
        self.optimizer, self.scheduler = optim.build_optimizer(
            self.model, config.optim, dtype, num_steps=config.train.steps * config.train.updates_per_step
        )
        megatron.grad_scale_func = self.optimizer.scale_loss
        self.scaler = optim.scaler(self.optimizer)
        self.max_skipped = config.train.max_skipped
        self.skips = 0
        """How many of the last steps in a row left the weights as they were; a resumed run sets it."""
        self.skipped: str | None = None
        """Why the last step left the weights as they were; None: it did not."""

    def vocab_shard(self, size: int) -> VocabShard:
        """This rank's columns of the logits; `size` is the number of real entries to normalise over."""
        columns = self.arch.padded_vocab_size // self.parallel.tensor_size
        start = self.parallel.tensor_rank * columns
        group = self.parallel.tensor_group if self.parallel.tensor_size > 1 else None
        return VocabShard(start, start + columns, size, group)

    def step(
        self, batches: Sequence[MicroBatch], objective: Objective, *, told: Callable[[], object] = lambda: None
    ) -> dict[str, float]:
        """One optimizer step on this replica's micro-batches; metrics are means over all replicas' tokens. `told` is
        called when a micro-batch begins.

        Where the loss or the gradient's norm is not finite, weights, optimizer and schedule stay as they were on every
        rank, `step/skipped` is 1, `skipped` says why, and metrics that are not finite are left out. Raises
        FloatingPointError, on every rank alike, when that happens more than `train.max_skipped` times in a row; steps
        that only make the loss scale of fp16 smaller do not count.
        """
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        metrics = self._means(self._train(batches, objective, told), objective)
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        if self.scaler is not None:
            metrics["loss_scale"] = self._loss_scale()
        if not math.isfinite(metrics["loss"]):
            where = nonfinite.first(self.parallel.gather_world(self._bad_tokens(batches, objective)))
            why = f"the loss is {metrics['loss']} {where}; lower optim.lr, or look for NaN in the models"
            return self._skip(why, metrics)
        norm = optim.step(self.optimizer)
        if norm is None:
            return self._overflow(metrics)
        metrics["grad_norm"] = norm
        if not math.isfinite(norm):
            names = dict.fromkeys(chain(*self.parallel.gather_world(nonfinite.parameters(self.gpt))))
            where = f"the gradient norm is {metrics['grad_norm']} (first of {', '.join(names) or 'none alone'})"
            return self._skip(f"{where}; lower optim.lr or raise loss.temperature", metrics)
        self.scheduler.step(1)
        self.skipped, self.skips = None, 0
        return {**metrics, "step/skipped": 0.0}

    def _train(self, batches: Sequence[MicroBatch], objective: Objective, told: Callable[[], object]) -> list[Sums]:
        return pipeline.train(self.model, batches, self._at_rows(objective), self.split, told=told)

    def _overflow(self, metrics: dict[str, float]) -> dict[str, float]:
        """Leave everything as it is but the loss scale. That a scale settles is no failure, and ends by itself: only
        overflows at the smallest scale, where no other can help, count. Raises FloatingPointError."""
        used, now = metrics["loss_scale"], self._loss_scale()
        names = dict.fromkeys(chain(*self.parallel.gather_world(nonfinite.parameters(self.gpt))))
        why = f"gradients overflow fp16 (first of {', '.join(names) or 'none alone'}) at a loss scale of {used:g}"
        if now == used:
            return self._skip(f"{why}, the smallest; set student.dtype=bf16, or look for NaN in the models", metrics)
        self.skipped = f"{why}; it is {now:g} from now on"
        return _finite(metrics)

    def _skip(self, why: str, metrics: dict[str, float]) -> dict[str, float]:
        """Leave everything as it is, and count. Raises FloatingPointError."""
        self.skips += 1
        if self.skips > self.max_skipped:
            raise FloatingPointError(
                f"{why} (train.max_skipped: {self.max_skipped}; in a row, this is step {self.skips} of the kind)"
            )
        self.skipped = why
        return _finite(metrics)

    def _bad_tokens(self, batches: Sequence[MicroBatch], objective: Objective) -> list[nonfinite.Token]:
        """Response tokens of this replica whose loss is not finite, on its last stage; from another forward pass."""
        numbers = iter(range(len(batches)))

        def look(batch: MicroBatch, hidden_BSD: torch.Tensor) -> list[nonfinite.Token]:
            place = self.parallel.data_rank, next(numbers)
            return nonfinite.tokens(objective, batch, self._output(objective, batch, hidden_BSD), place)

        self.model.eval()
        found = [token for tokens in pipeline.forward(self.model, batches, look, self.split) for token in tokens]
        if self.split is None:
            return found
        predicts = self.split.positions(batches[0].tokens_BS.shape[1]).tolist()
        return [replace(token, position=predicts[token.position - 1] + 1) for token in found]

    def evaluate(self, batches: Sequence[MicroBatch], objective: Objective) -> dict[str, float]:
        """The objective's metrics without a step: means over all replicas' tokens."""
        self.model.eval()
        results = pipeline.forward(self.model, batches, self._at_rows(objective), self.split) if batches else []
        return self._means(results, objective)

    def measure(
        self, batches: Sequence[MicroBatch], read: Callable[[MicroBatch, Logits], dict[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        """By micro-batch what `read` makes of it and of the student at its learnt tokens, by name [T, ...], also where
        `read` sees a part of the whole micro-batch; [] on all but the last stage. Collective over the replica."""
        self.model.eval()

        def at_rows(batch: MicroBatch, hidden_BSD: torch.Tensor) -> dict[str, torch.Tensor]:
            at_tokens = self._logits if self.fp8.head else partial(head.at_rows, self.gpt)
            return read(batch, at_tokens(batch, hidden_BSD))

        found = pipeline.forward(self.model, batches, at_rows, self.split) if batches else []
        if self.split is None:
            return found
        both = zip(found, batches[: len(found)], strict=True)
        return [{name: self.split.whole(x, batch) for name, x in its.items()} for its, batch in both]

    def logits(self, batch: MicroBatch) -> torch.Tensor | None:
        """Of one micro-batch at its learnt tokens, [T, L], on the last stage; None elsewhere."""
        self.model.eval()
        found = pipeline.forward(self.model, [batch], lambda b, hidden_BSD: self._logits(b, hidden_BSD), self.split)
        if not found:
            return None
        return found[0] if self.split is None else self.split.whole(found[0], batch)

    def gradients(self, batches: Sequence[MicroBatch], objective: Objective) -> list[torch.Tensor]:
        """This rank's gradients of the summed loss in host memory, not reduced over anything. No step is made."""
        self.model.train()
        self.model.zero_grad_buffer()
        with fusions.unreduced(self.model, self.gpt.config):
            pipeline.train(self.model, batches, self._at_rows(objective), self.split)
        scale = self._loss_scale()
        made = [p.main_grad.float().cpu() / scale for p in self.gpt.parameters() if p.requires_grad]
        self.model.zero_grad_buffer()
        return made

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor) pairs on the leader of each replica; a collective (see weights.export)."""
        return weights.export(self.gpt, self.arch, self.parallel)

    def export_adapters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The same for the adapters alone, under the names of peft's files; nothing without adapters."""
        return weights.export_adapters(self.gpt, self.parallel) if self.lora.rank else iter(())

    def _means(self, results: list[Sums], objective: Objective) -> dict[str, float]:
        """Means over the tokens of all micro-batches and replicas, on every rank; without those that have no token."""
        names = objective.metric_names()
        speaks = self.parallel.is_last_stage and self.parallel.tensor_rank == 0
        totals_M2 = rows(names, results if speaks else [], groups.device())
        dist.all_reduce(totals_M2)
        num_tokens = totals_M2[names.index("loss"), 1].item()
        return {"num_tokens": num_tokens, **means(names, totals_M2)}

    def _at_rows(self, objective: Objective) -> pipeline.AtTheEnd:
        """The objective at the end of the last stage, on what predicts learnt tokens."""

        def at_rows(batch: MicroBatch, hidden_BSD: torch.Tensor) -> Any:
            loss, num_tokens, sums = objective(batch, self._output(objective, batch, hidden_BSD))
            return (loss, num_tokens, sums) if torch.is_grad_enabled() else sums

        return at_rows

    def _output(self, objective: Objective, batch: MicroBatch, hidden_BSD: torch.Tensor) -> Logits:
        if objective.takes_hidden and len(batch.predicted_at_T) and not self.fp8.head:
            return replace(head.at_rows(self.gpt, batch, hidden_BSD), upstream=self._loss_scale())
        return self._logits(batch, hidden_BSD)

    def _loss_scale(self) -> float:
        """Factor of the loss in the backward pass."""
        return 1.0 if self.scaler is None else float(self.scaler.scale)

    def _logits(self, batch: MicroBatch, hidden_BSD: torch.Tensor) -> torch.Tensor:
        return head.logits(head.at_rows(self.gpt, batch, hidden_BSD), self.fp8.head)


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """What of a skipped step's metrics can be told."""
    return {**{name: x for name, x in metrics.items() if math.isfinite(x)}, "step/skipped": 1.0}
