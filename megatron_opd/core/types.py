"""What travels between the parts: prompts, rollouts, teacher scores and micro-batches. Data only, no behaviour.

Shapes: R learnt tokens of one rollout, T learnt tokens of a micro-batch, B sequences, S padded length,
D teacher hidden size, K ids that a teacher lists for a token, N teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, Literal, Protocol, TypeAlias

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question for the student."""

    source: str
    """Name of the prompt source: the routing key for teachers and the column in tables."""
    index: int
    """Line or row of the source (from 0); with `source` it identifies the row."""
    text: str
    """What the row asks; of messages, the last one's content. Templates and special tokens are only in `token_ids`."""
    token_ids: tuple[int, ...]
    answer: str | None = None
    """Reference answer, where the source's reward needs one; for `exact` the text that a right response decodes to."""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What else of its row the source's reward needs, as it is in the file."""
    answer_ids: tuple[int, ...] = ()
    """`answer` as a response, its end-of-sequence token included; only where runs train on
    answers of the data set, or measure their cross-entropy."""
    teacher_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    """By name, what a teacher sees instead of `token_ids`; only those that see something else."""
    repeat: int = 0
    """How often the row was drawn before in the same step, on whichever replica; the draws are prompts of their own."""

    @property
    def group(self) -> tuple[str, int, int]:
        """What the answers to one draw of the row have in common: they are compared with each other."""
        return self.source, self.index, self.repeat


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
    """Which of the prompt's samples this is, from 0."""
    part: int = 0
    """Which of its episode's trajectories this is, from 0."""
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


@dataclass(frozen=True, slots=True)
class Hidden:
    """A teacher's final hidden states for one rollout: row r predicts `learnt_ids[r]`.

    `hidden_RD` is None on ranks that do not compute the loss (all but the last pipeline stage): what is dense stays
    where it is used.
    """

    hidden_RD: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class TopK:
    """A teacher's K log-probabilities for each token of one rollout, over its full vocabulary at temperature 1.

    Row r holds `learnt_ids[r]` always: where it is not among the K likeliest it stands in place of the K-th. Order is
    free. An id that is listed twice counts once; ids outside the vocabulary are fillers.
    """

    ids_RK: torch.Tensor
    """int64."""
    logp_RK: torch.Tensor
    """float32, nats."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A teacher's log-probability of each `learnt_ids[r]` of one rollout, at temperature 1."""

    logp_R: torch.Tensor
    """float32, nats."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A teacher's final hidden states at its own tokens of one rollout's learnt text, and where the two cuts meet."""

    hidden_QD: torch.Tensor | None
    """Row q predicts `ids_Q[q]`; None on ranks that do not compute the loss."""
    ids_Q: torch.Tensor
    """int64, of the teacher's vocabulary."""
    spans_G4: torch.Tensor
    """int64; student tokens [first, stop), counted among the learnt ones, and rows [first, stop) of `hidden_QD` of the
    same bytes."""


TeacherScore: TypeAlias = Hidden | TopK | Sampled | Foreign
"""What a teacher says about one rollout, by its carrier; in a micro-batch about all its tokens, so R is T there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Right-padded sequences for one forward pass, and everything the loss needs about their T learnt tokens.

    Every field is filled. Neutral values (weights of 1, advantages of 0) stand where nothing special is wanted; which
    terms a loss has is the objective's matter.
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
    """What each of the N teachers says about the T tokens, fillers where its weight is 0; None for a teacher that was
    asked about none of them, and for hidden states on ranks that do not compute the loss."""
    distill_T: torch.Tensor
    """float32; weight of the distillation term at each token."""
    advantage_T: torch.Tensor
    """float32; advantage of each token, its share in the mean included."""
    sft_T: torch.Tensor
    """float32; weight of the cross-entropy -log q(y) at each token."""
    on_policy_T: torch.Tensor
    """bool; whether the student sampled the token."""

    @property
    def model_shape(self) -> tuple[int, int]:
        """(rows, tokens of each) that a model sees."""
        return (1 if self.is_packed else len(self.tokens_BS)), self.row_length


OnFinished: TypeAlias = Callable[[Rollout], None]
"""Receives each answer as soon as it is finished, from any thread."""
NamedWeights: TypeAlias = Iterator[tuple[str, torch.Tensor]]
"""(Hugging Face name, full tensor) pairs."""


class RolloutEngine(Protocol):
    """Something that samples from the student's current weights."""

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        """All samples of all prompts, in order (prompt-major); never a short list. `on_finished` is told of each answer
        as soon as it is finished, from any thread."""

    def load(self, weights: NamedWeights, version: int) -> None:
        """Replace the weights by (Hugging Face name, full tensor) pairs; later rollouts carry `version`."""

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, to be summed over replicas."""

    def close(self) -> None:
        """End what runs beside the caller; requests under way fail."""


class OwnHead(Protocol):
    """A teacher's output head that makes its product itself, because that is not the plain one of two tensors.

    Shape letters: C tokens, L rows (columns of the logits), D hidden size.
    """

    shape: torch.Size
    """[L, D]."""
    dtype: torch.dtype
    """Of hidden states and logits."""
    device: torch.device

    def logits(self, hidden_CD: torch.Tensor, out_CL: torch.Tensor | None = None) -> torch.Tensor:
        """h Wᵀ without a gradient, [C, L], where there is an `out_CL` into that."""

    def is_finite(self) -> bool:
        """Whether all of its numbers are."""


Head: TypeAlias = torch.Tensor | OwnHead
"""Rows of an output head, [L, D]."""


class TeacherScorer(Protocol):
    """Something that tells a teacher's distribution at every learnt token of a rollout."""

    name: str
    head_LD: Head | None
    """This rank's rows of the output head, where scores are hidden states and the loss is computed here; else None."""

    def submit(self, rollout: Rollout) -> None:
        """Start scoring a rollout that `score` will be asked about; on leaders, from any thread. May do nothing."""

    def score(self, rollouts: list[Rollout]) -> list[TeacherScore]:
        """One score a rollout, in order. Collective over the ranks of a replica."""

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, to be summed over replicas."""

    def close(self) -> None:
        """End what runs beside the caller."""
