"""Checks of a config against its models and files before a rank starts, and the inputs that they read on the way.

They read config.json files, headers of weights, tokenizers and prompt files; they load no weights and need no process
group. All problems are reported at once. `megatron-opd check` runs this, and every run begins with it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from megatron_opd.config import (
    Config,
    DataConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    ParallelConfig,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    checks_environment,
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
from megatron_opd.prompts.chat import build_encoder
from megatron_opd.prompts.fingerprint import DataRecord
from megatron_opd.rollout import sampling
from megatron_opd.sglang.weights import fp8_weights
from megatron_opd.sglang.weights.transports import check_sync
from megatron_opd.trainer.source_reader import SourceReader, attempt, collecting
from megatron_opd.trainer.source_worlds import SourceWorlds

_T = TypeVar("_T")


_ALL_HERE: Mapping[str, str] = {}
"""No model is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Everything that a run reads besides weights."""

    train: list[tuple[SourceConfig, Sequence[Prompt]]]
    eval: list[tuple[SourceConfig, Sequence[Prompt]]]
    eos_ids: tuple[int, ...]
    vocab_size: int
    """Entries that distributions are normalised over and that may be sampled: those that every model has."""
    context: int = sys.maxsize
    """Positions of the model that has the fewest."""
    data: DataRecord = field(default_factory=lambda: DataRecord(train=[], eval=[]))
    """Fingerprints of the sources, to be compared when the run goes on another time."""
    notes: tuple[str, ...] = ()
    """Lines for the user: prompts that were left out, how answers are graded here."""
    longest_prompt: int = 0
    """Tokens."""


def read_inputs(config: Config, *, rows_to_try: int = 64, unavailable: Mapping[str, str] = _ALL_HERE) -> Inputs:
    """Check the config against the models and files that it names. Raises ConfigError listing every problem.

    `rows_to_try` is the largest number of rows of a source whose tests are tried: tests that no answer fails are a
    problem. `unavailable` has the reasons why models could not be had, by their names.
    """
    problems: list[str] = []
    limits = _limits(config.student, config.teachers, config.parallel, config.lora, problems, unavailable)
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
    encoder = attempt("data", lambda: build_encoder(config.data, tokenizer), problems)
    if encoder is None:
        raise ConfigError(problems)
    read = SourceReader(config, SourceWorlds(config.data, encoder), context, problems, rows_to_try)
    inputs = Inputs(
        train=read.sources("data.train", config.data.train, are_graded=config.is_graded),
        eval=read.sources("data.eval", config.data.eval, are_graded=True),
        eos_ids=tokenizer.eos_ids,
        vocab_size=vocab_size,
        context=context,
        data=DataRecord(train=read.fingerprints["data.train"], eval=read.fingerprints["data.eval"]),
        notes=(
            *read.notes,
            *(reward.note for reward in read.rewards.values() if reward and reward.note),
            *read.worlds.notes,
            *checks_environment.notes(config.environment),
            *of_precision,
            *sampling.notes(config.rollout, config.loss),
            *of_ends,
            *_of_schedule(config.optim, config.train),
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


def _limits(
    student: StudentConfig,
    teachers: list[TeacherConfig],
    parallel: ParallelConfig,
    lora: LoraConfig,
    problems: list[str],
    unavailable: Mapping[str, str],
) -> list[tuple[int, int]]:
    """(entries of the vocabulary, longest context) of the student and the teachers; shorter if one cannot be read."""
    fits = functools.partial(_on_our_ranks, parallel=parallel, lora=lora, problems=problems)

    def is_here(what: str, model: str) -> bool:
        problems.extend(f"{what}: {why}" for name, why in unavailable.items() if name == model)
        return model not in unavailable

    found = []
    if is_here("student.model", student.model):
        found.append(fits("student.model", student.model, student.vocab_multiple))
    for i, teacher in enumerate(teachers):
        what = f"teachers.{i}.model"
        if not is_here(what, teacher.model):
            continue
        if teacher.tokenizer == "student" and not teacher.is_served:
            # Its embedding is padded as the layout needs it: its head is cut along the student's shards anyway.
            found.append(fits(what, teacher.model, parallel.tensor))
            continue
        with collecting(what, problems):
            if teacher.tokenizer == "own":  # another vocabulary, and another number of tokens
                read_architecture(teacher.model)
            elif teacher.carrier == "hidden":  # only its head is applied here
                arch = read_architecture(teacher.model)
                found.append((arch.vocab_size, arch.max_positions))
            else:
                found.append(read_limits(teacher.model))
    return [limits for limits in found if limits is not None]


def _of_schedule(optim: OptimConfig, train: TrainConfig) -> list[str]:
    """A line where the run is too short for its warm-up, as one is that only tries whether all works."""
    updates = train.updates_per_step * train.steps
    if updates >= optim.warmup_steps:
        return []
    last = optim.lr * updates / optim.warmup_steps
    return [
        f"optim.warmup_steps ({optim.warmup_steps}) is more than the run's {updates} updates of the weights: it ends at"
        f" a learning rate of {last:.3g}, below optim.lr ({optim.lr:.3g})"
    ]


def _not_asked(teachers: list[TeacherConfig], train: TrainConfig) -> list[str]:
    """Problems of the settings that load teachers into transformers."""
    return [
        f"teachers.{i}.model: train.{name} needs a Hugging Face directory, and {teacher.model} is a Megatron"
        " checkpoint; turn it off, or convert with `megatron-opd convert megatron-to-hf`"
        for name in ("eval_teachers", "eval_agreement")
        for i, teacher in enumerate(teachers)
        if getattr(train, name) and is_torch_dist(teacher.model)
    ]


def _on_our_ranks(
    what: str, model: str, vocab_multiple: int, *, parallel: ParallelConfig, lora: LoraConfig, problems: list[str]
) -> tuple[int, int] | None:
    arch = attempt(what, lambda: read_architecture(model, vocab_multiple=vocab_multiple), problems)
    if arch is None:
        return None
    wrong = attempt(what, lambda: check_tensors(model, arch), problems)
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
            with collecting("student.model", problems):
                read_pieces(student)
            with collecting(f"teachers.{i}.model", problems):
                read_pieces(theirs)
            with collecting(f"teachers.{i}.model", problems):
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
    wrong = attempt("--model", lambda: _wrong_tensors(model), problems)
    problems += [f"--model: {problem}" for problem in wrong or []]
    theirs = _tokenizer("--model", str(model), problems)
    why = difference(load_tokenizer(student), theirs) if theirs else None
    if why:
        problems.append(f"--model: its tokenizer is not that of student.model: {why}")
    if problems:
        raise ConfigError(problems)


def _wrong_tensors(model: str | Path) -> list[str]:
    return check_tensors(model, read_architecture(model)) if is_known(model) else []


def _tokenizer(what: str, model: str, problems: list[str]) -> Tokenizer | None:
    if not Path(model).is_dir():
        return None  # the missing config.json is reported already
    return attempt(what, lambda: load_tokenizer(model), problems)
