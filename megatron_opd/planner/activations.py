"""What the forward pass keeps for the backward pass, in bytes: the tensors that autograd saves in our layer spec.

Counted, not estimated: `student/spec.py` without Transformer Engine saves exactly these, and a test compares them with
the saved tensors of real ranks. Attention keeps no [S, S] scores, so `selective` recompute saves next to nothing here.

With context parallelism a rank has the activations of its part of each sequence, as with Transformer Engine's
attention; ours, without it, keeps the keys and values of whole sequences besides.

Letters: H hidden size, F intermediate size, h and f the same on one rank, q and kv the widths of queries and of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opd.config import LoraConfig, ParallelConfig, StudentConfig
from megatron_opd.models.architecture import Architecture
from megatron_opd.planner import adapters
from megatron_opd.planner.gpus import BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardPass:
    """One micro-batch through one stage."""

    arch: Architecture
    parallel: ParallelConfig
    student: StudentConfig
    lora: LoraConfig
    sequences: int
    length: int
    """Padded length of a sequence, or of this rank's part of it with context parallelism."""
    on_gpu: bool
    """See `Job.on_gpu`."""

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def width(self) -> float:
        """Elements a token of what lies between matrices on this rank."""
        return self.arch.hidden_size / (self.parallel.tensor if self.parallel.sequence else 1)


def saved(one: ForwardPass, *, is_first: bool, is_last: bool) -> float:
    """Bytes that one micro-batch keeps on a rank of a stage until its backward pass."""
    layers = one.arch.num_layers // one.parallel.pipeline
    if one.student.recompute == "full":
        kept = layers * one.tokens * one.width * _size(one) + 4 * one.length * one.arch.head_dim
    else:
        kept = layers * layer(one)
    if is_first:
        kept += one.tokens * (8 + (1 if one.parallel.tensor > 1 else 0))  # ids, and which of them are here
    if is_last:
        kept += one.tokens * _norm(one, one.width)
    return kept


def backward(one: ForwardPass) -> float:
    """Bytes that are there besides while a layer's backward pass runs: what is recomputed of it, the gradients of the
    MLP's intermediate tensors, and that of its largest weight."""
    arch, tensor, size = one.arch, one.parallel.tensor, _size(one)
    share = arch.experts_per_token / one.parallel.expert if arch.num_experts else 1 / tensor
    weight = 2 * arch.ffn_size * arch.hidden_size / (1 if arch.num_experts else tensor)
    gradients = (one.tokens * 4 * arch.ffn_size * share + weight) * size
    return gradients + (layer(one) if one.student.recompute == "full" else 0.0)


def layer(one: ForwardPass) -> float:
    """Bytes that one layer keeps."""
    arch, tensor, size = one.arch, one.parallel.tensor, _size(one)
    q, kv = arch.num_heads * arch.head_dim / tensor, arch.num_kv_heads * arch.head_dim / tensor
    a_token = 2 * _norm(one, one.width) + _entering(one) * one.width * size
    a_token += (q + 2 * kv) * size + (q + kv) * size + q * size  # qkv as one, rotated q and k, the attention's output
    a_token += 4 * arch.num_heads / tensor if one.student.recompute == "none" else 0  # logsumexp of the attention
    if arch.qk_norm:  # queries are copied out of qkv; keys are not, and in float32 their norm's input is part of it
        per_head = 4 * (arch.num_heads + arch.num_kv_heads) / tensor
        a_token += per_head + (size * q if one.on_gpu else 8 * q + (4 if size == 4 else 8) * kv)
    a_token += _mixture(one) if arch.num_experts else (5 - _is_frozen(one, "down_proj")) * arch.ffn_size / tensor * size
    beside = adapters.kept(arch, one.lora, one.parallel, one.tokens) * size if one.lora.rank else 0
    return one.tokens * a_token + _rotary(one) + beside


def _entering(one: ForwardPass) -> int:
    """How many of the inputs of qkv and fc1 are kept: those of matrices that have a gradient, or adapters."""
    fc1 = _is_frozen(one, "gate_proj", "up_proj") and not one.arch.num_experts
    return 2 - _is_frozen(one, "q_proj", "k_proj", "v_proj") - fc1


def _is_frozen(one: ForwardPass, *modules: str) -> bool:
    """Whether nothing is trained that the input of these modules would be needed for."""
    return bool(one.lora.rank) and not set(modules) & set(one.lora.modules)


def _mixture(one: ForwardPass) -> float:
    """Bytes a token of balanced experts: every routed token's input and six of its intermediate tensors."""
    arch, expert = one.arch, one.parallel.expert
    routed = arch.experts_per_token / expert * (arch.hidden_size + 6 * arch.ffn_size) * _size(one)
    return routed + 12 * arch.experts_per_token + 3 * arch.num_experts / expert


def _rotary(one: ForwardPass) -> float:
    """Cosines and sines of a layer, for queries and for keys, by position."""
    return 4 * one.length * one.arch.head_dim * _size(one)


def _norm(one: ForwardPass, width: float) -> float:
    """Bytes a token of a norm: its input and scale; in a chain of operations the normalised input too, in float32."""
    if one.on_gpu:
        return width * _size(one) + 4
    return (1 if one.lora.rank else 2) * 4 * width + 4


def _size(one: ForwardPass) -> int:
    return BYTES[one.student.dtype]
