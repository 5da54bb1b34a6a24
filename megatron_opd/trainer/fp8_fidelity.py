"""FP8's effect on teachers, target, student and gradient, measured on answers of the student to held-out prompts.

Every model is asked twice about the same tokens, with FP8 and without. A teacher in FP8 is loaded a second time for
that, one after the other, and given back afterwards; the student has its FP8 switched off.

Shape suffixes: T tokens, C tokens of a chunk, L local columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.config import Config, Fp8Config
from megatron_opd.core.parallel import Parallel, PeerError
from megatron_opd.core.scores import Head, Level, TeacherScore
from megatron_opd.core.types import MicroBatch, Prompt, Rollout
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss import kl, reverse_kl
from megatron_opd.loss.objective import Objective
from megatron_opd.loss.targets import Targets
from megatron_opd.loss.told import chunks
from megatron_opd.precision.gate import Measured, Noise, too_coarse
from megatron_opd.student.student import Student
from megatron_opd.teachers import build_teacher, fp8_plan
from megatron_opd.teachers.scorer import TeacherScorer
from megatron_opd.tracking.tracker import Tracker
from megatron_opd.trainer.experience import Experience
from megatron_opd.trainer.preflight import Inputs

Pack = Callable[[list[Rollout], Sequence[TeacherScorer]], list[MicroBatch]]
"""Rollouts to micro-batches with the scores of given teachers."""


@dataclass
class FidelitySums:
    """Running sums over tokens, by name: KL, largest KL, agreements, tokens."""

    by_name: dict[str, list[float]] = field(default_factory=dict)
    signal: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add(self, name: str, kl_C: torch.Tensor, same_C: torch.Tensor) -> None:
        if not len(kl_C):
            return
        sums = self.by_name.setdefault(name, [0.0, 0.0, 0.0, 0.0])
        sums[0] += float(kl_C.double().sum())
        # A NaN must not lose against a number, as it does in max().
        largest = float(kl_C.max())
        sums[1] = largest if largest != largest else max(sums[1], largest)
        sums[2] += float(same_C.double().sum())
        sums[3] += len(kl_C)


def held_out(inputs: Inputs, count: int) -> list[Prompt]:
    """`count` prompts of data.eval, or of data.train where there is none, of all sources in turn."""
    sources = [list(prompts[:count]) for _, prompts in inputs.eval or inputs.train]
    in_turn = [prompt for row in zip_longest(*sources) for prompt in row if prompt is not None]
    return in_turn[:count]


def judge(measured: Measured, fp8: Fp8Config, parallel: Parallel, tracker: Tracker) -> None:
    """Say and log what was measured. Raises ValueError (PeerError on the other ranks) where that is refused."""
    tracker.log(measured.metrics(), 0)
    for line in measured.lines():
        tracker.message(line)
    problems = too_coarse(measured, fp8)
    if not problems:
        return
    text = "\n".join(problems)
    if fp8.on_exceed == "warn":
        tracker.message(f"warning: {text}")
    elif parallel.is_main:
        raise ValueError(f"{text}\n(precision.fp8.on_exceed=warn trains all the same)")
    else:
        raise PeerError(text)


def measure_held_out(experience: Experience, student: Student, objective: Objective, inputs: Inputs) -> Measured:
    """Measured on answers of the student to held-out prompts. Collective over all ranks."""
    config, parallel = experience.config, experience.parallel
    prompts = held_out(inputs, config.precision.fp8.check_prompts)
    with experience.together():
        rollouts = parallel.share(lambda: experience.answers_to(0, prompts))
    experience.release()
    with experience.together():
        plain = without_fp8(config, experience.teachers, parallel, objective.distillation.vocab)
        return measure(student, (experience.teachers, plain), objective, rollouts, experience.score)


def without_fp8(
    config: Config, teachers: Sequence[TeacherScorer], parallel: Parallel, vocab: VocabShard
) -> list[TeacherScorer | _Plain]:
    """The teachers as they would be without FP8: those that have none are the same."""
    return [
        _Plain(asked.name, partial(build_teacher, asked, config, parallel, vocab, in_fp8=False))
        if (plan := fp8_plan(asked, config.precision, config.parallel)) is not None and plan.rules
        else scorer
        for asked, scorer in zip(config.teachers, teachers, strict=True)
    ]


def measure(
    student: Student,
    teachers: tuple[Sequence[TeacherScorer], Sequence[Any]],
    objective: Objective,
    rollouts: list[Rollout],
    pack: Pack,
) -> Measured:
    """Compare the teachers, as they are and as `without_fp8` makes them, and the student with and without FP8.

    Collective over all ranks; every rank gets the same numbers. The student's weights stay as they are.
    """
    scorers, plain = teachers
    with_fp8 = pack(rollouts, scorers) if rollouts else []
    if rollouts:
        without = pack(rollouts, plain)
    else:  # a replica without answers still takes part in the loading
        without = []
        for teacher in plain:
            teacher.score([])
    heads = tuple(teacher.head_LD for teacher in plain)
    exact = replace(objective, distillation=replace(objective.distillation, heads=heads))
    sums = FidelitySums()
    for batch, reference in zip(with_fp8, without, strict=True):
        student_TL = student.logits(batch)
        with student.fp8.off():
            reference_TL = student.logits(reference)
        if student_TL is not None and reference_TL is not None:
            _compare(sums, (objective, batch, student_TL), (exact, reference, reference_TL))
    names = [*(teacher.name for teacher in objective.distillation.teachers), "ensemble", "student"]
    error = _gradient_error(student, (with_fp8, objective), (without, exact))
    return _collected(sums, names, error, student.parallel)


class _Plain:
    """A teacher as it would be without FP8, which exists while it scores; its head stays."""

    offloaded = None  # its model fetches its weights itself

    def __init__(self, name: str, build: Callable[[], TeacherScorer]) -> None:
        self.name, self._build = name, build
        self.head_LD: Head | None = None

    def score(self, rollouts: list[Rollout]) -> list[TeacherScore]:
        teacher = self._build()
        self.head_LD = teacher.head_LD
        scores = teacher.score(rollouts)
        teacher.close()
        return scores


Side = tuple[Objective, MicroBatch, torch.Tensor]
"""With FP8, or without: the objective, the micro-batch, and the student's logits [T, L] at its learnt tokens."""


