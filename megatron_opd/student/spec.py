"""Megatron's layers: Transformer Engine's where they are, else the local layer spec with two modules replaced.

* RMSNorm: the stock torch norm refuses sequence parallelism; this one marks its weight so that Megatron sums the
  weight's gradient over the tensor-parallel ranks.
* Attention: torch's scaled_dot_product_attention, causal, in place of explicit [S, S] scores. With context
  parallelism it also does the exchange that Transformer Engine's attention does of itself.

Shape letters: S sequence (with context parallelism this rank's part of it), B batch, P packed sequences, N heads of
this rank, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.bias import causal_lower_right

from megatron_opd.precision import installed
from megatron_opd.student import context, deterministic
from megatron_opd.student.packing import Sequences


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm with Megatron's constructor."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CausalAttention(MegatronModule):
    """softmax(q k^T / sqrt(D)) v under a causal mask; grouped queries without repeating keys and values.

    Of packed sequences each looks at itself only.

    With context parallelism keys and values of the whole sequence are gathered, and each of this rank's two chunks of
    queries (`student/context.py`) attends to those up to its own end, as in Llama 3's training (Grattafiori et al.
    2024, arXiv:2407.21783, section 3.3.2).
    """

    def __init__(
        self, config: TransformerConfig, *, pg_collection: Any, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.dropout = config.attention_dropout
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.attention = deterministic.attention if deterministic.is_on() else F.scaled_dot_product_attention

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        packed_seq_params: Sequences | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """[S, B, N, D] each -> [S, B, N * D]; packed [P, N, D] -> [P, 1, N * D].

        Right padding needs no mask: no real token looks at it.
        """
        assert attention_mask is None
        if packed_seq_params is not None:
            by_sequence = zip(*(x[:, None].split(packed_seq_params.lengths) for x in (query, key, value)), strict=True)
            return torch.cat([self._attend(q, k, v) for q, k, v in by_sequence])
        if self.context_group is None:
            return self._attend(query, key, value)
        return self._exchange(query, key, value)

    def _exchange(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Of this rank's two chunks, with the keys and values of all ranks."""
        # Its backward pass sums what the ranks' queries give for a key or value.
        parts = gather_from_sequence_parallel_region(torch.stack([key, value], dim=2), group=self.context_group)
        keys, values = context.in_order(parts, self.context_group.size()).unbind(2)
        width, chunks = len(query) // 2, 2 * self.context_group.size()
        ends = ((i + 1) * width for i in (self.context_group.rank(), chunks - 1 - self.context_group.rank()))
        both = zip(query.split(width), ends, strict=True)
        return torch.cat([self._attend(q, keys[:end], values[:end]) for q, end in both])

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The queries are those at the end of the keys."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        is_square = len(query) == len(key)
        mask = None if is_square else _lower_right(query, key)
        dropout, is_grouped = self.dropout if self.training else 0.0, q.shape[1] != k.shape[1]
        how = {"dropout_p": dropout, "is_causal": is_square, "scale": self.scale, "enable_gqa": is_grouped}
        out = self.attention(q, k, v, attn_mask=mask, **how)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def _lower_right(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The causal mask of queries at the end of the keys. torch's own, which its flash attention knows by name, cannot
    be made while torch's dispatch is watched (by a counter of collectives, say), and on a CPU is a whole mask too."""
    if query.is_cuda:
        return causal_lower_right(len(query), len(key))
    return torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))


def default_layers() -> str:
    """Megatron's word (transformer_impl) for the layers that are used unless a setting says otherwise.

    Raises ValueError where Transformer Engine works, but lacks what this Megatron imports of it, which it tells nobody.
    """
    if not torch.cuda.is_available():
        return "local"
    if HAVE_TE:
        return "transformer_engine"
    if works := installed.transformer_engine():
        raise ValueError(
            f"Transformer Engine {works} does not fit this megatron-core, which would quietly use its own layers:"
            " install one that fits (docs/gpu.md), or set precision.layers=local to do without"
        )
    return "local"


def block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Spec of this pipeline stage. A block spec, not only a layer spec, so that the final norm is of one kind too."""
    if config.transformer_impl == "transformer_engine":
        assert HAVE_TE, "Transformer Engine is not installed"  # precision/installed.py said so before the run
        fused = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm
        )
        return TransformerBlockSubmodules(layer_specs=[fused] * get_num_layers_to_build(config), layer_norm=TENorm)
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts:
        # Where checkpoints have this norm: Transformer Engine cannot fuse it with a mixture's experts, so its
        # checkpoints have it under its own name; the local spec files it under linear_fc1, as for a dense MLP.
        keys = layer.submodules.sharded_state_dict_keys_map
        layer.submodules.sharded_state_dict_keys_map = {k: v for k, v in keys.items() if k != "pre_mlp_layernorm."}
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
