"""How answers are sampled, and the loss on them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from megatron_opd.config.models import ServersConfig
from megatron_opd.config.rollout_engines import ENGINES, EngineName
from megatron_opd.config.section import AtLeastOne, Count, NotNegative, Positive, bound, section


@section
class LossConfig:
    """The loss on learnt tokens: D(teachers, student), averaged over them."""

    beta: Annotated[float, bound(ge=0, le=1, why="0 is forward KL, 1 is reverse KL")] = 1.0
    """Member of the family gkd: 0 is forward KL(teacher||student), 1 is reverse KL(student||teacher), numbers between
    are the generalized JSD(beta) of GKD."""
    divergence: str = "gkd"
    """Name of the divergence D (`loss/divergences.py`): gkd, the family with the parameter `beta`."""
    ensemble: Literal["logits", "probs"] = "logits"
    """Average that makes one target of several teachers: of logits (geometric), or of probabilities (arithmetic)."""
    temperature: Positive = 1.0
    """Temperature of the loss, which divides student and teacher logits; independent of rollout.temperature."""
    chunk_tokens: AtLeastOne = 1024
    """Tokens whose teacher distributions exist at one time; bounds the memory of the loss. On GPUs 4096 is worth a try
    where `check --plan` shows room: every chunk reads and writes the head's fp32 gradient."""
    backend: Literal["auto", "native", "triton", "torch", "readable"] = "auto"
    """Kernels of the divergence to teachers with hidden states (docs/performance.md), which decide its last bits: auto
    (the fastest that supports it and that all ranks have), or a name, an error where a rank lacks it."""
    kind: Literal["distribution", "sampled"] = "distribution"
    """Kind of the loss: distribution (a divergence over the vocabulary), or sampled (reverse KL on the sampled token
    alone, as a policy gradient; teachers with the carrier sampled allow no other)."""
    importance_cap: Annotated[float, bound(ge=1, why="fresh samples have weight 1")] = 2.0
    """Largest importance weight q/μ of student over sampler for a token (kind sampled); larger ones are cut."""
    estimator: Literal["policy_gradient", "k2", "k3"] = "policy_gradient"
    """Loss of the kind sampled: policy_gradient; k2: ½ (log p - log q)², which has the same gradient; k3: p/q - 1 - log
    p/q, which has the gradient of forward KL."""
    weight: NotNegative = 1.0
    """Factor of the distillation term, beside rl.weight and policy.kl_coef; 0: the term is only measured."""
    anneal: NotNegative = 0.0
    """Decrease of the weight at every step, down to weight_min; 0: the weight is constant."""
    weight_min: NotNegative = 0.0
    """Least weight of a distillation term that is annealed."""
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"] = "token-mean"
    """Mean over tokens: token-mean (over all tokens of the step), seq-mean-token-mean and seq-mean-token-sum (over
    answers, of the mean or the sum over an answer's tokens), or sum (no mean)."""


@section
class RolloutConfig:
    """How the student samples its own answers."""

    engine: EngineName = "local"
    """Engine that samples: local (embedded: transformers with a KV cache in the leader rank of each replica), or sglang
    (the servers of `servers`)."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which the student's embedded engine computes. In bf16 answers are the rounded model's, and may depend on
    what is sampled beside them (docs/algorithms.md). Servers have servers.dtype."""
    servers: ServersConfig = dataclasses.field(default_factory=ServersConfig)
    """Servers of the student (engine sglang)."""
    prompts_per_step: AtLeastOne = 16
    """Prompts sampled in one step, over all data-parallel replicas."""
    samples_per_prompt: AtLeastOne = 1
    """Answers sampled for each prompt."""
    max_new_tokens: AtLeastOne = 128
    """Longest answer in tokens, the end-of-sequence token included."""
    temperature: Positive = 1.0
    """Sampling temperature of training answers and of train.eval_samples; all other evaluation is greedy."""
    top_p: Annotated[float, bound(gt=0, le=1)] = 1.0
    """Probability of the smallest set of likeliest tokens that answers are sampled from, among the 4,096 likeliest; 1:
    all tokens (less than 1: engine sglang)."""
    top_k: Annotated[int, bound(ge=0, why="0 means all tokens")] = 0
    """Number of likeliest tokens that answers are sampled from; 0: all tokens (above 0: engine sglang)."""
    max_staleness: Count = 0
    """Steps that sampling may be ahead of the training; 0: strictly on-policy (above 0: engine sglang)."""
    partial: bool = False
    """Keep answers that are unfinished when new weights arrive, and continue them with those (needs max_staleness)."""
    sync: str = "broadcast"
    """Transport of new weights to the servers: broadcast (process group: NCCL, gloo without GPUs), tensor (CUDA IPC on
    one machine; inline without GPUs), or disk (a directory that the servers see too)."""
    quantization: Literal["none", "fp8"] = "none"
    """Numbers in which the student's servers multiply: none (those of servers.dtype), or fp8 (the layers' matrices are
    rounded at every sync, as precision.fp8.recipe blockwise does it; needs GPUs of the generation Ada or later)."""
    sync_verify: bool = False
    """Compare checksums of all servers with the student's weights after every sync."""

    @property
    def is_served(self) -> bool:
        """Whether the student samples behind servers."""
        return ENGINES[self.engine].is_served

    @property
    def shares_gpus(self) -> bool:
        """Whether the engine computes on the trainer's GPUs, and gives their memory back while the student trains."""
        traits = ENGINES[self.engine]
        return traits.shares_gpus or (traits.is_served and self.servers.colocated)
