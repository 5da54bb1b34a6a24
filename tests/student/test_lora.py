"""Which modules get adapters, how their rows lie in Megatron's, and how wrong settings are answered."""

import pytest
import tiny
import torch

from megatron_opd import config as c
from megatron_opd.config.checks_lora import check_lora
from megatron_opd.config.file import ConfigError, from_dict, to_dict
from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.lora_layout import check_targets, merged, places
from megatron_opd.models.weight_map import all_rules


def lora(*targets, rank=2, alpha=3.0):
    return c.LoraConfig(rank=rank, alpha=alpha, targets=list(targets))


def problems(**settings):
    return check_lora(c.LoraConfig(**settings))


def architecture(tmp_path, family):
    return read_architecture(tiny.save(tiny.build(family), tmp_path / family))


def test_targets_mean_modules():
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert lora().modules == lora("all-linear").modules == lora(*reversed(every)).modules == every
    assert lora("o_proj", "qkv", "q_proj").modules == every[:4]


def test_wrong_settings_are_answered_by_name():
    assert problems(rank=4, alpha=1.0, targets=["qkv", "o_proj", "all-linear"]) == []
    tree = to_dict(tiny.config("unused", [{"name": "t", "model": "unused"}]))
    tree["data"]["train"] = [{"name": "x", "path": "unused"}]
    with pytest.raises(ConfigError) as refused:
        from_dict({**tree, "lora": {"rank": -1, "alpha": 0.0}})
    assert refused.value.problems == [
        "lora.rank must not be negative, but is -1",
        "lora.alpha must be above 0, not 0.0",
    ]
    assert problems(targets=["qproj"]) == ["lora.targets: there is no module 'qproj'; did you mean 'q_proj'?"]
    [unknown] = problems(targets=["xyz"])
    assert unknown.startswith("lora.targets: there is no module 'xyz'; known: q_proj, k_proj")
    for target, why in (("gate", "router"), ("router", "router"), ("lm_head", "head"), ("embed_tokens", "embeddings")):
        [problem] = problems(rank=4, targets=[target])
        assert f"lora.targets: '{target}': " in problem
        assert why in problem
        assert "never adapted" in problem


def test_mlp_of_a_mixture_is_refused_by_name(tmp_path):
    mixture, dense = architecture(tmp_path, "qwen3_moe"), architecture(tmp_path, "qwen3")
    assert check_targets(dense, lora()) == check_targets(mixture, lora("qkv", "o_proj")) == []
    assert check_targets(mixture, lora(rank=0)) == []
    [problem] = check_targets(mixture, lora())
    assert "lora.targets" in problem
    assert "mixture of experts, whose gate_proj, up_proj, down_proj cannot" in problem
    [problem] = check_targets(mixture, lora("q_proj", "up_proj"))
    assert "whose up_proj cannot" in problem
    adapted = [place.megatron for place in places(mixture, lora("qkv", "o_proj"))]
    assert adapted == ["self_attention.linear_qkv", "self_attention.linear_proj"]


def test_rows_of_adapters_lie_where_those_of_their_modules_do(tmp_path):
    """What is added to Megatron's matrix of one shard is, taken apart by the table of weights, B A of each module."""
    arch = architecture(tmp_path, "qwen3")
    table = all_rules(arch)
    for targets in ((), ("k_proj", "gate_proj", "down_proj"), ("v_proj", "up_proj", "o_proj")):
        config = lora(*targets)
        seen = []
        for place in places(arch, config):
            rule = table[f"decoder.layers.1.{place.megatron}.weight"]
            pairs = {
                part: (torch.randn(config.rank, place.inputs), torch.randn(place.rows(part), config.rank))
                for part in place.parts
                if part in config.modules
            }
            changed = dict(rule.merge([merged(torch.zeros(rule.shape), place, pairs, config.scale)]))
            for part in place.parts:
                found = changed[f"model.layers.1.{place.hf}{part}.weight"]
                expected = 1.5 * pairs[part][1] @ pairs[part][0] if part in pairs else torch.zeros_like(found)
                torch.testing.assert_close(found, expected)
            seen += pairs
        assert tuple(seen) == config.modules
