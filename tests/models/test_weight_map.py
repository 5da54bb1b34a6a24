"""The table between Hugging Face and Megatron: what it covers, and that splitting and merging undo each other."""

import itertools
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.safetensors_dir import TensorDir
from megatron_opd.models.weight_map import all_rules, fused_name, hf_shapes, is_expert, plain_name, rules, stage_rules

FAMILIES = [*tiny.FAMILIES, "qwen3_moe"]


@pytest.fixture(scope="module", params=FAMILIES)
def model_dir(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / request.param
    tiny.save(tiny.build(request.param, vocab_size=93), directory)
    return directory


def test_the_table_names_every_tensor_of_the_files_once(model_dir):
    arch = read_architecture(model_dir, vocab_multiple=4)
    files = load_file(model_dir / "model.safetensors")
    assert hf_shapes(all_rules(arch)) == {name: tuple(tensor.shape) for name, tensor in files.items()}
    merged = [n for r in all_rules(arch).values() for n, _ in r.merge([torch.empty(r.shape, device="meta")])]
    assert len(merged) == len(set(merged))


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_shards_merge_into_what_was_split(model_dir, num_shards):
    arch = read_architecture(model_dir, vocab_multiple=4)
    files = load_file(model_dir / "model.safetensors")
    with TensorDir(model_dir) as tensors:
        for name, rule in all_rules(arch).items():
            shards = [rule.split(tensors, i, num_shards) for i in range(num_shards)]
            assert len({shard.shape for shard in shards}) == 1
            for hf_name, tensor in rule.merge(shards):
                assert torch.equal(tensor, files[hf_name]), (name, hf_name)


def test_a_whole_split_has_the_shape_of_its_rule_and_zeros_for_padding(model_dir):
    arch = read_architecture(model_dir, vocab_multiple=64)
    assert (arch.vocab_size, arch.padded_vocab_size) == (93, 128)
    with TensorDir(model_dir) as tensors:
        for name, rule in all_rules(arch).items():
            whole = rule.split(tensors, 0, 1)
            assert tuple(whole.shape) == rule.shape, name
            if "word_embeddings" in name or "output_layer" in name:
                assert whole[:93].abs().sum() > 0
                assert not whole[93:].any()


def test_one_query_key_value_group_by_hand(tmp_path):
    """Two groups of two query heads: q0 q1 k0 v0 | q2 q3 k1 v1."""
    model = tiny.build("qwen2", num_attention_heads=4, num_key_value_heads=2)
    tiny.save(model, tmp_path)
    attention = model.model.layers[0].self_attn
    q, k, v = (p.weight.detach().view(-1, 8, 32) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    expected = torch.cat([q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]])
    rule = all_rules(read_architecture(tmp_path))["decoder.layers.0.self_attention.linear_qkv.weight"]
    with TensorDir(tmp_path) as tensors:
        assert torch.equal(rule.split(tensors, 0, 1), expected)
        assert torch.equal(rule.split(tensors, 1, 2), expected[32:])


def test_one_key_value_head_for_all(tmp_path):
    tiny.save(tiny.build("llama", num_key_value_heads=1), tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    with TensorDir(tmp_path) as tensors:
        for rule in all_rules(read_architecture(tmp_path)).values():
            for name, tensor in rule.merge([rule.split(tensors, 0, 1)]):
                assert torch.equal(tensor, files[name]), name


def test_a_tied_head_is_made_by_the_first_stage_only(tmp_path):
    tiny.save(tiny.build("qwen3_tied"), tmp_path)
    arch = read_architecture(tmp_path)
    first = rules(arch, layers=range(1), first=True, last=False, experts=range(0))
    last = rules(arch, layers=range(1, 2), first=False, last=True, experts=range(0))
    assert "output_layer.weight" not in first
    assert last["output_layer.weight"].merge([torch.ones(96, 32)]) == []
    assert not set(hf_shapes(first)) & set(hf_shapes(last))
    assert {**hf_shapes(first), **hf_shapes(last)} == hf_shapes(all_rules(arch))


@pytest.mark.parametrize("expert_size", [1, 2, 4])
@pytest.mark.parametrize("pipeline_size", [1, 2, 4])
def test_the_tables_of_all_stages_make_every_tensor_once(tmp_path, pipeline_size, expert_size):
    """Each expert rank of a stage has all of the stage but the experts of the others."""
    arch = read_architecture(tiny.save(tiny.build("qwen3_moe", num_hidden_layers=4), tmp_path))
    experts, shared = [], []
    for stage, expert_rank in itertools.product(range(pipeline_size), range(expert_size)):
        place = {"pipeline_rank": stage, "pipeline_size": pipeline_size, "is_last_stage": stage == pipeline_size - 1}
        rank = SimpleNamespace(**place, expert_rank=expert_rank, expert_size=expert_size)
        table = stage_rules(arch, rank)
        experts += hf_shapes({name: rule for name, rule in table.items() if is_expert(name)})
        shared += hf_shapes({name: rule for name, rule in table.items() if not is_expert(name)})
        again = SimpleNamespace(**place, expert_rank=0, expert_size=expert_size)
        assert hf_shapes(stage_rules(arch, again, expert_rank=expert_rank)) == hf_shapes(table)
    assert sorted(shared) == sorted([*set(shared)] * expert_size)
    assert sorted([*experts, *set(shared)]) == sorted(hf_shapes(all_rules(arch)))


def test_experts_are_counted_from_the_ranks_first(tmp_path):
    tiny.save(tiny.build("qwen3_moe"), tmp_path)
    arch = read_architecture(tmp_path)
    second = rules(arch, layers=range(1, 2), first=False, last=True, experts=range(2, 4))
    name = "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight"
    assert is_expert(name)
    assert list(hf_shapes({name: second[name]})) == ["model.layers.1.mlp.experts.2.down_proj.weight"]
    assert sum(is_expert(n) for n in second) == 4


@pytest.mark.parametrize(("family", "num_norms"), [("qwen3", 2), ("qwen2", 2), ("qwen3_moe", 1)])
def test_names_of_transformer_engine_are_the_tables_both_ways(tmp_path, family, num_norms):
    arch = read_architecture(tiny.save(tiny.build(family), tmp_path))
    table = all_rules(arch)
    fused = {name: fused_name(name, arch) for name in table}
    assert len(set(fused.values())) == len(table)
    assert {plain_name(theirs): theirs for theirs in fused.values()} == fused
    changed = {name for name, theirs in fused.items() if name != theirs}
    assert len(changed) == num_norms * arch.num_layers
    layer = "decoder.layers.1."
    assert fused[layer + "input_layernorm.weight"] == layer + "self_attention.linear_qkv.layer_norm_weight"
    assert (layer + "mlp.linear_fc1.layer_norm_weight" in fused.values()) == (not arch.num_experts)
    assert "decoder.final_layernorm.weight" not in changed
