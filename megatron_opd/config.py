"""The one description of a run: frozen dataclasses, filled from YAML plus `section.key=value` overrides.

Every setting has its one-line documentation under it (`docs/config.md` is generated from these lines), and everything
that can be known to be wrong without loading a model is said here, all problems at once, each naming its setting.
Checks that need a model or a tokenizer live in `preflight.py`. This module imports nothing of ours.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
import yaml

_T = TypeVar("_T")


def _section(cls: type[_T]) -> type[_T]:
    """A frozen, keyword-only dataclass that pydantic validates strictly about names (unknown keys are errors)."""
    made = dataclasses.dataclass(frozen=True, kw_only=True, slots=True)(cls)
    made.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return made


@_section
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    dir: str
    """Directory of the run: checkpoints, metrics, logs, export. The same command on the same directory resumes."""
    seed: int = 1234
    """Seeds the order of prompts, every sampled token and dropout: same seed, same numbers."""
    timeout_s: float = 1800.0
    """Seconds a rank waits for another one in a collective before the run stops with an error."""


@_section
class ParallelConfig:
    """How the student (and the in-process teachers) are spread over ranks; ranks = tensor x pipeline x data."""

    tensor: int = 1
    """Tensor-parallel size: every matrix and the vocabulary are split this many ways."""
    pipeline: int = 1
    """Pipeline-parallel size: the layers are split into this many stages."""
    data: int = 1
    """Data-parallel size: replicas, each with its own slice of the prompts."""
    sequence: bool = False
    """Sequence parallelism: activations between matrices are split over the tensor-parallel ranks too."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


@_section
class StudentConfig:
    """The model that learns."""

    model: str
    """Hugging Face directory of the student: config.json, safetensors, tokenizer."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and activations; with bf16 the optimizer keeps fp32 master weights."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recompute: none, only attention (selective), or every layer (full)."""
    vocab_multiple: int = 1
    """Pad the vocabulary to a multiple of this; it must make the vocabulary divisible by parallel.tensor."""


@_section
class TeacherConfig:
    """One teacher, run in-process on the student's layout, forward only."""

    name: str
    """Name of the teacher in metrics (kl/<name>) and messages."""
    model: str
    """Hugging Face directory of the teacher; its tokenizer must be the student's."""
    weight: float = 1.0
    """Weight in the ensemble for every prompt source not listed in `sources`; weights are normalised per source."""
    sources: dict[str, float] = dataclasses.field(default_factory=dict)
    """Weight by prompt source (routing): 0 means that this teacher is never asked about that source."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the teacher's weights and activations."""
    offload: bool = False
    """Keep the weights in host memory while the teacher is not scoring (no effect without a GPU)."""

    def weight_for(self, source: str) -> float:
        """Unnormalised ensemble weight of this teacher for prompts of `source`."""
        return self.sources.get(source, self.weight)


@_section
class LossConfig:
    """What the student minimises on its own tokens: D(teachers, student), averaged over response tokens."""

    beta: float = 1.0
    """0: forward KL(teacher||student); 1: reverse KL(student||teacher); between: generalized JSD(beta) of GKD."""
    ensemble: Literal["logits", "probs"] = "logits"
    """How several teachers become one target: average of logits (geometric) or of probabilities (arithmetic)."""
    temperature: float = 1.0
    """Both student and teacher logits are divided by this in the loss; independent of rollout.temperature."""
    chunk_tokens: int = 1024
    """Tokens whose teacher distribution exists at one time; bounds the memory of the loss."""


@_section
class RolloutConfig:
    """How the student samples its own answers."""

    engine: Literal["local"] = "local"
    """local: the embedded engine, transformers with a KV cache inside the leader rank of each replica."""
    prompts_per_step: int = 16
    """Prompts sampled in one step, over all data-parallel replicas."""
    samples_per_prompt: int = 1
    """Answers sampled for each prompt."""
    max_new_tokens: int = 128
    """Longest answer in tokens, the end-of-sequence token included."""
    temperature: float = 1.0
    """Sampling temperature during training; evaluation is greedy."""


@_section
class SourceConfig:
    """One file of prompts."""

    name: str
    """Name of the source: the key for teacher routing and the column in evaluation tables."""
    path: str
    """JSON Lines file; each line an object with `prompt` and, for evaluation, `answer`."""
    weight: float = 1.0
    """Share of this source in a batch, relative to the other sources."""


@_section
class DataConfig:
    """The prompts."""

    train: list[SourceConfig]
    """Sources to sample training prompts from."""
    eval: list[SourceConfig] = dataclasses.field(default_factory=list)
    """Sources to evaluate on (greedy, exact match with `answer`)."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens; a longer one is an error that names the line."""


