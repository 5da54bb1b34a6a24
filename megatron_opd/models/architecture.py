"""What a Hugging Face config.json says about a decoder, in one family-independent record.

Known families: Llama (rope scaling "llama3" included), Mistral, Qwen2, Qwen3, Qwen3-MoE. Anything else, and any
feature that would silently change the numbers (sliding windows, other rope types, extra biases), is refused by name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.config import ParallelConfig
from megatron_opd.models import hub

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}

_SWITCHES = ("tie_word_embeddings", "norm_topk_prob")
_QUANTISED = ("quantization_config", "compression_config")
_QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_HEAD_DIM = {"qwen3": 128}
_KV_HEADS = {"qwen2": 32, "qwen3": 32, "qwen3_moe": 4, "mistral": 8}
"""Sizes that transformers takes where config.json does not have the key; elsewhere they follow from others."""
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    *_OPTIONAL_SIZES,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Sizes and switches of a decoder."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    """Intermediate size of the MLP; of one expert in a mixture of experts."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding in the checkpoint, which can exceed the tokenizer's length."""
    padded_vocab_size: int
    """Rows of the embedding in Megatron: vocab_size rounded up, so that tensor parallelism divides it."""
    max_positions: int
    norm_eps: float
    rope_base: float
    rope_factor: float | None
    """Factor of llama3 rope scaling, or None for plain rope."""
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    num_experts: int = 0
    """Experts of each layer; 0 for a dense model."""
    experts_per_token: int = 0
    normalized_experts: bool = True
    """Whether the weights of a token's experts are rescaled to sum to 1."""


def read_architecture(model_dir: str | Path, *, vocab_multiple: int = 1) -> Architecture:
    """Read `config.json` of a model directory; the vocabulary is padded to a multiple of `vocab_multiple`.

    Raises ValueError for missing files and unknown models.
    """
    path, hf = _read(model_dir)
    names = hf.get("architectures") or ["(none named)"]
    name = str(names[0]) if isinstance(names, list) else repr(names)
    if name not in FAMILIES:
        raise ValueError(f"{path}: architecture {name} is not supported; known: {', '.join(sorted(FAMILIES))}")
    try:
        _check_values(hf)
        return _translate(FAMILIES[name], hf, vocab_multiple)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: {'missing ' if isinstance(error, KeyError) else ''}{error}") from None


def is_known(model_dir: str | Path) -> bool:
    """Whether a model is of one of the families; ValueError where there is no config.json that says it."""
    names = _read(model_dir)[1].get("architectures")
    return bool(isinstance(names, list) and names and names[0] in FAMILIES)


