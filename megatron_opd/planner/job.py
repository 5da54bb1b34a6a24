"""What is planned: a config with the sizes of its models and the lengths of its sequences."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_opd.config import Config, ParallelConfig, ServersConfig, TeacherConfig
from megatron_opd.config.models import Recompute
from megatron_opd.models.architecture import Architecture, check_layout, read_architecture
from megatron_opd.planner.gpus import GPUS, Assumed, Gpu

ANY_GPU = next(iter(GPUS))
"""For what the kind of GPU makes no difference to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything that the arithmetic needs."""

    config: Config
    student: Architecture
    teachers: tuple[Architecture | None, ...]
    """None: a family that we do not know, which only servers can hold."""
    gpu_name: str
    prompt: float
    """Mean length of a prompt in tokens."""
    response: float
    """Mean number of tokens behind a prompt: of an answer, or of all turns of an episode with what answers them."""
    on_gpu: bool = True
    """Whether RMSNorm is one kernel and products of bf16 have float32 sums; on CPUs PyTorch has a chain of operations
    in float32, and operands are converted."""
    assumed: Assumed = field(default_factory=Assumed)

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.gpu_name]

    @property
    def longest(self) -> int:
        """Padded length of the longest sequence."""
        multiple = self.config.parallel.length_multiple
        return -(-self.config.longest // multiple) * multiple

    @property
    def through_trainer(self) -> float:
        """Tokens of a mean sequence that go through student and in-process teachers, padding included."""
        return self.prompt + self.response if self.config.train.packing else self.longest

    @property
    def sequences(self) -> int:
        """Answers of a step, of all replicas."""
        return self.config.rollout.prompts_per_step * self.config.rollout.samples_per_prompt

    @property
    def micro_batches(self) -> int:
        """Of a replica in a step."""
        return max(self.sequences // self.config.parallel.data // self.config.train.micro_batch_size, 1)

    @property
    def inside(self) -> list[tuple[TeacherConfig, Architecture]]:
        """The teachers on the trainer's ranks."""
        both = zip(self.config.teachers, self.teachers, strict=True)
        return [(t, arch) for t, arch in both if not t.is_served and arch is not None]

    @property
    def telling_hidden(self) -> list[tuple[TeacherConfig, Architecture]]:
        """The teachers whose output heads are on the trainer's ranks."""
        both = zip(self.config.teachers, self.teachers, strict=True)
        return [(t, arch) for t, arch in both if t.carrier == "hidden" and arch is not None]

    def with_layout(self, parallel: ParallelConfig, *, recompute: Recompute, micro_batch_size: int) -> Job:
        """The same on another layout."""
        config = replace(
            self.config,
            parallel=parallel,
            student=replace(self.config.student, recompute=recompute),
            train=replace(self.config.train, micro_batch_size=micro_batch_size),
        )
        inside = [not t.is_served for t in config.teachers]
        both = zip(self.teachers, inside, strict=True)
        padded = tuple(_padded(arch, parallel.tensor) if arch and mine else arch for arch, mine in both)
        return replace(self, config=config, teachers=padded)

    def problems(self) -> list[str]:
        """Why the models cannot be put on the layout at all."""
        layout, found = self.config.parallel, check_layout(self.student, self.config.parallel, what="student.model")
        for teacher, arch in self.inside:
            found += check_layout(arch, layout, what=f"teacher {teacher.name}")
        return found


def _padded(arch: Architecture, tensor: int) -> Architecture:
    """Teachers on the trainer's ranks are padded as the layout needs it."""
    return replace(arch, padded_vocab_size=-(-arch.vocab_size // tensor) * tensor)


def gpus_of(servers: ServersConfig) -> int:
    """GPUs that servers of ours take; of running ones, of which only addresses are known, `tensor` a url."""
    return servers.tensor * (len(servers.urls) or servers.count)


def build(config: Config, *, gpu: str = ANY_GPU, prompt: float | None = None, response: float | None = None) -> Job:
    """Read the config.json of every model; lengths that are not given are the longest that the config allows.

    Raises ValueError for models that cannot be read, for an unknown GPU, and for impossible lengths.
    """
    problems: list[str] = [] if gpu in GPUS else [f"--gpu {gpu} is not known; known: {', '.join(GPUS)}"]
    limits = {"--prompt": config.data.max_prompt_tokens, "--response": config.longest_response}
    for (option, limit), mean in zip(limits.items(), (prompt, response), strict=True):
        if mean is not None and not 1 <= mean <= limit:
            problems.append(f"{option} {mean:g} must lie between 1 and the longest that the config allows, {limit}")
    student = None
    try:
        student = read_architecture(config.student.model, vocab_multiple=config.student.vocab_multiple)
    except ValueError as error:
        problems.append(f"student.model: {error}")
    tensor = config.parallel.tensor
    teachers = [_teacher(f"teachers.{i}.model", t, tensor, problems) for i, t in enumerate(config.teachers)]
    if problems or student is None:
        raise ValueError("\n".join(["this config cannot be planned:", *(f"  - {p}" for p in problems)]))
    return Job(
        config=config,
        student=student,
        teachers=tuple(teachers),
        gpu_name=gpu,
        prompt=prompt or config.data.max_prompt_tokens,
        response=response or config.longest_response,
    )


def _teacher(what: str, teacher: TeacherConfig, tensor: int, problems: list[str]) -> Architecture | None:
    inside = not teacher.is_served
    try:
        return read_architecture(teacher.model, vocab_multiple=tensor if inside else 1)
    except ValueError as error:
        if inside or "is not supported" not in str(error):
            problems.append(f"{what}: {error}")
        return None