@torch.no_grad()
def _compare(sums: FidelitySums, fp8: Side, plain: Side) -> None:
    """Adds up a micro-batch, on the ranks of the last stage."""
    objective, batch, _ = plain
    term = objective.distillation
    settings, vocab = term.config, term.vocab
    for level, rows in chunks(batch, settings.chunk_tokens):
        targets, students = [], []
        for side, told, logits_TL in (fp8, plain):
            target = Targets(settings, vocab, side.distillation.heads).at(told, rows, level)
            logp_CL = vocab.log_softmax(logits_TL[rows], settings.temperature)
            targets.append(target)
            students.append(logp_CL)
        sums.add("student", kl(students[1], students[0], vocab), _same_top(students, vocab))
        if level is not Level.EXACT:
            continue  # what servers list is not ours to compute in FP8
        logps = [target.logp for target in targets]
        sums.add("ensemble", kl(logps[1], logps[0], vocab), _same_top(logps, vocab))
        signal_C = reverse_kl(students[1], logps[1], vocab)
        sums.signal[0] += float(signal_C.double().sum())
        sums.signal[1] += len(signal_C)
        asked_CN = batch.weights_TN[rows] > 0
        for n, teacher in enumerate(term.teachers):
            both = [told.logp_CL for target in targets if (told := target.told[n]) is not None]
            if len(both) == 2 and all(logp_CL is not None for logp_CL in both):
                noisy, own = (logp_CL[asked_CN[:, n]] for logp_CL in both)
                sums.add(teacher.name, kl(own, noisy, vocab), _same_top([noisy, own], vocab))


def _same_top(logps: Sequence[torch.Tensor], vocab: Any) -> torch.Tensor:
    """Whether two distributions [C, L] have the same likeliest token, [C]."""
    ids = []
    for logp_CL in logps:
        best_C, at_C = logp_CL.max(dim=-1)
        overall_C = vocab.all_reduce(best_C.clone(), dist.ReduceOp.MAX)
        # Of equally likely ones the lowest id, on every shard alike.
        id_C = torch.where(best_C == overall_C, at_C + vocab.start, torch.full_like(at_C, vocab.size))
        ids.append(vocab.all_reduce(id_C, dist.ReduceOp.MIN))
    return ids[0] == ids[1]


def _gradient_error(student: Student, fp8: tuple[Any, Objective], plain: tuple[Any, Objective]) -> float:
    """Over all ranks' own gradients, before they are summed over replicas."""
    totals = torch.zeros(2, dtype=torch.float64)
    if fp8[0]:
        alike = sum(batch.tokens_BS.shape == fp8[0][0].tokens_BS.shape for batch in fp8[0])  # the last may be smaller
        noisy = student.gradients(fp8[0][:alike], fp8[1])
        with student.fp8.off():
            own = student.gradients(plain[0][:alike], plain[1])
        for a, b in zip(noisy, own, strict=True):
            totals += torch.tensor([float((a - b).double().pow(2).sum()), float(b.double().pow(2).sum())])
    dist.all_reduce(totals, group=student.parallel.world_group)
    error, norm = totals.tolist()
    return (error / norm) ** 0.5 if norm else 0.0


def _collected(sums: FidelitySums, names: Sequence[str], gradient_error: float, parallel: Parallel) -> Measured:
    """Over the replicas; the ranks of a last stage have the same numbers, so one of them speaks for each replica."""
    everyone = parallel.gather_world((sums.by_name, sums.signal) if parallel.counts_whole else ({}, [0.0, 0.0]))
    noises = []
    for name in names:
        found = [by_name[name] for by_name, _ in everyone if name in by_name]
        if found:
            total, largest, same, count = (list(column) for column in zip(*found, strict=True))
            noises.append(Noise(name, sum(total) / sum(count), max(largest), sum(same) / sum(count)))
    total, count = (sum(signal[i] for _, signal in everyone) for i in range(2))
    tokens = sum(by_name["student"][3] for by_name, _ in everyone if "student" in by_name)
    return Measured(total / count if count else 0.0, tuple(noises), gradient_error, int(tokens))
