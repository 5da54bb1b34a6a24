"""Training answers for people to read: one now and then on the console, and tables of them in
<run.dir>/completions.jsonl, and Weights & Biases where it is on; with scores of single tokens in <run.dir>/tokens.

In completions.jsonl a line is an answer. After a resume the lines and files of steps that are done again are dropped
first, as in metrics.jsonl.

Shape suffixes: T learnt tokens of a micro-batch, B its answers, N teachers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_opd.config import LogConfig
from megatron_opd.core.episodes import episodes, runs
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.run_dir import COMPLETIONS
from megatron_opd.core.types import MicroBatch, Rollout
from megatron_opd.loss.term import TeacherTerm
from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.tracking import json_lines, token_file
from megatron_opd.tracking.tracker import Tracker
from megatron_opd.trainer import shown_answer, token_tables

if TYPE_CHECKING:
    from megatron_opd.student.student import Student

AnswerLogps = list[dict[str, float | None]]
"""An answer after the other: by teacher, the log-probability in nats; None where it was not asked about the answer."""


class Completions:
    """What every rank holds; leaders tell of their answers, the main rank writes."""

    def __init__(
        self,
        config: LogConfig,
        run_dir: str | Path,
        parallel: Parallel,
        tokenizer: Tokenizer | None,
        tracker: Tracker,
        *,
        has_turns: bool = False,
    ) -> None:
        """`tokenizer` is for leaders. `has_turns`: whether lines tell of episodes in environments."""
        self.has_turns = has_turns
        self.config, self.parallel, self.tokenizer, self.tracker = config, parallel, tokenizer, tracker
        self.dir = Path(run_dir)
        self.path = self.dir / COMPLETIONS
        self.texts: token_tables.Texts | None = None
        """Texts of tokens, on the main rank from the first table on."""

    def log(
        self,
        rollouts: Sequence[Rollout],
        step: int,
        batches: Sequence[MicroBatch],
        distillation: TeacherTerm,
    ) -> None:
        """Write the step's first answers, replica by replica, and show one, if it is such a step. Collective.

        `batches` hold `rollouts` in order, with what teachers told, which `distillation` can read.
        """
        if self.config.answer_every and (step - 1) % self.config.answer_every == 0:
            self._show(rollouts, batches, distillation)
        if not self._is_due(step):
            return
        first = rollouts[: self.config.completions]
        told = answer_logps(distillation, batches, len(first), self.parallel)
        mine = []
        if self.tokenizer is not None:
            besides = [_turns(r, self.tokenizer) if self.has_turns else {} for r in first]
            both = zip(first, told, besides, strict=True)
            mine = [_row(r, logps, self.tokenizer, step) | more for r, logps, more in both]
        replicas = self.parallel.gather_leaders(mine)
        if self.parallel.is_main:
            rows = [row for replica in replicas for row in replica][: self.config.completions]
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            self.tracker.table("completions", [_flat(row) for row in rows], step)

    def look(
        self,
        student: Student,
        term: TeacherTerm,
        *,
        rollouts: Sequence[Rollout],
        batches: Sequence[MicroBatch],
        step: int,
    ) -> None:
        """Write the scores of single tokens of the same answers, if it is such a step; before its update. Collective.

        `batches` are as for `log`, with their advantages.
        """
        if not self._is_due(step):
            return
        before = sum(self.parallel.gather_leaders(len(rollouts))[: self.parallel.data_rank])
        first = rollouts[: max(self.config.completions - before, 0)]
        answers, columns = token_tables.measured(student, term, rollouts=first, batches=batches, parallel=self.parallel)
        if self.parallel.is_main and self.tokenizer is not None:
            self.texts = self.texts or token_tables.Texts(self.tokenizer)
            token_tables.write(self.dir, step, rollouts=answers, columns=columns, texts=self.texts)

    def _is_due(self, step: int) -> bool:
        every = self.config.completions_every
        return bool(every) and step % every == 0

    def _show(self, rollouts: Sequence[Rollout], batches: Sequence[MicroBatch], distillation: TeacherTerm) -> None:
        """One answer of the first replica, for people to read. Collective."""
        at = shown_answer.place(rollouts)
        told = answer_logps(distillation, batches, at + 1, self.parallel)
        if self.parallel.is_main and self.tokenizer is not None and rollouts:
            its = next(its for its in episodes(rollouts) if at in its)
            text, said = self.tokenizer.decode(rollouts[at].token_ids), _said(rollouts[at], self.tokenizer)
            for line in shown_answer.lines(rollouts[at], text, told[at], said=said, trajectories=len(its)):
                self.tracker.message(line)

    def rewind(self, step: int) -> None:
        """Drop the lines and files of steps after `step`, and what a killed run left unfinished; damaged lines are put
        aside."""
        if not self.parallel.is_main:
            return
        token_file.rewind(self.dir, step)
        kept, notes = json_lines.rewind(self.path, step) if self.path.is_file() else ([], [])
        every = self.config.completions_every
        for line in notes + json_lines.missing(self.path, kept, step - step % every if every else 0):
            self.tracker.message(line)


def _row(rollout: Rollout, told: dict[str, float | None], tokenizer: Tokenizer, step: int) -> dict[str, Any]:
    ours = rollout.origin == "student"
    return {
        "step": step,
        "source": rollout.prompt.source,
        "index": rollout.prompt.index,
        "sample": rollout.sample,
        "origin": rollout.origin,
        "prompt": rollout.prompt.text,
        "response": tokenizer.decode(rollout.token_ids),
        "length": rollout.num_learnt,
        "finish": rollout.finish,
        "logprob": sum(rollout.logps) if ours else None,
        **{f"logprob/{teacher}": logp for teacher, logp in told.items()},
        "reward": rollout.reward,
    }


def _turns(rollout: Rollout, tokenizer: Tokenizer) -> dict[str, Any]:
    """The further fields of a line in a run with environments."""
    log = rollout.log
    numbers = {"part": rollout.part, "turns": log.turns, "calls": log.calls, "ended": log.ended}
    return {**numbers, "failures": dict(log.failures), "said": [list(one) for one in _said(rollout, tokenizer)]}


def _said(rollout: Rollout, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(who, text) in order: the policy's turns, and what its environment and the template put behind them."""
    return [("policy" if is_learnt else "environment", tokenizer.decode(ids)) for is_learnt, ids in runs(rollout)]


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line for tables whose cells are texts and numbers."""
    return {name: json.dumps(x, ensure_ascii=False) if isinstance(x, list | dict) else x for name, x in row.items()}


def answer_logps(
    distillation: TeacherTerm, batches: Sequence[MicroBatch], count: int, parallel: Parallel
) -> AnswerLogps:
    """Of the first `count` answers of this replica, on all its ranks. Collective over all ranks."""
    names = [teacher.name for teacher in distillation.teachers]
    if not names:
        return [{} for _ in range(count)]
    mine: AnswerLogps = []
    for batch in batches if parallel.is_last_stage else []:
        if len(mine) < count:
            mine += [dict(zip(names, sums, strict=True)) for sums in _sums(distillation, batch)]
    everyone = parallel.gather_world((parallel.data_rank, parallel.is_last_stage, mine))
    return next(found for replica, knows, found in everyone if knows and replica == parallel.data_rank)[:count]


def _sums(distillation: TeacherTerm, batch: MicroBatch) -> list[list[float | None]]:
    """By answer, then by teacher."""
    logp_TN = distillation.each_teachers_logp(batch).double()
    sums_BN = logp_TN.new_zeros(len(batch.tokens_BS), logp_TN.shape[1]).index_add(0, batch.sequence_T, logp_TN)
    asked_BN = torch.zeros_like(sums_BN).index_add(0, batch.sequence_T, (batch.weights_TN > 0).double()) > 0
    both = zip(sums_BN.tolist(), asked_BN.tolist(), strict=True)
    return [[x if is_asked else None for x, is_asked in zip(*row, strict=True)] for row in both]
