"""How good the student is on held-out prompts, and how far from its teachers there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from megatron_opd.config import LossConfig, TeacherConfig, TrainConfig
from megatron_opd.core.episodes import once_an_episode
from megatron_opd.core.types import Prompt, Rollout
from megatron_opd.loss.objective import Objective
from megatron_opd.student.student import Student
from megatron_opd.tracking.phase import Phase
from megatron_opd.tracking.tracker import Tracker
from megatron_opd.trainer import episode_metrics, reference_nll
from megatron_opd.trainer.evaluate import Tally, means, num_answers, teacher_accuracies
from megatron_opd.trainer.experience import Experience
from megatron_opd.trainer.preflight import Inputs
from megatron_opd.trainer.teacher_answers import TeacherAnswers, forced_agreement, teacher_answers


class HeldOut:
    """Evaluates the student of a run."""

    def __init__(
        self,
        train: TrainConfig,
        loss: LossConfig,
        teachers: Sequence[TeacherConfig],
        inputs: Inputs,
        experience: Experience,
        tracker: Tracker,
    ) -> None:
        self.train, self.loss, self.teachers = train, loss, teachers
        self.directory = Path(experience.config.run.dir)
        self.inputs, self.experience, self.leader = inputs, experience, experience.leader
        self.tracker = tracker
        self._warnings = episode_metrics.Warnings(tracker)

    def evaluate(self, student: Student, objective: Objective, step: int) -> dict[str, float]:
        """How good held-out answers are, and the divergence to the teachers on the greedy ones.

        Nothing where the run has nothing to evaluate on. Collective over all ranks.
        """
        train, experience, parallel = self.train, self.experience, self.experience.parallel
        if not train.eval_every or not self.inputs.eval:
            return {}
        prompts = experience.mine([p for _, source in self.inputs.eval for p in source])
        what, total = f"evaluating after step {step}", num_answers(len(prompts), train.eval_samples)
        with self.tracker.phase(what, total=total, unit="answers") as phase, experience.together():
            rollouts, tally = parallel.share(lambda: self._answers(prompts, phase))
        metrics = means(parallel.gather_leaders(tally), "eval")
        if self.experience.config.environments:
            mine = episode_metrics.by_source(rollouts), episode_metrics.troubles(rollouts)
            counted, wrong = zip(*parallel.gather_leaders(mine), strict=True)
            metrics |= episode_metrics.of_held_out(counted)
            self._warnings.say(wrong)
        experience.release()
        told = bool(objective.distillation.teachers)
        with self.tracker.phase("comparing the answers with the teachers' distributions", is_told=told):
            with experience.together():
                batches = experience.score(rollouts) if rollouts else []
            found = student.evaluate(batches, replace(objective, measures_agreement=train.eval_agreement))
        metrics |= {f"eval/{name}": x for name, x in found.items() if name.startswith(("kl/", "agreement/"))}
        vocab, settings = objective.distillation.vocab, {"loss": self.loss, "packing": experience.packing}
        with self.tracker.phase("reading the reference answers", is_told=train.eval_nll):
            metrics |= reference_nll.nll(student, vocab, self.inputs.eval, train=train, **settings)
        if train.eval_agreement:
            answers = self.of_teachers
            with self.tracker.phase("reading the teachers' answers"):
                metrics |= forced_agreement(student, vocab, answers, **settings)
        if step == 0 and train.eval_teachers:
            answers = self.of_teachers
            metrics |= parallel.share_world(lambda: self._accuracies(answers))
        return metrics

    @cached_property
    def of_teachers(self) -> TeacherAnswers:
        """The teachers' answers to the prompts of all replicas, on every rank. Collective the first time."""
        return self.experience.parallel.share_world(self._ask_teachers)

    def _answers(self, prompts: list[Prompt], phase: Phase) -> tuple[list[Rollout], Tally]:
        assert self.leader is not None
        ask = self.leader.evaluator.answer
        return ask(self.leader.engine, prompts, samples=self.train.eval_samples, told=once_an_episode(phase.advance))

    def _ask_teachers(self) -> TeacherAnswers:
        assert self.leader is not None
        ask = self.leader.evaluator
        return teacher_answers(self.teachers, ask, self.inputs, self.directory, tracker=self.tracker)

    def _accuracies(self, answers: TeacherAnswers) -> dict[str, float]:
        assert self.leader is not None
        return teacher_accuracies(self.leader.evaluator, answers)
