"""The models: the student and its layout, teachers, and the servers of either."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

from megatron_opd.config.section import AtLeastOne, Count, FilePath, NotNegative, Positive, bound, section

Recompute = Literal["none", "selective", "full"]


@section
class ParallelConfig:
    """How the student (and the in-process teachers) are spread over ranks; ranks = tensor x pipeline x
    context x data."""

    tensor: AtLeastOne = 1
    """Tensor-parallel size: every matrix and the vocabulary are split this many ways."""
    pipeline: AtLeastOne = 1
    """Pipeline-parallel size: the layers are split into this many stages."""
    context: AtLeastOne = 1
    """Context-parallel size: every sequence is split over this many ranks, for answers too long for one; the ranks of a
    part exchange keys and values in attention."""
    data: AtLeastOne = 1
    """Data-parallel size: replicas, each with its own slice of the prompts."""
    expert: AtLeastOne = 1
    """Expert-parallel size: the experts of a mixture are spread over this many of the tensor-parallel ranks; it must
    divide `tensor`."""
    sequence: bool = False
    """Sequence parallelism: activations between matrices are split over the tensor-parallel ranks too."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def length_multiple(self) -> int:
        """The divisor of the padded length of sequences, so that the ranks of a replica have equal parts of them: two
        chunks of each context-parallel rank, split over the tensor-parallel ranks with `sequence`."""
        return (2 * self.context if self.context > 1 else 1) * (self.tensor if self.sequence else 1)


@section
class StudentConfig:
    """The model that learns."""

    model: FilePath
    """Hugging Face directory of the student (config.json, safetensors, tokenizer), a Megatron checkpoint, a GGUF file
    or a name of the hub: Org/Name, Org/Name@revision (docs/hub.md)."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of weights and activations; with bf16 and fp16 the optimizer keeps fp32 master weights, and with fp16 the
    loss is scaled (optim.initial_loss_scale)."""
    recompute: Recompute = "none"
    """Activation recompute: none, only attention (selective), or every layer (full). Our attention keeps no scores,
    so selective frees next to nothing for another forward pass of it: none or full."""
    vocab_multiple: AtLeastOne = 1
    """Multiple to which the vocabulary is padded; parallel.tensor must divide the padded vocabulary."""


@section
class ServersConfig:
    """SGLang servers of one model: some that run already, or some that `train` starts and ends."""

    urls: list[str] = dataclasses.field(default_factory=list)
    """Addresses of servers that run already, e.g. [http://node7:30000]; empty: `count` servers are started on this
    machine."""
    count: AtLeastOne = 1
    """Servers to start."""
    tensor: AtLeastOne = 1
    """Tensor-parallel size of a server (its --tp-size); a server that is started takes as many GPUs."""
    gpus: list[Count] = dataclasses.field(default_factory=list)
    """GPUs of started servers, tensor x count of them, in order; empty: all visible ones, counted from 0."""
    colocated: bool = False
    """Servers on the trainer's GPUs, which give their memory back while it scores and trains. Only the student's
    servers can do this, with rollout.sync tensor (one machine) or disk; running servers need --enable-memory-saver."""
    host: str = "127.0.0.1"
    """Address that started servers bind to; anything but loopback needs a key in MEGATRON_OPD_API_KEY."""
    port: Annotated[int, bound(ge=1, le=65535)] = 30000
    """First port of started servers; each next one takes the next free port."""
    python: FilePath = ".venv-sglang/bin/python"
    """Python of the environment with SGLang, which starts the servers (`megatron-opd install-sglang` makes one)."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type in which started servers compute; auto: student.dtype for the student's, config.json's for a teacher's."""
    args: list[str] = dataclasses.field(default_factory=list)
    """More arguments of sglang.launch_server, e.g. [--mem-fraction-static, "0.8"]."""
    start_timeout_s: Positive = 1800.0
    """Longest time until a started server is ready, in seconds."""
    request_timeout_s: Positive = 600.0
    """Longest time of a request, in seconds; a server that has not answered by then counts as failed."""
    retries: Count = 3
    """Further attempts of a failed request, at another server where there is one, with growing pauses."""
    max_in_flight: AtLeastOne = 256
    """Largest number of requests at one server at a time; the others wait."""
    patience_s: Positive = 60.0
    """Seconds to wait for one of the servers to come back when none is left; then requests fail at once."""


