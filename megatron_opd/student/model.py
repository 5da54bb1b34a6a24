"""Builds a Megatron GPTModel (this rank's stage and shard of it) from an Architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_opd.config.models import Recompute
from megatron_opd.core import stacks
from megatron_opd.core.parallel import Parallel
from megatron_opd.models.architecture import Architecture
from megatron_opd.student import deterministic, fusions, groups
from megatron_opd.student.spec import block_spec, default_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def transformer_config(
    arch: Architecture,
    parallel: Parallel,
    *,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    precision: Mapping[str, Any] | None = None,
) -> TransformerConfig:
    """Megatron's config of the decoder: no dropout, the fusions of `fusions.py`.

    `precision` are the settings that a plan adds (`precision.plan.ModelPlan.megatron`).
    """
    full, layers = recompute == "full", (precision or {}).get("transformer_impl") or default_layers()
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=parallel.tensor_size,
        pipeline_model_parallel_size=parallel.pipeline_size,
        context_parallel_size=parallel.context_size,
        sequence_parallel=parallel.sequence,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        # The loss is a sum over learnt tokens and Megatron divides once by their global number.
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # weights always come from a checkpoint
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        deterministic_mode=deterministic.is_on(),
        **fusions.chosen(layers, on_gpu=torch.cuda.is_available()).megatron(),
        **{"transformer_impl": layers, **(precision or {})},
        **(_mixture(arch, parallel) if arch.num_experts else {}),
    )


def _mixture(arch: Architecture, parallel: Parallel) -> dict[str, Any]:
    """What a mixture of experts adds: softmax over the chosen experts equals softmax over all, rescaled."""
    return {
        "num_moe_experts": arch.num_experts,
        "moe_ffn_hidden_size": arch.ffn_size,
        "moe_router_topk": arch.experts_per_token,
        "moe_router_pre_softmax": not arch.normalized_experts,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall" if torch.cuda.is_available() else "allgather",
        "expert_model_parallel_size": parallel.expert_size,
        "expert_tensor_parallel_size": 1,
    }


def build_gpt(arch: Architecture, config: TransformerConfig, parallel: Parallel) -> GPTModel:
    """This rank's part of the model, on this rank's device, weights not yet set."""
    model = GPTModel(
        config,
        block_spec(config),
        vocab_size=arch.padded_vocab_size,
        max_sequence_length=arch.max_positions,
        pre_process=parallel.pipeline_rank == 0,
        post_process=parallel.is_last_stage,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope_base,
        rope_scaling=arch.rope_factor is not None,
        rope_scaling_factor=arch.rope_factor or 1.0,
    )
    if not stacks.here().marks_shards:
        _mark_shards(model)
    return model.to(groups.device())


def _mark_shards(model: GPTModel) -> None:
    """Say which parameters are shards: Megatron does so only where it initialises weights itself, and takes any other
    parameter for a copy that the gradient norm counts on one tensor-parallel rank alone."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            if module.weight is not None:  # a tied head without a weight of its own
                set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def drop_head(model: GPTModel) -> None:
    """Make the model return final hidden states [S (/tp with sequence parallelism), B, D] in place of logits."""
    if model.post_process:
        del model.output_layer
        model.post_process = False