@_section
class OptimConfig:
    """Adam, its schedule and gradient clipping."""

    lr: float = 1e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay from lr to min_lr over train.steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Adam's first moment decay."""
    beta2: float = 0.95
    """Adam's second moment decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    distributed: bool = True
    """Shard optimizer state over data-parallel replicas (Megatron's distributed optimizer)."""


@_section
class TrainConfig:
    """The loop."""

    steps: int
    """Optimizer steps of the whole run."""
    micro_batch_size: int = 8
    """Sequences in one forward pass of one replica; gradients accumulate over the micro-batches of a step."""
    eval_every: int = 0
    """Evaluate every this many steps, and before the first and after the last; 0: never."""
    eval_teachers: bool = False
    """Also measure each teacher's own accuracy once, before the first step (loads it whole on one rank)."""
    save_every: int = 0
    """Save a checkpoint every this many steps and after the last; 0: only after the last."""
    keep_last: int = 2
    """Complete checkpoints kept; older ones are removed after a newer one is complete."""
    export: bool = True
    """Write the final student as a Hugging Face directory, <run.dir>/hf."""


@_section
class LogConfig:
    """Where metrics go besides the console and <run.dir>/metrics.jsonl, which are always on."""

    tensorboard: bool = False
    """Also write TensorBoard event files to <run.dir>/tensorboard."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Also log to Weights & Biases; offline writes to <run.dir>/wandb."""
    wandb_project: str = "megatron-opd"
    """Project name for Weights & Biases."""


@_section
class Config:
    """A whole run."""

    run: RunConfig
    """Where the run lives and what makes it repeatable."""
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    """The layout of ranks."""
    student: StudentConfig
    """The model that learns."""
    teachers: list[TeacherConfig]
    """The models it learns from."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    """What is minimised."""
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    """How answers are sampled."""
    data: DataConfig
    """The prompts."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """The optimizer."""
    train: TrainConfig
    """The loop."""
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    """Extra metric sinks."""

    def teacher_weights(self, source: str) -> list[float]:
        """Ensemble weights of all teachers for prompts of `source`, in config order, summing to 1."""
        raw = [t.weight_for(source) for t in self.teachers]
        return [w / sum(raw) for w in raw]


class ConfigError(ValueError):
    """One or more problems with the user's settings; the message lists all of them."""

    def __init__(self, problems: list[str], where: str = "config") -> None:
        self.problems = problems
        head = f"{where}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__("\n".join([head, *(f"  - {p}" for p in problems)]))


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides (values are YAML) and check everything.

    Lists are addressed by index: `teachers.0.weight=0.5`. Raises ConfigError listing every problem.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError([f"there is no such file: {path}"], where="config")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError([f"not valid YAML: {error}"], where=str(path)) from None
    if not isinstance(tree, dict):
        raise ConfigError(["expected a mapping of sections (run, student, teachers, …)"], where=str(path))
    for override in overrides:
        _apply_override(tree, override)
    return from_dict(tree, where=str(path))


def from_dict(tree: dict[str, Any], where: str = "config") -> Config:
    """Build and check a Config from plain dictionaries and lists. Raises ConfigError listing every problem."""
    try:
        config = pydantic.TypeAdapter(Config).validate_python(tree)
    except pydantic.ValidationError as error:
        raise ConfigError([_explain(e) for e in error.errors()], where) from None
    problems = check(config)
    if problems:
        raise ConfigError(problems, where)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved config, every default written out, as plain data."""
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError([f"'{override}' is not of the form section.key=value"], where="command line")
    *parents, last = dotted.split(".")
    node: Any = tree
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = yaml.safe_load(text)
    except (IndexError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError([f"cannot set {dotted}: {error}"], where="command line") from None


def _explain(error: Any) -> str:
    """One pydantic error as one sentence that names the setting, with the nearest name for an unknown one."""
    where = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            *parents, name = [str(part) for part in error["loc"]]
            near = difflib.get_close_matches(name, _field_names(parents), n=1, cutoff=0.5)
            hint = f"; did you mean {'.'.join([*parents, near[0]])}?" if near else ""
            return f"{where}: unknown setting{hint}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{where}: required, but not set"
        case _:
            return f"{where}: {error['msg']} (got {error['input']!r})"


def _field_names(parents: list[str]) -> list[str]:
    """Names of the settings one level below `parents` (list indices are skipped)."""
    cls: Any = Config
    for part in parents:
        if part.isdigit():
            continue
        cls = field_class(cls, part)
        if cls is None:
            return []
    return [f.name for f in dataclasses.fields(cls)]


def field_class(cls: Any, name: str) -> Any:
    """The section class behind field `name` of section `cls` (also inside list[...]), or None for a plain value."""
    annotation = str(cls.__annotations__.get(name, ""))
    inner = annotation.removeprefix("list[").removesuffix("]")
    found = globals().get(inner)
    return found if dataclasses.is_dataclass(found) else None


def check(config: Config) -> list[str]:
    """Every problem that the settings alone reveal, each naming the setting to change."""
    return [*_check_numbers(config), *_check_layout(config), *_check_teachers(config)]


def _check_numbers(config: Config) -> list[str]:
    at_least_one = {
        "parallel.tensor": config.parallel.tensor,
        "parallel.pipeline": config.parallel.pipeline,
        "parallel.data": config.parallel.data,
        "student.vocab_multiple": config.student.vocab_multiple,
        "loss.chunk_tokens": config.loss.chunk_tokens,
        "rollout.prompts_per_step": config.rollout.prompts_per_step,
        "rollout.samples_per_prompt": config.rollout.samples_per_prompt,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
        "data.max_prompt_tokens": config.data.max_prompt_tokens,
        "train.steps": config.train.steps,
        "train.micro_batch_size": config.train.micro_batch_size,
        "train.keep_last": config.train.keep_last,
    }
    not_negative = {
        "train.eval_every": config.train.eval_every,
        "train.save_every": config.train.save_every,
        "optim.lr": config.optim.lr,
        "optim.min_lr": config.optim.min_lr,
        "optim.warmup_steps": config.optim.warmup_steps,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.clip_grad": config.optim.clip_grad,
    }
    positive = {
        "loss.temperature": config.loss.temperature,
        "rollout.temperature": config.rollout.temperature,
        "run.timeout_s": config.run.timeout_s,
        "optim.eps": config.optim.eps,
    }
    problems = [f"{name} must be at least 1, not {value}" for name, value in at_least_one.items() if value < 1]
    problems += [f"{name} must not be negative, but is {value}" for name, value in not_negative.items() if value < 0]
    problems += [f"{name} must be above 0, not {value}" for name, value in positive.items() if value <= 0]
    if not 0 <= config.loss.beta <= 1:
        problems.append(f"loss.beta must lie between 0 (forward KL) and 1 (reverse KL), not {config.loss.beta}")
    if config.optim.min_lr > config.optim.lr:
        problems.append(f"optim.min_lr ({config.optim.min_lr}) must not be above optim.lr ({config.optim.lr})")
    if config.optim.warmup_steps >= max(config.train.steps, 1) and config.optim.warmup_steps:
        problems.append(
            f"optim.warmup_steps ({config.optim.warmup_steps}) must be below train.steps ({config.train.steps})"
        )
    return problems


def _check_layout(config: Config) -> list[str]:
    parallel, problems = config.parallel, []
    if min(parallel.tensor, parallel.pipeline, parallel.data, config.train.micro_batch_size) < 1:
        return []
    if parallel.sequence and parallel.tensor == 1:
        problems.append("parallel.sequence needs parallel.tensor > 1")
    if config.rollout.prompts_per_step % parallel.data:
        problems.append(
            f"rollout.prompts_per_step ({config.rollout.prompts_per_step}) must be a multiple of"
            f" parallel.data ({parallel.data})"
        )
        return problems
    per_replica = config.rollout.prompts_per_step // parallel.data * config.rollout.samples_per_prompt
    if per_replica % config.train.micro_batch_size:
        problems.append(
            f"train.micro_batch_size ({config.train.micro_batch_size}) must divide the {per_replica} answers of a"
            " replica (rollout.prompts_per_step x rollout.samples_per_prompt / parallel.data)"
        )
    return problems


def _check_teachers(config: Config) -> list[str]:
    problems = []
    if not config.teachers:
        problems.append("teachers: at least one teacher is needed")
    for field in ("train", "eval"):
        names = [s.name for s in getattr(config.data, field)]
        problems += [f"data.{field}: the name '{n}' is used twice" for n in sorted({n for n in names if names.count(n) > 1})]
    if not config.data.train:
        problems.append("data.train: at least one source is needed")
    problems += [f"data.train: weight of '{s.name}' must be above 0, not {s.weight}" for s in config.data.train if s.weight <= 0]
    names = [t.name for t in config.teachers]
    problems += [f"teachers: the name '{n}' is used twice" for n in sorted({n for n in names if names.count(n) > 1})]
    known = {s.name for s in [*config.data.train, *config.data.eval]}
    for i, teacher in enumerate(config.teachers):
        if min([teacher.weight, *teacher.sources.values()]) < 0:
            problems.append(f"teachers.{i} ({teacher.name}): weights must not be negative")
        for source in sorted(set(teacher.sources) - known):
            near = difflib.get_close_matches(source, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(f"teachers.{i}.sources: there is no prompt source '{source}'{hint}")
    for source in sorted(known) if config.teachers else []:
        if sum(max(t.weight_for(source), 0) for t in config.teachers) <= 0:
            problems.append(f"teachers: every weight for prompt source '{source}' is 0; give one teacher a weight")
    return problems
