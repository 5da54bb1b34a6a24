"""Answers of the student with the teachers' scores, which a step learns from; and the way back, new weights.

    sample ──► release ──► score ──► … ──► sync

`release` and the room that `sync` makes matter to servers on the trainer's own GPUs only (`rollout/colocated.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from megatron_opd.config import AnswersConfig, Config, Fp8Config, ParallelConfig, TrainConfig
from megatron_opd.core.batching import pack, packing_for, renormalised
from megatron_opd.core.episodes import once_an_episode
from megatron_opd.core.named_weights import drain
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.protocols import Part, RolloutEngine
from megatron_opd.core.types import MicroBatch, Prompt, Rollout
from megatron_opd.models.tokenizer import Tokenizer, load_tokenizer
from megatron_opd.precision.fp8_plan import length_multiple
from megatron_opd.prompts.mix import PromptMix
from megatron_opd.rewards.grading import Grader, Watcher
from megatron_opd.rollout import colocated, sampling
from megatron_opd.rollout.ahead import Ahead
from megatron_opd.rollout.answers import Answers
from megatron_opd.rollout.engines import build_answers, build_engine
from megatron_opd.rollout.episode_engine import with_environments
from megatron_opd.rollout.worlds import build_worlds
from megatron_opd.sglang import serve
from megatron_opd.student import groups
from megatron_opd.student.student import Student
from megatron_opd.teachers import ask_all
from megatron_opd.teachers.scorer import TeacherScorer
from megatron_opd.trainer.evaluate import Evaluator
from megatron_opd.trainer.finished import Finished
from megatron_opd.trainer.origin_weights import weighted
from megatron_opd.trainer.preflight import Inputs
from megatron_opd.trainer.together import Together

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Leader:
    """The parts that only the leader of a replica has."""

    engine: RolloutEngine
    answers: Answers | None
    """Who answers beside the student; None: nobody."""
    grader: Grader | Watcher | None
    """None where training answers are not graded."""
    evaluator: Evaluator
    tokenizer: Tokenizer


def build_leader(config: Config, served: Config, parallel: Parallel, inputs: Inputs) -> Leader | None:
    """The leader's parts on a leader, None on the other ranks. `served` is `config` with the urls of its servers."""
    if not parallel.is_leader:
        return None
    ids: dict[str, Any] = {"eos_ids": inputs.eos_ids, "vocab_size": inputs.vocab_size}
    tokenizer = load_tokenizer(config.student.model)
    room = inputs.context - (serve.MARGIN if config.is_served else 0)
    worlds = build_worlds(config.data, config.environment, config.teachers, tokenizer, context=room)
    engine = with_environments(build_engine(served, parallel, **ids), worlds)
    grader = Grader if config.is_graded else Watcher
    return Leader(
        engine=engine,
        answers=build_answers(served, engine, **ids) if config.answers.has_others else None,
        grader=grader(config.data.train, config.rewards, tokenizer) if config.has_rewards else None,
        evaluator=Evaluator(config.data, config.rewards, config.rollout, config.run, tokenizer, worlds),
        tokenizer=tokenizer,
    )