def read_limits(model_dir: str | Path) -> tuple[int, int]:
    """(entries of the vocabulary, longest context) of a model of any architecture, for one that others run for us."""
    path, hf = _read(model_dir)
    text = hf.get("text_config") or hf
    try:
        return int(text["vocab_size"]), int(text["max_position_embeddings"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: it needs vocab_size and max_position_embeddings") from None


def quantised(model_dir: str | Path) -> str | None:
    """By which method a model's weights are quantised, as its files say; None where they do not."""
    path, hf = _read(model_dir)
    told = next((hf[key] for key in _QUANTISED if hf.get(key)), None)
    if told is not None:
        return str(told.get("quant_method") or "quantization_config") if isinstance(told, dict) else str(told)
    return next((name for name in _QUANTISED_FILES if path.with_name(name).is_file()), None)


def _read(model_dir: str | Path) -> tuple[Path, dict[str, Any]]:
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        near = "" if path.parent.is_dir() else hub.nearby(str(model_dir))
        raise ValueError(f"{model_dir} is not a Hugging Face model directory: there is no {path.name} in it{near}")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    return path, hf if isinstance(hf, dict) else {}


def _check_values(hf: dict[str, Any]) -> None:
    """Raises ValueError for a size that is not a positive whole number, and the like."""
    for key in _SWITCHES:
        if not isinstance(hf.get(key), bool | None):
            raise ValueError(f"{key} must be true or false, not {hf[key]!r}")
    for key in _SIZES:
        missing = hf.get(key) is None and key in _OPTIONAL_SIZES
        if key in hf and not missing and (type(hf[key]) is not int or hf[key] < 1):
            raise ValueError(f"{key} must be a whole number above 0, not {hf[key]!r}")
    for key in ("rope_parameters", "rope_scaling"):
        if hf.get(key) is not None and not isinstance(hf[key], dict):
            raise ValueError(f"{key} must be an object, not {hf[key]!r}")


def _translate(family: str, hf: dict[str, Any], vocab_multiple: int) -> Architecture:
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {hf['hidden_act']} is not supported (only silu)")
    if hf.get("mlp_bias") or (hf.get("attention_bias") and family != "qwen2"):
        raise ValueError("mlp_bias and attention_bias are not supported")
    # A Mistral config without the key means transformers' default window, not none.
    if hf.get("use_sliding_window") or (family == "mistral" and hf.get("sliding_window", 4096)):
        raise ValueError("sliding-window attention is not supported")
    base, factor = _rope(hf)
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads", _KV_HEADS.get(family)) or heads
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    moe = family.endswith("_moe")
    if moe and (hf.get("decoder_sparse_step", 1) != 1 or hf.get("mlp_only_layers")):
        raise ValueError("a mixture of experts with dense layers in between is not supported")
    return Architecture(
        family=family,
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_size=hf["moe_intermediate_size" if moe else "intermediate_size"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hf.get("head_dim", _HEAD_DIM.get(family)) or hf["hidden_size"] // heads,
        vocab_size=hf["vocab_size"],
        padded_vocab_size=-(-hf["vocab_size"] // vocab_multiple) * vocab_multiple,
        max_positions=hf["max_position_embeddings"],
        norm_eps=_number(hf, "rms_norm_eps"),
        rope_base=base,
        rope_factor=factor,
        qkv_bias=family == "qwen2",
        qk_norm=family.startswith("qwen3"),
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        num_experts=(hf.get("num_experts") or hf["num_local_experts"]) if moe else 0,
        experts_per_token=hf["num_experts_per_tok"] if moe else 0,
        normalized_experts=bool(hf.get("norm_topk_prob", False)) if moe else True,
    )


def _rope(hf: dict[str, Any]) -> tuple[float, float | None]:
    """(base, llama3 factor or None), from transformers 5's `rope_parameters` or the older pair of keys.

    Where both are there, the older one counts, as in transformers: whoever extends a context adds `rope_scaling`.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    base = next((_number(of, "rope_theta") for of in (rope, hf) if of.get("rope_theta") is not None), 10000.0)
    for of in (rope, hf):
        if of.get("partial_rotary_factor") is not None and _number(of, "partial_rotary_factor") != 1.0:
            raise ValueError("partial rotary embeddings are not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise ValueError(f"rope scaling '{kind}' is not supported (only default and llama3)")
    expected = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for key, value in expected.items():
        if _number(rope, key) != value:
            raise ValueError(f"rope scaling llama3 with {key}={rope[key]} is not supported (Megatron has {value})")
    return base, _number(rope, "factor")


def _number(of: dict[str, Any], key: str) -> float:
    """Raises KeyError where there is none, ValueError for anything but a number above 0."""
    value = of[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{key} must be a number above 0, not {value!r}")
    return float(value)


def check_layout(arch: Architecture, parallel: ParallelConfig, *, what: str) -> list[str]:
    """Problems of putting this model on a layout, each naming the setting to change."""
    tensor, problems = parallel.tensor, []
    for name, count in (("attention heads", arch.num_heads), ("key-value heads", arch.num_kv_heads)):
        if count % tensor:
            problems.append(f"parallel.tensor={tensor} does not divide the {count} {name} of {what}")
    if arch.ffn_size % tensor and not arch.num_experts:
        problems.append(f"parallel.tensor={tensor} does not divide the intermediate size {arch.ffn_size} of {what}")
    if arch.padded_vocab_size % tensor:
        problems.append(
            f"parallel.tensor={tensor} does not divide the vocabulary of {what} ({arch.padded_vocab_size} entries);"
            f" set student.vocab_multiple={tensor} to pad it"
        )
    if arch.num_layers % parallel.pipeline:
        problems.append(f"parallel.pipeline={parallel.pipeline} does not divide the {arch.num_layers} layers of {what}")
    if arch.num_experts % parallel.expert:
        problems.append(f"parallel.expert={parallel.expert} does not divide the {arch.num_experts} experts of {what}")
    if arch.num_experts and tensor > 1 and not parallel.sequence:
        problems.append(f"{what} is a mixture of experts: with parallel.tensor > 1 it needs parallel.sequence=true")
    # Expert groups stay within a replica, because replicas differ in the lengths and numbers of their sequences; and
    # with one copy of the experts on each tensor-parallel rank, nobody would sum the copies' gradients.
    if arch.num_experts and (tensor % parallel.expert or (tensor > 1 and parallel.expert == 1)):
        problems.append(
            f"{what} is a mixture of experts: parallel.expert must divide parallel.tensor={tensor}"
            f"{' and be above 1' if tensor > 1 else ''}, but is {parallel.expert}"
        )
    return problems
