"""config.json to Architecture: what transformers would build, or a refusal that names the feature."""

import json

import pytest
import tiny
import transformers

from megatron_opd.config import ParallelConfig
from megatron_opd.models.architecture import check_layout, read_architecture


def read(tmp_path, family, *, remove=(), hf=None, **changes):
    tiny.hf_config(family, **changes).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    names = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    default = "Qwen3MoeForCausalLM" if family == "qwen3_moe" else "Qwen3ForCausalLM"
    tree = {**json.loads(path.read_text()), "architectures": [names.get(family, default)], **(hf or {})}
    path.write_text(json.dumps({key: value for key, value in tree.items() if key not in remove}))
    return read_architecture(tmp_path, vocab_multiple=64)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "qwen3_moe"])
def test_sizes(tmp_path, family):
    arch = read(tmp_path, family)
    config = tiny.hf_config(family)
    assert arch.family == family.removesuffix("_tied")
    assert arch.head_dim == (getattr(config, "head_dim", None) or 4)
    assert (arch.num_heads, arch.num_kv_heads, arch.num_layers) == (8, 4, 2)
    assert (arch.vocab_size, arch.padded_vocab_size) == (96, 128)
    assert arch.tied_embeddings == config.tie_word_embeddings
    assert arch.qkv_bias == (family == "qwen2")
    assert arch.qk_norm == family.startswith("qwen3")
    assert arch.rope_base == config.rope_parameters["rope_theta"]
    assert arch.rope_factor == (8.0 if family == "llama" else None)
    assert arch.num_experts == (4 if family == "qwen3_moe" else 0)


def test_older_rope_keys(tmp_path):
    older = {"rope_theta": 500000.0, "rope_scaling": {**tiny.LLAMA3_ROPE, "rope_theta": None}}
    arch = read(tmp_path, "llama", hf=older, remove=["rope_parameters"])
    assert (arch.rope_base, arch.rope_factor) == (500000.0, 8.0)


def test_rope_scaling_beside_rope_parameters_counts_as_in_transformers(tmp_path):
    arch = read(tmp_path, "qwen3", hf={"rope_theta": 5e5, "rope_scaling": {**tiny.LLAMA3_ROPE, "rope_theta": 2e5}})
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert (arch.rope_base, arch.rope_factor) == (theirs["rope_theta"], theirs["factor"]) == (2e5, 8.0)


@pytest.mark.parametrize(
    ("family", "hf", "remove", "message"),
    [
        ("mistral", {"sliding_window": 128}, [], "sliding-window"),
        ("mistral", {}, ["sliding_window"], "sliding-window"),  # transformers' default is 4096
        ("qwen2", {"use_sliding_window": True}, [], "sliding-window"),
        ("llama", {"attention_bias": True}, [], "attention_bias"),
        ("llama", {"mlp_bias": True}, [], "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, [], "hidden_act gelu"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, [], "rope scaling 'yarn'"),
        ("llama", {"rope_parameters": {**tiny.LLAMA3_ROPE, "low_freq_factor": 2}}, [], "low_freq_factor=2"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, [], "partial rotary"),
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, [], "GPT2LMHeadModel is not supported"),
        # as Qwen's model cards tell people to do for long contexts, in a file that transformers 5 has written
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, [], "rope scaling 'yarn'"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, [], "dense layers in between"),
        ("llama", {}, ["rms_norm_eps"], "rms_norm_eps"),
        ("llama", {"rms_norm_eps": "1e-6"}, [], "rms_norm_eps must be a number above 0, not '1e-6'"),
        ("llama", {"rms_norm_eps": float("nan")}, [], "rms_norm_eps must be a number above 0, not nan"),
        ("llama", {"rope_parameters": {"rope_theta": [1]}}, [], "rope_theta must be a number"),
        ("llama", {"rope_parameters": {**tiny.LLAMA3_ROPE, "factor": None}}, [], "factor must be a number"),
        ("qwen3", {"tie_word_embeddings": "false"}, [], "tie_word_embeddings must be true or false"),
        ("llama", {"architectures": {"of": "llama"}}, [], "{'of': 'llama'} is not supported"),
        ("llama", {"architectures": "LlamaForCausalLM"}, [], "architecture 'LlamaForCausalLM' is not supported"),
    ],
)
def test_what_would_change_the_numbers_is_refused(tmp_path, family, hf, remove, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, family, hf=hf, remove=remove)


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ({"tensor": 1}, None),
        ({"tensor": 2, "expert": 2, "sequence": True}, None),
        ({"tensor": 4, "expert": 2, "sequence": True, "data": 2}, None),
        ({"tensor": 2, "expert": 2}, "needs parallel.sequence=true"),
        ({"tensor": 2, "sequence": True}, "parallel.expert must divide parallel.tensor=2 and be above 1"),
        ({"data": 2, "expert": 2}, "parallel.expert must divide parallel.tensor=1"),
        ({"tensor": 2, "data": 2, "expert": 4, "sequence": True}, "parallel.expert must divide parallel.tensor=2"),
    ],
    ids=str,
)
def test_layouts_of_a_mixture(tmp_path, layout, problem):
    problems = check_layout(read(tmp_path, "qwen3_moe"), ParallelConfig(**layout), what="student.model")
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize(
    "removed", [["head_dim"], ["num_key_value_heads"], ["head_dim", "num_key_value_heads"]], ids=str
)
@pytest.mark.parametrize("heads", [16, 96])
def test_sizes_that_config_json_lacks_are_those_of_transformers(tmp_path, family, removed, heads):
    sizes = {"num_attention_heads": heads, "hidden_size": 192, "num_key_value_heads": heads // 2}
    hf = {**sizes, "sliding_window": None}
    theirs = transformers_sizes(tmp_path, family, hf, removed)
    if heads % theirs[0]:
        with pytest.raises(ValueError, match=f"num_key_value_heads {theirs[0]} does not divide num_attention_heads"):
            read(tmp_path, family, hf=hf, remove=removed)
    else:
        arch = read(tmp_path, family, hf=hf, remove=removed)
        assert (arch.num_kv_heads, arch.head_dim) == theirs


def transformers_sizes(tmp_path, family, hf, removed):
    """(key-value heads, head dimension) of the attention that transformers builds of such a config.json."""
    tiny.hf_config(family).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    tree = {**json.loads(path.read_text()), **hf}
    path.write_text(json.dumps({key: value for key, value in tree.items() if key not in removed}))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, head_dim
