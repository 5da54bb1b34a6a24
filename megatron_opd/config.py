"""The one description of a run: frozen dataclasses, one a section.

Every setting has its one-line documentation under it; `docs/config.md` is generated from these lines. Reading a config
from a file is `config_file.py`; what can be wrong about one is `config_checks.py` (settings alone) and `preflight.py`
(settings against models and files). This module imports nothing of ours.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeVar, dataclass_transform

import pydantic

_T = TypeVar("_T")

HUB = "hf:"
"""Begins the path of a prompt source that is a data set of the Hugging Face hub."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def _section(cls: type[_T]) -> type[_T]:
    """A frozen, keyword-only dataclass that pydantic validates strictly about names (unknown keys are errors)."""
    made = dataclasses.dataclass(frozen=True, kw_only=True, slots=True)(cls)
    made.__pydantic_config__ = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]
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
    expert: int = 1
    """Expert-parallel size: the experts of a mixture are spread over this many of the tensor-parallel ranks; it must
    divide `tensor`."""
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
class ServersConfig:
    """SGLang servers of one model: some that run already, or some that `train` starts and ends."""

    urls: list[str] = dataclasses.field(default_factory=list)
    """Addresses of servers that run already, e.g. [http://node7:30000]; empty: start `count` on this machine."""
    count: int = 1
    """Servers to start."""
    tensor: int = 1
    """Tensor-parallel size of a server (its --tp-size), which is also the GPUs that a started one takes."""
    gpus: list[int] = dataclasses.field(default_factory=list)
    """GPUs of started servers, tensor x count of them, in order; empty: all that are visible, counted from 0."""
    host: str = "127.0.0.1"
    """Address that started servers bind to; anything but loopback needs a key in MEGATRON_OPD_API_KEY."""
    port: int = 30000
    """First port of started servers; each next one takes the next free port."""
    python: str = ".venv-sglang/bin/python"
    """Python of the environment that has SGLang, for starting servers (`make sglang` makes one without a GPU)."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type in which started servers compute; auto: student.dtype for the student's, config.json's for a teacher's."""
    args: list[str] = dataclasses.field(default_factory=list)
    """More arguments of sglang.launch_server, e.g. [--mem-fraction-static, "0.8"]."""
    start_timeout_s: float = 1800.0
    """Seconds in which a started server must be ready."""
    request_timeout_s: float = 600.0
    """Seconds in which a server must answer a request; one that does not counts as failed."""
    retries: int = 3
    """Times that a failed request is sent again, to another server where there is one, with growing pauses."""
    max_in_flight: int = 256
    """Requests that are with one server at a time; the rest wait here."""
    probe_s: float = 5.0
    """Seconds between looks at a server that failed; when it answers again, it gets the current weights and work."""
    patience_s: float = 60.0
    """Seconds to wait for one of the servers to come back when none is left; then requests fail at once."""


@_section
class TeacherConfig:
    """One teacher: in-process on the student's layout, forward only, or behind SGLang servers."""

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
    backend: Literal["megatron", "sglang"] = "megatron"
    """megatron: on the trainer's own ranks; sglang: behind the servers of `servers`, which have `model` loaded."""
    servers: ServersConfig = dataclasses.field(default_factory=ServersConfig)
    """Where the teacher is served (backend sglang)."""
    carrier: Literal["hidden", "topk", "sampled"] = "hidden"
    """What a teacher tells about a token: hidden states (exact), its top_k with their log-probabilities, or the sampled
    token's alone; megatron teachers are always exact, so they have hidden."""
    top_k: int = 64
    """Log-probabilities a token of the carrier topk; the sampled token is always one of them."""
    on_failure: Literal["fail", "renormalise"] = "fail"
    """When no server of it answers: save and stop, or go on with the other teachers, weights raised to sum to 1."""

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
    kind: Literal["distribution", "sampled"] = "distribution"
    """distribution: a divergence over the vocabulary (beta); sampled: reverse KL on the sampled token alone, as a
    policy gradient, which is all that teachers with the carrier sampled allow."""
    importance_cap: float = 2.0
    """Largest importance weight q/μ of student over sampler on a token of the kind sampled; larger ones are cut."""