class Experience:
    """Samples, scores and packs on this rank; and takes the new weights."""

    def __init__(
        self, config: Config, parallel: Parallel, teachers: Sequence[TeacherScorer], leader: Leader | None
    ) -> None:
        self.config, self.parallel, self.teachers, self.leader = config, parallel, teachers, leader
        rollout = config.rollout
        self.shares_gpus = rollout.shares_gpus
        """Whether nobody can sample between `release` and `sync`, because the trainer has the engine's GPUs then."""
        self.sends_weights = parallel.data_rank == 0 or not rollout.is_served
        """Whether `sync` gathers this replica's weights: servers are everybody's, and get those of the first."""
        self.drawn = sampling.drawn(rollout, samples=rollout.samples_per_prompt, seed=config.run.seed)
        sources = [source.name for source in (*config.data.train, *config.data.eval)]
        self.weights_by_source = {source: config.teacher_weights(source) for source in sources}
        self.packing = packing_settings(config.train, config.precision.fp8, config.parallel, parallel)
        """The arguments of `pack` for what the student is to see."""
        self.together: Callable[[], AbstractContextManager[None]]
        self.together = Together(parallel) if config.is_served else nullcontext
        """Guards work for which some ranks talk to servers."""
        self.ahead: Ahead | None = None
        self.finished = Finished()
        """Counts this replica's training answers; an episode is one."""
        self._grading_s: dict[int, float] = {}
        """Seconds of grading, by step."""

    def start(self, prompts: PromptMix) -> None:
        """Draw training prompts from here on; `prompts` are where a resumed run has them."""
        config = self.config
        self.ahead = Ahead(
            prompts,
            self.answers_to if self.parallel.is_leader else None,
            num_prompts=config.rollout.prompts_per_step,
            max_staleness=config.rollout.max_staleness,
            num_steps=config.train.steps,
        )

    @property
    def cursor(self) -> dict[str, int]:
        """Place in the prompts behind the rollouts of the last `sample`."""
        assert self.ahead is not None
        return self.ahead.cursor

    @property
    def parts(self) -> list[Part]:
        """The parts that count what happens and that are closed at the end."""
        leader = (self.leader.engine, self.leader.answers) if self.leader else ()
        return [part for part in (*leader, *self.teachers) if part is not None]

    def close(self) -> None:
        """End what runs beside the loop."""
        if self.ahead is not None:
            self.ahead.close()
        for part in self.parts:
            part.close()

    def sample(self, step: int) -> list[Rollout]:
        """This replica's rollouts of a step, on all its ranks; steps come one by one."""
        assert self.ahead is not None, "prompts are drawn from `start` on"
        return self.parallel.share(self.ahead.take(step))

    def answers_to(self, step: int, prompts: list[Prompt]) -> list[Rollout]:
        """The leader's rollouts of its share of the prompts of all replicas, graded where rewards are wanted.

        Each goes to the served teachers as soon as it is finished.
        """
        assert self.leader is not None, "leaders sample"
        how = replace(self.drawn, seed=self.drawn.seed + step)

        count = once_an_episode(lambda: self.finished.add(step))

        def told(rollout: Rollout) -> None:
            self._submit(rollout)
            count(rollout)

        if self.leader.answers is None:
            rollouts = self.leader.engine.generate(self.mine(prompts), how, on_finished=told)
        else:
            rollouts = self.leader.answers.to(self.mine(prompts), how, step, on_finished=told)
        if self.leader.grader is None:
            return rollouts
        began = time.perf_counter()
        rewards = self.leader.grader.grade(rollouts)
        self._grading_s[step] = time.perf_counter() - began
        return [replace(rollout, reward=reward) for rollout, reward in zip(rollouts, rewards, strict=True)]

    def grading(self, step: int) -> tuple[float, list[str]]:
        """(seconds that this leader has graded the step's answers, warnings about it that nobody has heard yet)."""
        if self.leader is None or self.leader.grader is None:
            return 0.0, []
        return self._grading_s.pop(step, 0.0), self.leader.grader.news()

    def score(self, rollouts: list[Rollout], teachers: Sequence[TeacherScorer] | None = None) -> list[MicroBatch]:
        """Micro-batches of rollouts with the scores of every teacher that has a weight for their source."""
        answers = self.config.answers
        weights = [teacher_weights(self.weights_by_source, answers, r) for r in rollouts]
        scores = ask_all(self.teachers if teachers is None else teachers, rollouts, weights)
        batches = pack(
            rollouts,
            **self.packing,
            scores=scores,
            weights=renormalised(rollouts, weights, scores),
        )
        return weighted(answers, batches, rollouts, weights) if answers.lmbda < 1 else batches

    def release(self) -> None:
        """An engine on our GPUs gives their memory back until the next `sync`; nobody samples any more. Does nothing
        with any other engine. Collective over all ranks."""
        if self.shares_gpus:
            with self.together():
                if self.leader is not None:
                    self.leader.engine.release()

    def sync(self, student: Student, version: int) -> None:
        """The student's weights into the engine, which samples from them then. Collective over all ranks."""
        if self.shares_gpus:
            colocated.make_room(self.parallel)
        with self.together():
            weights = student.export() if self.sends_weights else iter(())
            if self.leader is None:
                drain(weights)
            else:
                self.leader.engine.load(weights, version)

    def settle(self) -> None:
        """Wait until nothing is being sampled."""
        assert self.ahead is not None
        with self.together():
            self.ahead.settle()

    def mine(self, prompts: list[_T]) -> list[_T]:
        """This replica's share; strided, so that every replica sees every source."""
        return prompts[self.parallel.data_rank :: self.parallel.data_size]

    def _submit(self, rollout: Rollout) -> None:
        weights = teacher_weights(self.weights_by_source, self.config.answers, rollout)
        for teacher, weight in zip(self.teachers, weights, strict=True):
            if weight > 0:
                teacher.submit(rollout)


def teacher_weights(by_source: Mapping[str, list[float]], answers: AnswersConfig, rollout: Rollout) -> list[float]:
    """Ensemble weights of all teachers for a rollout, in their order; all 0 where none is asked about it."""
    weights = by_source[rollout.prompt.source]
    is_asked = rollout.origin == "student" or answers.distill_alpha > 0
    return weights if is_asked else [0.0] * len(weights)


def packing_settings(train: TrainConfig, fp8: Fp8Config, layout: ParallelConfig, parallel: Parallel) -> dict[str, Any]:
    """The arguments of `pack` that follow from the settings, for what the student is to see."""
    return {
        "micro_batch_size": train.micro_batch_size,
        "length_multiple": length_multiple(fp8, layout, shards=parallel.length_multiple),
        "packing": packing_for(train.packing, parallel),
        "device": groups.device(),
    }
