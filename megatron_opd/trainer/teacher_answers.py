"""The teachers' own greedy answers to `data.eval`: made once, kept in the run's directory, and what they are good for.

Every evaluation asks, teacher-forced on the same answers, how often the student's likeliest token is the one that the
teacher chose. So the measure follows the student alone: neither its own answers nor a sampler move under it. As tokens,
not as text, because a text may be cut into other tokens than those that the teacher chose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

from megatron_opd.config import LossConfig, TeacherConfig
from megatron_opd.config.section import section
from megatron_opd.core.episodes import once_an_episode
from megatron_opd.core.types import Prompt, Rollout
from megatron_opd.core.vocab import VocabShard
from megatron_opd.core.whole_file import write_whole
from megatron_opd.loss.distillation import Distillation
from megatron_opd.loss.objective import Objective
from megatron_opd.loss.sampled_tokens import Likeliest
from megatron_opd.models.sampled_digest import sampled_digest
from megatron_opd.rollout.episode_engine import with_environments
from megatron_opd.student.student import Student
from megatron_opd.tracking.tracker import Tracker
from megatron_opd.trainer.evaluate import Evaluator
from megatron_opd.trainer.kept_answers import KeptAnswer, rollout_of
from megatron_opd.trainer.kept_answers import kept as as_kept
from megatron_opd.trainer.preflight import Inputs
from megatron_opd.trainer.reference_nll import token_means

ANSWERS_FILE = "teacher_answers.json"
TeacherAnswers: TypeAlias = dict[str, list[Rollout]]
"""By the teacher's name, an answer to each prompt of `data.eval`, in order: one trajectory, or an episode's."""


@section
class _Kept:
    """A teacher's answers in the file."""

    of: str
    """Digest of everything that they follow from."""
    answers: list[KeptAnswer]


def teacher_answers(
    teachers: Sequence[TeacherConfig], evaluator: Evaluator, inputs: Inputs, directory: Path, *, tracker: Tracker
) -> TeacherAnswers:
    """The answers kept in the directory. Where they are to other prompts or of other models, the teachers are loaded
    one after the other, whole, and asked."""
    path, prompts = directory / ANSWERS_FILE, [p for _, source in inputs.eval for p in source]
    kept, answers = _read(path), {}
    for teacher in teachers:
        settled = _digest(teacher, prompts, evaluator, inputs)
        if teacher.name not in kept or kept[teacher.name].of != settled:
            kept[teacher.name] = _Kept(of=settled, answers=_asked(teacher, prompts, evaluator, inputs, tracker))
            write_whole(path, json.dumps({name: asdict(its) for name, its in kept.items()}))
        answers[teacher.name] = [rollout_of(answer, prompts) for answer in kept[teacher.name].answers]
    return answers


def forced_agreement(
    student: Student, vocab: VocabShard, answers: TeacherAnswers, *, loss: LossConfig, packing: Mapping[str, Any]
) -> dict[str, float]:
    """`eval/forced_agreement/<teacher>/<source>`, also for the source `all`: the share of the answers' tokens that are
    the student's likeliest ones. `packing` are the arguments of `pack`. Collective over all ranks."""
    objective = Objective(Distillation(loss, 1.0, vocab, (), ()), (Likeliest(),))
    metrics: dict[str, float] = {}
    for name, its in answers.items():
        sources = dict.fromkeys(answer.prompt.source for answer in its)
        by_source = [(source, [a for a in its if a.prompt.source == source]) for source in sources]
        found = token_means(student, objective, "likeliest", by_source, packing=packing)
        metrics |= {f"eval/forced_agreement/{name}/{source}": value for source, value in found.items()}
    return metrics


def _asked(
    teacher: TeacherConfig, prompts: list[Prompt], evaluator: Evaluator, inputs: Inputs, tracker: Tracker
) -> list[KeptAnswer]:
    from megatron_opd.rollout.embedded_engine import LocalEngine

    with tracker.phase(f"evaluating teacher {teacher.name}", total=len(prompts), unit="answers") as phase:
        engine = LocalEngine(teacher.model, eos_ids=inputs.eos_ids, vocab_size=inputs.vocab_size)
        with closing(with_environments(engine, evaluator.worlds)) as player:
            answers = evaluator.greedy(player, prompts, once_an_episode(phase.advance))
    return as_kept(answers, prompts)


def _digest(teacher: TeacherConfig, prompts: list[Prompt], evaluator: Evaluator, inputs: Inputs) -> str:
    """Everything that the answers follow from."""
    asked = [[prompt.source, *prompt.token_ids] for prompt in prompts]
    settings = [evaluator.rollout.max_new_tokens, list(inputs.eos_ids), inputs.vocab_size, asked]
    worlds = {name: asdict(world.settings) for name, world in evaluator.worlds.items()}
    text = json.dumps([sampled_digest(teacher.model), *settings, worlds])
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _read(path: Path) -> dict[str, _Kept]:
    """The answers of the file, if it can be read: they can be made again."""
    try:
        return {name: _read_kept(its) for name, its in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}


def _read_kept(its: dict[str, Any]) -> _Kept:
    return _Kept(of=its["of"], answers=[KeptAnswer(**answer) for answer in its["answers"]])