@_section
class RolloutConfig:
    """How the student samples its own answers."""

    engine: Literal["local", "sglang"] = "local"
    """local: the embedded engine, transformers with a KV cache inside the leader rank of each replica; sglang: the
    servers of `servers`."""
    servers: ServersConfig = dataclasses.field(default_factory=ServersConfig)
    """Where the student samples (engine sglang)."""
    prompts_per_step: int = 16
    """Prompts sampled in one step, over all data-parallel replicas."""
    samples_per_prompt: int = 1
    """Answers sampled for each prompt."""
    max_new_tokens: int = 128
    """Longest answer in tokens, the end-of-sequence token included."""
    temperature: float = 1.0
    """Sampling temperature during training and of train.eval_samples; evaluation is greedy besides."""
    top_p: float = 1.0
    """Sample from the fewest tokens with this probability, of the 4,096 likeliest; 1: from all (engine sglang)."""
    top_k: int = 0
    """Sample from the this many likeliest tokens; 0: from all (engine sglang)."""
    max_staleness: int = 0
    """0: strictly on-policy; n: batches are sampled up to n steps ahead while the student trains (engine sglang)."""
    partial: bool = False
    """Answers that are unfinished when new weights arrive are kept and continued with those (needs max_staleness)."""
    sync: Literal["broadcast", "tensor", "disk"] = "broadcast"
    """How new weights reach the servers: broadcast (process group: NCCL, gloo without GPUs), tensor (CUDA IPC on one
    machine; inline without GPUs), or disk (a directory that the servers see too)."""
    sync_bucket_mb: int = 256
    """Weights sent at a time, in MiB; bounds the memory that a sync takes on either side."""
    sync_verify: bool = False
    """Compare checksums of all servers with the student's weights after every sync."""


@_section
class SourceConfig:
    """One file or data set of prompts."""

    name: str
    """Name of the source: the key for teacher routing and the column in evaluation tables."""
    path: str
    """A file, .jsonl (or .jsonl.gz), .json or .parquet, or `hf:` and the name of a data set of the Hugging Face hub."""
    weight: float = 1.0
    """Share of this source in a batch, relative to the other sources."""
    prompt_field: str = "prompt"
    """Field of a row that holds the prompt: a text, or messages (`role` and `content`); a.b is field b of field a. A
    row without it may have `messages`."""
    answer_field: str = "answer"
    """Field that holds the reference answer for evaluation; without it, the assistant's last message is the answer."""
    subset: str = ""
    """Subset of a data set of the hub (its configuration), e.g. main."""
    split: str = "train"
    """Split of a data set of the hub."""
    reward: str = "exact"
    """How answers are graded: exact (equal to `answer`), gsm8k (the final number is that of `answer`), code (passes
    `tests`, which call `entry_point`), or module:function, your own; see docs/rewards.md."""


@_section
class DataConfig:
    """The prompts."""

    train: list[SourceConfig]
    """Sources to sample training prompts from."""
    eval: list[SourceConfig] = dataclasses.field(default_factory=list)
    """Sources to evaluate on, each by its `reward`."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens, the chat template's included."""
    on_too_long: Literal["error", "drop"] = "error"
    """A longer prompt is an error that names its line (error), or is left out and counted (drop)."""
    chat_template: str = "none"
    """none: prompts are texts, given to the model as they are; tokenizer: prompts and messages go through the chat
    template of the student's tokenizer; anything else: through the template in this file (Jinja)."""
    chat_template_options: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}."""
    system_prompt: str = ""
    """System message of every prompt that has none; needs a chat template."""


@_section
class RewardsConfig:
    """How answers are graded, where a source's reward has a choice."""

    code_timeout_s: float = 10.0
    """Seconds in which an answer of the reward code must have passed its tests."""
    code_memory_mb: int = 512
    """Largest address space of a process that runs an answer, in MiB."""
    code_workers: int = 4
    """Answers of the reward code that one replica tests at a time; each takes up to two processes."""


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
    eval_samples: int = 1
    """Above 1: also draw this many answers to each evaluation prompt at rollout.temperature, for avg@k and pass@k."""
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
    rewards: RewardsConfig = dataclasses.field(default_factory=RewardsConfig)
    """How answers are graded."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """The optimizer."""
    train: TrainConfig
    """The loop."""
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    """Extra metric sinks."""

    @property
    def is_served(self) -> bool:
        """Whether the run depends on servers."""
        return self.rollout.engine == "sglang" or any(t.backend == "sglang" for t in self.teachers)

    def teacher_weights(self, source: str) -> list[float]:
        """Ensemble weights of all teachers for prompts of `source`, in config order, summing to 1."""
        raw = [t.weight_for(source) for t in self.teachers]
        return [w / sum(raw) for w in raw]
