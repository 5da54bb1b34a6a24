"""How good the student is on held-out prompts, and how far from its teachers there."""

from __future__ import annotations

from megatron_opd.config import Config
from megatron_opd.core.types import Prompt, Rollout
from megatron_opd.loss.objective import Objective
from megatron_opd.student.student import Student
from megatron_opd.trainer import reference_nll
from megatron_opd.trainer.evaluate import Evaluator, Tally, means, teacher_accuracies
from megatron_opd.trainer.experience import Experience
from megatron_opd.trainer.preflight import Inputs


class HeldOut:
    """Evaluates the student of a run."""

    def __init__(self, config: Config, inputs: Inputs, experience: Experience) -> None:
        self.config, self.inputs, self.experience = config, inputs, experience
        self.leader = experience.leader
        self.evaluator = Evaluator(config, self.leader.tokenizer) if self.leader else None

    def evaluate(self, student: Student, objective: Objective, step: int) -> dict[str, float]:
        """How good held-out answers are, and the divergence to the teachers on the greedy ones.

        Nothing where the run has nothing to evaluate on. Collective over all ranks.
        """
        config, experience, parallel = self.config, self.experience, self.experience.parallel
        if not config.train.eval_every or not self.inputs.eval:
            return {}
        prompts = experience.mine([p for _, source in self.inputs.eval for p in source])
        with experience.together():
            rollouts, tally = parallel.share(lambda: self._answers(prompts))
        metrics = means(parallel.gather_leaders(tally), "eval")
        experience.release()
        with experience.together():
            batches = experience.score(rollouts) if rollouts else []
        found = student.evaluate(batches, objective)
        metrics |= {f"eval/{name}": value for name, value in found.items() if name.startswith("kl/")}
        metrics |= reference_nll.nll(student, objective.distillation.vocab, self.inputs.eval, config, parallel)
        if step == 0 and config.train.eval_teachers:
            metrics |= parallel.share_world(lambda: teacher_accuracies(self.evaluator, self.inputs))
        return metrics

    def _answers(self, prompts: list[Prompt]) -> tuple[list[Rollout], Tally]:
        assert self.leader is not None
        assert self.evaluator is not None
        return self.evaluator.answer(self.leader.engine, prompts, samples=self.config.train.eval_samples)
