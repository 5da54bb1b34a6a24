"""The data that travels between the parts: prompts, rollouts and micro-batches; `scores.py` has the teachers' scores.

Shapes: R learnt tokens of one rollout, T learnt tokens of a micro-batch, B sequences, S padded length,
N teachers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, Literal

import torch

from megatron_opd.core.scores import TeacherScore


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question for the student."""

    source: str
    """Name of the prompt source: the routing key for teachers and the column in tables."""
    index: int
    """Line or row of the source (from 0); with `source` it identifies the row."""
    text: str
    """Text of the prompt; the last message's content where the row has messages. Templates and special tokens are only
    in `token_ids`."""
    token_ids: tuple[int, ...]
    answer: str | None = None
    """Reference answer, where the source's reward needs one; for `exact` the text that a right response decodes to."""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other fields of its row that the source's reward needs, as they are in the file."""
    answer_ids: tuple[int, ...] = ()
    """`answer` as a response, its end-of-sequence token included; only where runs train on
    answers of the data set, or measure their cross-entropy."""
    teacher_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    """By name, what a teacher sees instead of `token_ids`; only those that see something else."""
    messages: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    """Messages that `token_ids` show, the system's included; only where an environment adds others to them."""
    teacher_messages: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict, hash=False)
    """By name, the messages that `teacher_ids` show; only where an environment adds others to them."""
    repeat: int = 0
    """How often the row was drawn before in the same step, on whichever replica; the draws are prompts of their own."""

    @property
    def group(self) -> tuple[str, int, int]:
        """The key that the answers to one draw of the row share: they are compared with each other."""
        return self.source, self.index, self.repeat

    def seen_by(self, teacher: str) -> Prompt:
        """The prompt with the token ids that the teacher of this name sees: its own where it has some
        (`teachers.N.prompt_field`, `prompt_template`, `system_prompt`), else these."""
        ids = self.teacher_ids.get(teacher)
        return self if ids is None else replace(self, token_ids=ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How answers are drawn. `temperature` 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    samples_per_prompt: int = 1
    seed: int = 0
    """Every token's random number follows from (seed, prompt, sample), the prompt's `repeat` included, so it does not
    depend on layout or batching."""

    def seed_of(self, prompt: Prompt, sample: int, turn: int = 0) -> int:
        """The seed of one turn's random numbers in any engine, in [0, 2^63); a plain answer is turn 0."""
        again = f"/repeat {prompt.repeat}" if prompt.repeat else ""
        later = f"/turn {turn}" if turn else ""
        text = f"{self.seed}/{prompt.source}/{prompt.index}/{sample}{again}{later}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeLog:
    """How an episode went; its trajectories share it. The default is a plain answer's, of one turn."""

    turns: int = 1
    """Turns of the policy."""
    calls: int = 0
    """Tools that it called."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Calls that failed, by reason."""
    ended: str = ""
    """Why it ended: `answered`, `done` (the environment said so), `length` (a turn was cut), `max_turns`, `context`,
    `timeout`, `failed` (the environment raised an error), `empty` (it said nothing to a call, or what has no tokens);
    empty for a plain answer."""
    rewards: tuple[float, ...] = ()
    """The environment's reward of each turn."""
    info: Mapping[str, float] = field(default_factory=dict)
    """The environment's own numbers."""
    why: str = ""
    """The failure in words, where `ended` is `failed` or `timeout`."""


PLAIN = EpisodeLog()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One trajectory: a prompt and all tokens behind it, which a model reads as one sequence.

    The tokens of `origin` are learnt. Between them there may be tokens that something else wrote, such as a tool or an
    environment: models see those, and nothing is learnt on them. A plain answer has learnt tokens only; its
    end-of-sequence token, when it was sampled, is the last.

    An episode is one trajectory or several, all of the same sample of the same prompt. A further one begins where a
    chat template rewrites what came before, so its `prompt` has other `token_ids`. They share the reward, the group of
    the advantage, and one weight in means over answers. In lists they follow each other in order. No sampled token is
    learnt twice: what one trajectory learns is context in the later ones.
    """

    prompt: Prompt
    sample: int
    """Number of this sample among the prompt's, from 0."""
    part: int = 0
    """Number of this trajectory in its episode, from 0."""
    token_ids: tuple[int, ...]
    """All tokens behind the prompt."""
    learnt: tuple[bool, ...]
    """Whether each of `token_ids` is learnt. `logps` and `versions` have an entry for each one that is, in order."""
    logps: tuple[float, ...]
    """Behaviour log-probability of each learnt token under the sampler's own (tempered) distribution, in nats."""
    finish: str
    """"stop": ended by end-of-sequence; "length": cut at max_new_tokens."""
    versions: tuple[int, ...]
    """Version of the weights that sampled each learnt token (the step that produced them)."""
    origin: Literal["student", "teacher", "dataset"] = "student"
    """Who wrote the learnt tokens. Of others than the student `logps` and `versions` mean nothing to it."""
    reward: float | None = field(default=None, compare=False)
    """How good the episode is, from 0 to 1; None where it was not graded. It comes later than the rest, and a graded
    rollout is still the one that teachers were asked about."""
    log: EpisodeLog = field(default=PLAIN, compare=False)
    """How its episode went."""

    def __post_init__(self) -> None:
        """Raises ValueError where the numbers of tokens disagree."""
        counts = len(self.token_ids), len(self.learnt), sum(self.learnt), len(self.logps), len(self.versions)
        if counts[0] != counts[1] or len(set(counts[2:])) > 1:
            what = "{} tokens with {} entries of the mask; {} learnt tokens with {} log-probabilities and {} versions"
            raise ValueError(what.format(*counts))

    @property
    def learnt_ids(self) -> tuple[int, ...]:
        """The learnt tokens, [R]."""
        return tuple(compress(self.token_ids, self.learnt))

    @property
    def num_learnt(self) -> int:
        """R."""
        return len(self.logps)

    def seen_by(self, teacher: str) -> Rollout:
        """The same tokens behind the prompt that the teacher of this name sees: self-distillation with privileged
        information (Snell et al. 2022, arXiv:2209.15189, call it context distillation)."""
        prompt = self.prompt.seen_by(teacher)
        return self if prompt is self.prompt else replace(self, prompt=prompt)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Right-padded sequences for one forward pass, and everything the loss needs about their T learnt tokens.

    Every field is filled. Distillation has weight 1 where nothing special is wanted; which terms a loss has is the
    objective's matter.
    """

    tokens_BS: torch.Tensor
    """int64; prompt, all tokens behind it, padding."""
    lengths: tuple[int, ...]
    """Tokens of each sequence; padding has the id of a real token, so `tokens_BS` does not tell."""
    is_packed: bool
    """Whether a model sees the sequences concatenated in one row; otherwise as they are here, a padded row each."""
    row_length: int
    """Tokens of a row that a model sees: S, or packed, the sum of `lengths` or more."""
    sequence_T: torch.Tensor
    """int64; the number of each learnt token's sequence in the micro-batch, never falling."""
    predicted_at_T: torch.Tensor
    """int64; flat position b * S + s whose output predicts the token (the next-token shift is done here)."""
    targets_T: torch.Tensor
    """int64; the learnt tokens."""
    behaviour_logp_T: torch.Tensor
    """float32; the sampler's log-probability of each."""
    weights_TN: torch.Tensor
    """float32; ensemble weights of the teachers, rows summing to 1; 0 where a teacher was not asked."""
    teachers: tuple[TeacherScore | None, ...]
    """Score of the T tokens by each of the N teachers, with fillers where its weight is 0; None for a teacher that was
    asked about none of them, and for hidden states on ranks that do not compute the loss."""
    weights_T: Mapping[str, torch.Tensor]
    """float32; by the name of a loss term, its weight at each token: `distill`, `sft` (cross-entropy), and `policy`
    (the advantage). Shares in means are included. A term without an entry has weight 0."""
    on_policy_T: torch.Tensor
    """bool; whether the student sampled the token."""

    def weight(self, term: str) -> torch.Tensor:
        """The weights of a term of the loss, [T]."""
        weight_T = self.weights_T.get(term)
        return torch.zeros_like(self.behaviour_logp_T) if weight_T is None else weight_T

    def weighing(self, **weights_T: torch.Tensor) -> MicroBatch:
        """The micro-batch with other weights [T] of the terms of these names."""
        return replace(self, weights_T={**self.weights_T, **weights_T})

    @property
    def model_shape(self) -> tuple[int, int]:
        """(rows, tokens of each) that a model sees."""
        return (1 if self.is_packed else len(self.tokens_BS)), self.row_length