@section
class TeacherConfig:
    """One teacher: in-process on the student's layout, forward only, or behind SGLang servers."""

    name: str
    """Name of the teacher in metrics (kl/<name>) and messages."""
    model: FilePath
    """Model of the teacher, in the same forms as student.model."""
    tokenizer: Literal["student", "own"] = "student"
    """Tokenizer of the teacher: student (it must be the same one), or own (the teacher reads the same text in its own
    tokens, and the section cross_tokenizer says how the two are compared)."""
    weight: NotNegative = 1.0
    """Weight in the ensemble for every prompt source not listed in `sources`; weights are normalised per source."""
    sources: dict[str, NotNegative] = dataclasses.field(default_factory=dict)
    """Weights by prompt source (routing); with 0 the teacher does not score that source."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the teacher's weights and activations."""
    offload: bool = False
    """Keep the weights in host memory while the teacher is not scoring (no effect without a GPU)."""
    prefetch: bool = True
    """With offload: fetch the weights while the teacher before this one scores, so that both are on the GPU; false:
    fetch them when that one has left it."""
    backend: Literal["megatron", "sglang"] = "megatron"
    """Place of the teacher: megatron (the trainer's own ranks), or sglang (the servers of `servers`, which have `model`
    loaded)."""
    servers: ServersConfig = dataclasses.field(default_factory=ServersConfig)
    """Servers of the teacher (backend sglang)."""
    carrier: Literal["hidden", "topk", "sampled"] = "hidden"
    """Form of the teacher's output for a token: hidden (its hidden state, which is exact), topk (the top_k likeliest
    tokens and their log-probabilities), or sampled (the log-probability of the sampled token alone). Teachers of the
    backend megatron have hidden only."""
    top_k: AtLeastOne = 64
    """Log-probabilities for each token with the carrier topk; the sampled token is always one of them."""
    on_failure: Literal["fail", "renormalise"] = "fail"
    """Reaction when none of its servers answers: fail (save and stop), or renormalise (go on with the other teachers,
    whose weights are raised to sum to 1)."""
    prompt_field: str = ""
    """Field of a row with a prompt of this teacher's own, a text or messages, in place of the student's (privileged
    information, self-distillation); a.b is field b of field a. Empty: the student's prompt."""
    prompt_template: str = ""
    """Jinja template of a prompt of this teacher's own, with the fields of the row, `prompt` and `answer` among them,
    e.g. "{{ prompt }} Reference: {{ answer }}". It stands in place of the row's prompt, or of its last message."""
    system_prompt: str = ""
    """System message of this teacher's prompts, in place of the row's and of data.system_prompt; needs a chat template.
    Empty: the student's."""

    @property
    def has_own_prompt(self) -> bool:
        """Whether the teacher sees another prompt than the student, in the same tokens."""
        return bool(self.prompt_field or self.prompt_template or self.system_prompt)

    @property
    def is_served(self) -> bool:
        """Whether the teacher is behind servers, and not on the trainer's ranks."""
        return self.backend == "sglang"

    def weight_for(self, source: str) -> float:
        """Unnormalised ensemble weight of this teacher for prompts of `source`."""
        return self.sources.get(source, self.weight)


def ensemble_weights(teachers: Sequence[TeacherConfig], source: str) -> list[float]:
    """Weights of all teachers for prompts of `source`, in config order, summing to 1."""
    raw = [t.weight_for(source) for t in teachers]
    return [w / sum(raw) for w in raw]


def crosses_tokenizers(teachers: Sequence[TeacherConfig]) -> bool:
    """Whether teachers read the student's answers in tokens of their own."""
    return any(t.tokenizer == "own" for t in teachers)
