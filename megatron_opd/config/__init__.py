"""The one description of a run: frozen dataclasses, one a section.

Every setting has its one-line documentation under it; `docs/config.md` is generated from these lines. Reading a config
from a file is `file.py`; what can be wrong about one is `checks*.py` (settings alone) and `preflight.py` (settings
against models and files). The sections import nothing of ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_opd.config.answers import AnswersConfig
from megatron_opd.config.crosstok import CrossTokenizerConfig
from megatron_opd.config.data import DataConfig, RewardsConfig, SourceConfig
from megatron_opd.config.environment import NONE, TOOLS, EnvironmentConfig
from megatron_opd.config.lora import LoraConfig
from megatron_opd.config.method import LossConfig, RolloutConfig
from megatron_opd.config.models import (
    ParallelConfig,
    ServersConfig,
    StudentConfig,
    TeacherConfig,
    crosses_tokenizers,
    ensemble_weights,
)
from megatron_opd.config.policy import PolicyConfig, RLConfig, has_policy_gradient
from megatron_opd.config.precision import Fp8Config, PrecisionConfig
from megatron_opd.config.run import LogConfig, OptimConfig, RunConfig, TrainConfig
from megatron_opd.config.section import HUB, section

__all__ = [
    "HUB",
    "AnswersConfig",
    "Config",
    "CrossTokenizerConfig",
    "DataConfig",
    "EnvironmentConfig",
    "Fp8Config",
    "LogConfig",
    "LoraConfig",
    "LossConfig",
    "OptimConfig",
    "ParallelConfig",
    "PolicyConfig",
    "PrecisionConfig",
    "RLConfig",
    "RewardsConfig",
    "RolloutConfig",
    "RunConfig",
    "ServersConfig",
    "SourceConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
]


@section
class Config:
    """A whole run."""

    method: str = "opd"
    """Name of the method, a preset of settings: `megatron-opd methods` lists them. Settings beside it replace the
    preset's."""
    run: RunConfig
    """The run's directory, seed and limits."""
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    """The layout of ranks."""
    student: StudentConfig
    """The model that learns."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Adapters in place of the whole student."""
    teachers: list[TeacherConfig]
    """The models that the student learns from."""
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)
    """FP8, and whose layers are used on a GPU."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    """The loss."""
    cross_tokenizer: CrossTokenizerConfig = dataclasses.field(default_factory=CrossTokenizerConfig)
    """Comparison of the student with teachers that have another tokenizer."""
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    """The policy gradient of sampled tokens."""
    rl: RLConfig = dataclasses.field(default_factory=RLConfig)
    """Reinforcement learning next to the distillation, or instead of it."""
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    """Sampling of answers."""
    answers: AnswersConfig = dataclasses.field(default_factory=AnswersConfig)
    """Origin of the training answers."""
    data: DataConfig
    """The prompts."""
    environment: EnvironmentConfig = dataclasses.field(default_factory=EnvironmentConfig)
    """The other side of a conversation: tools, or an environment of your own."""
    rewards: RewardsConfig = dataclasses.field(default_factory=RewardsConfig)
    """Grading of answers."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """The optimizer."""
    train: TrainConfig
    """The loop."""
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    """Further places for metrics."""

    @property
    def is_served(self) -> bool:
        """Whether the run depends on servers."""
        return self.rollout.is_served or any(t.is_served for t in self.teachers)

    @property
    def model_settings(self) -> dict[str, str]:
        """The first setting of each model, by the place that it names."""
        named = {t.model: f"teachers.{i}.model" for i, t in reversed(list(enumerate(self.teachers)))}
        return named | {self.student.model: "student.model"}

    @property
    def crosses_tokenizers(self) -> bool:
        """Whether teachers read the student's answers in tokens of their own."""
        return crosses_tokenizers(self.teachers)

    @property
    def has_policy_gradient(self) -> bool:
        """Whether sampled tokens get advantages."""
        return has_policy_gradient(self.policy, self.rl)

    @property
    def is_graded(self) -> bool:
        """Whether training answers need their rewards."""
        return self.rl.needs_rewards

    @property
    def has_rewards(self) -> bool:
        """Whether training answers are graded at all."""
        return self.is_graded or self.rewards.watch

    def with_models(self, places: Mapping[str, str]) -> Config:
        """The same with the models in other places, by the places that they have now."""
        moved = [dataclasses.replace(t, model=places.get(t.model, t.model)) for t in self.teachers]
        student = dataclasses.replace(self.student, model=places.get(self.student.model, self.student.model))
        return dataclasses.replace(self, student=student, teachers=moved)

    def environment_of(self, source: SourceConfig) -> EnvironmentConfig:
        """The environment of a source's prompts."""
        return source.environment.or_of(self.environment)

    @property
    def environments(self) -> list[EnvironmentConfig]:
        """The environments of all sources that have one."""
        found = [self.environment_of(source) for source in (*self.data.train, *self.data.eval)]
        return [environment for environment in found if environment.is_on]

    @property
    def plays_episodes(self) -> bool:
        """Whether training prompts have environments."""
        return any(self.environment_of(source).is_on for source in self.data.train)

    @property
    def rewards_turns(self) -> bool:
        """Whether an environment of training prompts may reward turns, which the tools that come with it do not."""
        return any(self.environment_of(source).name not in (NONE, TOOLS) for source in self.data.train)

    @property
    def longest(self) -> int:
        """Tokens of the student's longest sequence, the prompt included."""
        plain = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        sources = [self.environment_of(source) for source in (*self.data.train, *self.data.eval)]
        return max((e.max_tokens if e.is_on else plain for e in sources), default=plain)

    @property
    def longest_response(self) -> int:
        """Most tokens behind a prompt of the longest; an episode counts as one trajectory."""
        return max(self.longest - self.data.max_prompt_tokens, self.rollout.max_new_tokens)

    @property
    def longest_scored(self) -> int:
        """Tokens of the longest sequence that a teacher reads: what is behind a prompt stays as long, and a teacher's
        own prompt may be as long as data.max_prompt_tokens."""
        if not self.environments or not any(teacher.has_own_prompt for teacher in self.teachers):
            return self.longest
        return self.data.max_prompt_tokens + self.longest - 1

    @property
    def most_sampled(self) -> int:
        """Most tokens that the policy samples in a trajectory."""
        turns = [min(e.max_turns * self.rollout.max_new_tokens, e.max_tokens - 1) for e in self.environments]
        return max((self.rollout.max_new_tokens, *turns))

    def teacher_weights(self, source: str) -> list[float]:
        """Ensemble weights of all teachers for prompts of `source`, in config order, summing to 1."""
        return ensemble_weights(self.teachers, source)
