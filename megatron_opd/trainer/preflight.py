"""Checks of a config against its models and files before a rank starts, and the inputs that they read on the way.

They read config.json files, headers of weights, tokenizers and prompt files; they load no weights and need no process
group. All problems are reported at once. `megatron-opd check` runs this, and every run begins with it.
"""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from megatron_opd.config import (
    Config,
    DataConfig,
    LoraConfig,
    LossConfig,
    ParallelConfig,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from megatron_opd.config.checks_serving import check_vocabulary
from megatron_opd.config.file import ConfigError
from megatron_opd.core.types import Prompt
from megatron_opd.loss.crosstok.pieces import read_pieces
from megatron_opd.loss.divergences import DIVERGENCES, GKD
from megatron_opd.models.architecture import check_layout, is_known, read_architecture, read_limits
from megatron_opd.models.headers import check_tensors
from megatron_opd.models.lora_layout import check_targets
from megatron_opd.models.tokenizer import Tokenizer, difference, foreign_ends, load_tokenizer
from megatron_opd.models.torch_dist_dir import is_torch_dist
from megatron_opd.precision import fits as precision
from megatron_opd.prompts.chat import Encoder, build_encoder
from megatron_opd.prompts.fingerprint import DataRecord, Fingerprint
from megatron_opd.prompts.mix import Limit, read_prompts
from megatron_opd.prompts.store import PackedPrompts
from megatron_opd.prompts.views import RowReader, build_row_reader, build_views
from megatron_opd.rewards import build_reward
from megatron_opd.rewards.base import Reward
from megatron_opd.rollout import sampling
from megatron_opd.sglang import serve
from megatron_opd.sglang.weights import fp8_weights
from megatron_opd.sglang.weights.transports import check_sync
from megatron_opd.trainer.reward_trial import problems_of_rows

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Everything that a run reads besides weights."""

    train: list[tuple[SourceConfig, Sequence[Prompt]]]
    eval: list[tuple[SourceConfig, Sequence[Prompt]]]
    eos_ids: tuple[int, ...]
    vocab_size: int
    """Entries that distributions are normalised over and that may be sampled: those that every model has."""
    data: DataRecord = field(default_factory=lambda: DataRecord(train=[], eval=[]))
    """Fingerprints of the sources, to be compared when the run goes on another time."""
    notes: tuple[str, ...] = ()
    """Lines for the user: prompts that were left out, how answers are graded here."""
    longest_prompt: int = 0
    """Tokens."""


def read_inputs(config: Config, *, rows_to_try: int = 64) -> Inputs:
    """Check the config against the models and files that it names. Raises ConfigError listing every problem.

    `rows_to_try` is the largest number of rows of a source whose tests are tried: tests that no answer fails are a
    problem.
    """
    problems: list[str] = []
    limits = _limits(config.student, config.teachers, config.parallel, config.lora, problems)
    problems += _not_asked(config.teachers, config.train)
    of_ends: list[str] = []
    tokenizer = _tokenizers(config.student.model, config.teachers, config.data, problems, of_ends)
    if tokenizer is None:
        raise ConfigError(problems)
    # A model that cannot be read is reported above; the prompts are checked all the same.
    vocab_size = min((entries for entries, _ in limits), default=len(tokenizer))
    context = min((positions for _, positions in limits), default=sys.maxsize)
    if vocab_size < len(tokenizer):
        problems.append(
            f"the tokenizer of student.model has {len(tokenizer)} tokens, but one of the models has only"
            f" {vocab_size} entries in its vocabulary"
        )
    problems += check_vocabulary(config.rollout, config.teachers, vocab_size)
    problems += check_sync(config.rollout)
    problems += fp8_weights.problems(config.rollout, config.student)
    problems += _check_divergence(config.loss)
    unfit, of_precision = precision.look(
        config.precision,
        config.student,
        teachers=config.teachers,
        parallel=config.parallel,
        train=config.train,
        is_deterministic=config.run.deterministic,
    )
    problems += unfit
    encoder = _attempt("data", lambda: build_encoder(config.data, tokenizer), problems)
    if encoder is None:
        raise ConfigError(problems)
    read = _Reader(config, encoder, context, problems, rows_to_try)
    inputs = Inputs(
        train=read.sources("data.train", config.data.train, are_graded=config.is_graded),
        eval=read.sources("data.eval", config.data.eval, are_graded=True),
        eos_ids=tokenizer.eos_ids,
        vocab_size=vocab_size,
        data=DataRecord(train=read.fingerprints["data.train"], eval=read.fingerprints["data.eval"]),
        notes=(
            *read.notes,
            *(reward.note for reward in read.rewards.values() if reward and reward.note),
            *of_precision,
            *sampling.notes(config.rollout, config.loss),
            *of_ends,
        ),
        longest_prompt=max(read.longest, default=0),
    )
    if problems:
        raise ConfigError(problems)
    return inputs


def _check_divergence(loss: LossConfig) -> list[str]:
    """The settings do not know the formulas, so `config/checks.py` cannot check this."""
    if loss.divergence not in DIVERGENCES:
        return [f"loss.divergence must be one of {', '.join(DIVERGENCES)}, not {loss.divergence}"]
    if loss.kind == "sampled" and loss.divergence != GKD:
        return [f"loss.kind: sampled is reverse KL, so loss.divergence must be {GKD}, not {loss.divergence}"]
    return []


@contextmanager
def _collecting(what: str, problems: list[str]) -> Iterator[None]:
    """A block whose ValueError becomes one of the problems, with the name of the setting before it."""
    try:
        yield
    except ValueError as error:
        problems.append(f"{what}: {error}")


def _attempt(what: str, compute: Callable[[], _T], problems: list[str]) -> _T | None:
    """The result, or None where it raises ValueError, which becomes one of the problems."""
    with _collecting(what, problems):
        return compute()
    return None


def _limits(
    student: StudentConfig,
    teachers: list[TeacherConfig],
    parallel: ParallelConfig,
    lora: LoraConfig,
    problems: list[str],
) -> list[tuple[int, int]]:
    """(entries of the vocabulary, longest context) of the student and the teachers; shorter if one cannot be read."""
    fits = functools.partial(_on_our_ranks, parallel=parallel, lora=lora, problems=problems)
    found = [fits("student.model", student.model, student.vocab_multiple)]
    for i, teacher in enumerate(teachers):
        what = f"teachers.{i}.model"
        if teacher.tokenizer == "student" and not teacher.is_served:
            # Its embedding is padded as the layout needs it: its head is cut along the student's shards anyway.
            found.append(fits(what, teacher.model, parallel.tensor))
            continue
        with _collecting(what, problems):
            if teacher.tokenizer == "own":  # another vocabulary, and another number of tokens
                read_architecture(teacher.model)
            elif teacher.carrier == "hidden":  # only its head is applied here
                arch = read_architecture(teacher.model)
                found.append((arch.vocab_size, arch.max_positions))
            else:
                found.append(read_limits(teacher.model))
    return [limits for limits in found if limits is not None]


def _not_asked(teachers: list[TeacherConfig], train: TrainConfig) -> list[str]:
    """Problems of the settings that load teachers into transformers."""
    return [
        f"teachers.{i}.model: train.{name} needs a Hugging Face directory, and {teacher.model} is a Megatron"
        " checkpoint; turn it off, or convert with tools/convert_checkpoint.py megatron-to-hf"
        for name in ("eval_teachers", "eval_agreement")
        for i, teacher in enumerate(teachers)
        if getattr(train, name) and is_torch_dist(teacher.model)
    ]


def _on_our_ranks(
    what: str, model: str, vocab_multiple: int, *, parallel: ParallelConfig, lora: LoraConfig, problems: list[str]
) -> tuple[int, int] | None:
    arch = _attempt(what, lambda: read_architecture(model, vocab_multiple=vocab_multiple), problems)
    if arch is None:
        return None
    wrong = _attempt(what, lambda: check_tensors(model, arch), problems)
    problems += [f"{what}: {problem}" for problem in wrong or []]
    problems += check_layout(arch, parallel, what=what)
    problems += check_targets(arch, lora) if what == "student.model" else []
    return arch.vocab_size, arch.max_positions


def _tokenizers(
    model: str, teachers: list[TeacherConfig], data: DataConfig, problems: list[str], notes: list[str]
) -> Tokenizer | None:
    """The student's tokenizer, whose directory is `model`, after comparing every teacher's with it. `notes` gets a
    warning for teachers with other end-of-sequence tokens."""
    student = _tokenizer("student.model", model, problems)
    for i, teacher in enumerate(teachers):
        theirs = _tokenizer(f"teachers.{i}.model", teacher.model, problems)
        if not student or not theirs:
            continue
        if teacher.tokenizer == "own":
            with _collecting("student.model", problems):
                read_pieces(student)
            with _collecting(f"teachers.{i}.model", problems):
                read_pieces(theirs)
            with _collecting(f"teachers.{i}.model", problems):
                build_encoder(data, theirs)
        elif why := difference(student, theirs):
            problems.append(
                f"teachers.{i}.model: the tokenizer of teacher '{teacher.name}' is not the student's: {why};"
                f" teachers.{i}.tokenizer: own compares them by their text"
            )
        elif why := foreign_ends(student, theirs):
            notes.append(
                f"warning: teachers.{i}.model: teacher '{teacher.name}': {why}. Then answers continue behind an end, or"
                " the teacher gives the student's end no probability: put the same ends into eos_token_id of both"
                " models' generation_config.json"
            )
    return student


def check_model(model: str | Path, student: str) -> None:
    """Raises ConfigError when a model cannot answer for `student`, the directory of student.model.

    The model may be of a family that only transformers knows; the engine then looks at its tensors.
    """
    problems: list[str] = []
    wrong = _attempt("--model", lambda: _wrong_tensors(model), problems)
    problems += [f"--model: {problem}" for problem in wrong or []]
    theirs = _tokenizer("--model", str(model), problems)
    why = difference(load_tokenizer(student), theirs) if theirs else None
    if why:
        problems.append(f"--model: its tokenizer is not that of student.model: {why}")
    if problems:
        raise ConfigError(problems)


def _wrong_tensors(model: str | Path) -> list[str]:
    if is_known(model):
        return check_tensors(model, read_architecture(model))
    read_limits(model)
    return []


def _tokenizer(what: str, model: str, problems: list[str]) -> Tokenizer | None:
    if not Path(model).is_dir():
        return None  # the missing config.json is reported already
    return _attempt(what, lambda: load_tokenizer(model), problems)


@dataclass(frozen=True, slots=True)
class _Reader:
    config: Config
    encoder: Encoder
    context: int
    problems: list[str]
    rows_to_try: int
    notes: list[str] = field(default_factory=list)
    longest: list[int] = field(default_factory=list)
    """Tokens of each source's longest prompt."""
    fingerprints: dict[str, list[Fingerprint]] = field(default_factory=lambda: defaultdict(list))
    """By data.train and data.eval, of the sources that could be read."""
    rewards: dict[str, Reward | None] = field(default_factory=dict)
    """By name; None for one that cannot be built, which is reported already."""

    def sources(
        self, setting: str, sources: list[SourceConfig], *, are_graded: bool
    ) -> list[tuple[SourceConfig, Sequence[Prompt]]]:
        # A server keeps some positions of its context for itself.
        room = self.context - self.config.rollout.max_new_tokens - (serve.MARGIN if self.config.is_served else 0)
        if room < 1:
            problem = (
                f"rollout.max_new_tokens ({self.config.rollout.max_new_tokens}) leaves no room for a prompt in the"
                f" models' context of {self.context} tokens"
            )
            if problem not in self.problems:
                self.problems.append(problem)
            return []
        limit, why = self.config.data.max_prompt_tokens, "data.max_prompt_tokens"
        if room < limit:
            limit, why = room, f"the models' context of {self.context} tokens less rollout.max_new_tokens"
        within = Limit(limit, why, drop=self.config.data.on_too_long == "drop")
        found: list[tuple[SourceConfig, Sequence[Prompt]]] = []
        for source in sources:
            reward = self._reward(source.reward)
            if reward is None:
                continue
            read = functools.partial(read_prompts, source, self.encoder, limit=within, reward=reward)
            rows = functools.partial(self._rows, source, within, is_trained_on=setting == "data.train")
            prompts = None
            with _collecting("data", self.problems):
                prompts = read(is_graded=are_graded and (reward.grades or setting == "data.train"), complete=rows())
            found.append((source, prompts or []))
            if prompts and prompts.fingerprint:
                self.fingerprints[setting].append(prompts.fingerprint)
            if prompts:
                self.longest.append(prompts.longest)
            if prompts and are_graded and reward.grades:
                self._try(source, prompts, reward)
            if prompts and prompts.dropped:
                self.notes.append(_dropped(f"{setting}: {source.name}", prompts, within))
        return found

    def _rows(self, source: SourceConfig, limit: Limit, *, is_trained_on: bool) -> RowReader | None:
        config = self.config
        return build_row_reader(
            build_views(config.teachers, config.data, source, self.encoder),
            self.encoder,
            limit=limit,
            answers=config.answers,
            max_answer_tokens=config.rollout.max_new_tokens,
            is_trained_on=is_trained_on,
            is_measured=config.train.eval_nll and not is_trained_on,
        )

    def _try(self, source: SourceConfig, prompts: Sequence[Prompt], reward: Reward) -> None:
        """Report the rows whose tests cannot tell right answers from wrong ones."""
        if reward.trial is None or not self.rows_to_try:
            return
        workers = self.config.rewards.code_workers
        wrong, note = problems_of_rows(source, prompts, reward.trial, most=self.rows_to_try, workers=workers)
        self.problems.extend(f"data: {problem}" for problem in wrong)
        self.notes.extend([note] if note else [])

    def _reward(self, name: str) -> Reward | None:
        if name not in self.rewards:
            self.rewards[name] = _attempt(
                f"reward {name}", lambda: build_reward(name, self.config.rewards), self.problems
            )
        return self.rewards[name]


def _dropped(what: str, prompts: PackedPrompts, limit: Limit) -> str:
    """A line about the prompts that were left out of a source; a warning when they are more than a tenth."""
    total = len(prompts) + prompts.dropped
    line = f"{what}: left out {prompts.dropped} of {total} prompts, longer than {limit.tokens} tokens ({limit.why})"
    return f"warning: {line}" if prompts.dropped > total / 10 else line
