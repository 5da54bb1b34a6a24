"""What is learnt: how answers are sampled and what is minimised on them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from megatron_opd.config.models import ServersConfig
from megatron_opd.config.rollout_engines import ENGINES, EngineName
from megatron_opd.config.section import AtLeastOne, Count, NotNegative, Positive, bound, section


@section
class LossConfig:
    """What the student minimises on its own tokens: D(teachers, student), averaged over response tokens."""

    beta: Annotated[float, bound(ge=0, le=1, why="0 is forward KL, 1 is reverse KL")] = 1.0
    """0: forward KL(teacher||student); 1: reverse KL(student||teacher); between: generalized JSD(beta) of GKD."""
    divergence: str = "gkd"
    """Name of the divergence D (`loss/divergences.py`): gkd, the family that `beta` is about."""
    ensemble: Literal["logits", "probs"] = "logits"
    """How several teachers become one target: average of logits (geometric) or of probabilities (arithmetic)."""
    temperature: Positive = 1.0
    """Both student and teacher logits are divided by this in the loss; independent of rollout.temperature."""
    chunk_tokens: AtLeastOne = 1024
    """Tokens whose teacher distribution exists at one time; bounds the memory of the loss."""
    backend: Literal["auto", "native", "triton", "torch", "readable"] = "auto"
    """Kernels of the divergence to teachers that tell hidden states (docs/performance.md), which decide its last bits:
    the fastest that supports it and that all ranks have (auto), or the one named here, an error where a rank lacks
    it."""
    kind: Literal["distribution", "sampled"] = "distribution"
    """distribution: a divergence over the vocabulary (beta); sampled: reverse KL on the sampled token alone, as a
    policy gradient, which is all that teachers with the carrier sampled allow."""
    importance_cap: Annotated[float, bound(ge=1, why="fresh samples have weight 1")] = 2.0
    """Largest importance weight q/μ of student over sampler on a token of the kind sampled; larger ones are cut."""
    estimator: Literal["policy_gradient", "k2", "k3"] = "policy_gradient"
    """The loss of kind sampled: policy_gradient; k2: ½ (log p - log q)², which has the same gradient; k3: p/q - 1 -
    log p/q, which has that of forward KL."""
    weight: NotNegative = 1.0
    """Factor of the distillation term, next to rl.weight and policy.kl_coef; 0: it is measured only."""
    anneal: NotNegative = 0.0
    """The weight falls by this much every step, down to weight_min; 0: it stays."""
    weight_min: NotNegative = 0.0
    """Least weight of a distillation term that is annealed."""
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"] = "token-mean"
    """How tokens make one number: the mean over all tokens of the step; over answers, of the means or of the sums over
    their tokens; or the sum."""


@section
class RolloutConfig:
    """How the student samples its own answers."""

    engine: EngineName = "local"
    """local: the embedded engine, transformers with a KV cache inside the leader rank of each replica; sglang: the
    servers of `servers`."""
    servers: ServersConfig = dataclasses.field(default_factory=ServersConfig)
    """Where the student samples (engine sglang)."""
    prompts_per_step: AtLeastOne = 16
    """Prompts sampled in one step, over all data-parallel replicas."""
    samples_per_prompt: AtLeastOne = 1
    """Answers sampled for each prompt."""
    max_new_tokens: AtLeastOne = 128
    """Longest answer in tokens, the end-of-sequence token included."""
    temperature: Positive = 1.0
    """Sampling temperature during training and of train.eval_samples; evaluation is greedy besides."""
    top_p: Annotated[float, bound(gt=0, le=1)] = 1.0
    """Sample from the fewest tokens with this probability, of the 4,096 likeliest; 1: from all (engine sglang)."""
    top_k: Annotated[int, bound(ge=0, why="0 means all tokens")] = 0
    """Sample from the this many likeliest tokens; 0: from all (engine sglang)."""
    max_staleness: Count = 0
    """0: strictly on-policy; n: batches are sampled up to n steps ahead while the student trains (engine sglang)."""
    partial: bool = False
    """Answers that are unfinished when new weights arrive are kept and continued with those (needs max_staleness)."""
    sync: str = "broadcast"
    """How new weights reach the servers: broadcast (process group: NCCL, gloo without GPUs), tensor (CUDA IPC on one
    machine; inline without GPUs), or disk (a directory that the servers see too)."""
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

    @property
    def sync_bucket_mb(self) -> int:
        """Weights sent at a time, in MiB; bounds the memory that a sync takes on either side."""
        return 256
