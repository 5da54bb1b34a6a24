"""Families that only transformers knows: they sample what their whole forward passes say, and `eval` takes them."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from test_decoding import VOCAB_SIZE, answers, assert_same, dense, drawn, loaded

from megatron_opd.__main__ import main
from megatron_opd.core.types import Prompt, Sampling
from megatron_opd.rollout import decoding
from megatron_opd.rollout.embedded_engine import LocalEngine
from megatron_opd.rollout.own_cache import OwnCacheReader
from megatron_opd.rollout.reading import MixtureReader, ModelReader, has_rows

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart"
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
ATTENTION = {**SIZES, **HEADS, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
KINDS = {
    "gemma2": ("Gemma2Config", {**ATTENTION, "sliding_window": 4}),  # windows in every other layer, capped logits
    "mistral": ("MistralConfig", {**ATTENTION, "sliding_window": 4}),
    "gpt2": ("GPT2Config", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "bloom": ("BloomConfig", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),  # positions by the mask
    "mamba": ("MambaConfig", {**SIZES, "state_size": 4}),  # a state, no keys
    "lfm2": ("Lfm2Config", {**ATTENTION, "layer_types": ["conv", "full_attention"]}),  # convolutions and attention
    # Caches that answers cannot share.
    "bamba": (
        "BambaConfig",
        {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 8,
         "mamba_d_state": 8, "mamba_n_groups": 1, "attn_layer_indices": [1], "mamba_chunk_size": 8},
    ),
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "lru_width": 32,
         "attention_window_size": 4, "num_hidden_layers": 3},
    ),
    "minimax": (
        "MiniMaxConfig",
        {**ATTENTION, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 4,
         "layer_types": ["linear_attention", "full_attention"]},
    ),
    "gemma4": ("Gemma4TextConfig", {**ATTENTION, "sliding_window": 4}),  # heads of several sizes
    "openai-gpt": ("OpenAIGPTConfig", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}  # fmt: skip


def model_of(kind):
    import transformers

    name, sizes = KINDS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return model_of(request.param)


def test_each_is_as_whole_forward_passes_say(model):
    begun = answers()
    assert not has_rows(model.config)
    found = drawn(OwnCacheReader(model, vocab_size=VOCAB_SIZE), begun, 0.9)
    assert_same(found, dense(model, begun, 0.9))
    assert {one.is_whole for one in found} == {True, False}  # some leave their group before others


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_its_company_does_not_matter(model, monkeypatch, rows):
    begun = answers()
    expected = drawn(OwnCacheReader(model, vocab_size=VOCAB_SIZE), begun)
    monkeypatch.setattr(decoding, "MAX_ROWS", rows)
    assert_same(drawn(OwnCacheReader(model, vocab_size=VOCAB_SIZE), begun), expected)


def test_a_mixture_with_a_model_that_has_rows():
    models = {ModelReader: loaded("qwen3"), OwnCacheReader: model_of("mamba")}
    both = [kind(model, vocab_size=VOCAB_SIZE) for kind, model in models.items()]
    begun = answers(number=9)
    one = drawn(MixtureReader(*both, alpha=1e-9, temperature=1.0), begun)
    assert_same(one, drawn(both[0], begun))
    other = drawn(MixtureReader(*both, alpha=1 - 1e-9, temperature=1.0), begun)
    assert_same(other, drawn(both[1], begun))


def test_the_engine_chooses_by_the_model(tmp_path):
    expected = {"gemma2": OwnCacheReader, "mamba": OwnCacheReader}
    for kind, reader in expected.items():
        engine = LocalEngine(tiny.save(model_of(kind), tmp_path / kind), eos_ids=(2,), vocab_size=VOCAB_SIZE)
        assert type(engine.reader()) is reader
        prompts = [Prompt(source="a", index=i, text="", token_ids=(5, 6, 7 + i)) for i in range(3)]
        greedy = engine.generate(prompts, Sampling(max_new_tokens=5, temperature=0))
        for prompt, answer in zip(prompts, greedy, strict=True):
            ids = list(prompt.token_ids)
            for token in answer.token_ids:
                assert token == engine.model(torch.tensor([ids])).logits[0, -1, :VOCAB_SIZE].argmax()
                ids.append(token)


def test_a_model_without_all_of_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(tiny.save(model_of("gpt2"), tmp_path / "gpt2"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.0.attn.c_attn.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for transformer\.h\.0\.attn\.c_attn\.weight"):
        LocalEngine(folder, eos_ids=(2,), vocab_size=VOCAB_SIZE)


def test_eval_grades_a_model_of_another_family(tmp_path, capsys):
    import transformers

    student = QUICKSTART / "models/student"
    sizes = {**ATTENTION, "vocab_size": 32, "sliding_window": 4}
    folder = Path(tiny.save(transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes)), tmp_path / "gemma"))
    for file in student.iterdir():
        if "token" in file.name or "chat" in file.name:
            shutil.copy(file, folder)
    assert main(["eval", str(QUICKSTART.parent / "quickstart.yaml"), "--model", str(folder)]) == 0
    assert "accuracy" in capsys.readouterr().out
