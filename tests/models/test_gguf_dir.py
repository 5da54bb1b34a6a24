"""A GGUF file, written here by the gguf package, becomes a directory with the same weights and tokenizer."""

import importlib.util
import sys

import hub_server
import pytest
import tiny
import torch
from safetensors.torch import load_file

from megatron_opd.models import gguf_dir, hub
from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.headers import check_tensors
from megatron_opd.models.tokenizer import load_tokenizer

_MISSING = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
needs_reader = pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)} (extra gguf)")
TOKENS = [*(chr(c) for c in range(33, 127)), "Ġ", "ab", "<|end|>"]
_PARTS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
_PARTS |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
_PARTS |= {"model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm"}
_PARTS |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def in_gguf(name):
    """The name that a tensor of a Qwen2 has in GGUF."""
    for theirs, ours in _PARTS.items():
        name = name.replace(theirs, ours)
    return (
        name.replace("model.layers", "blk")
        .replace("model.embed_tokens", "token_embd")
        .replace("model.norm", "output_norm")
    )


def write(path, model, kind, *, architecture="qwen2"):
    """`kind` is the type of matrices, F32, F16, Q8_0."""
    import gguf

    config, out = model.config, gguf.GGUFWriter(path, architecture)
    out.add_context_length(config.max_position_embeddings)
    out.add_block_count(config.num_hidden_layers)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    out.add_token_list(TOKENS)
    out.add_token_types([1] * (len(TOKENS) - 1) + [3])
    out.add_token_merges(["a b"])
    out.add_eos_token_id(len(TOKENS) - 1)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        type_ = gguf.GGMLQuantizationType[kind if tensor.dim() > 1 else "F32"]
        out.add_tensor(in_gguf(name), gguf.quants.quantize(tensor.numpy(), type_), raw_dtype=type_)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture
def model():
    return tiny.build("qwen2", intermediate_size=64, vocab_size=len(TOKENS))


@pytest.fixture
def home(tmp_path, monkeypatch):
    with hub_server.running() as found:
        hub_server.use(monkeypatch, found, tmp_path / "home")
        yield found


@needs_reader
@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("Q8_0", torch.bfloat16)])
def test_weights_config_and_tokenizer(tmp_path, home, model, kind, dtype):
    said = []
    file = write(tmp_path / "tiny.gguf", model, kind)
    found = hub.directory(str(file), say=said.append)
    weights = load_file(f"{found}/model.safetensors")
    own = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert weights.keys() == own.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == dtype
        if kind == "Q8_0":
            torch.testing.assert_close(tensor.float(), own[name], rtol=0.02, atol=0.02)
        else:
            assert torch.equal(tensor, own[name].to(dtype))
    arch = read_architecture(found)
    assert (arch.family, arch.num_layers, arch.tied_embeddings) == ("qwen2", 2, True)
    assert not check_tensors(found, arch)
    tokenizer = load_tokenizer(found)
    assert tokenizer.encode("a b") == [TOKENS.index("a"), TOKENS.index("Ġ"), TOKENS.index("b")]
    assert tokenizer.eos_ids == (len(TOKENS) - 1,)
    assert said == [f"unpacking {file} into {found}"]
    assert hub.directory(str(file), say=said.append) == found
    assert len(said) == 1, "it is unpacked once"


@needs_reader
def test_a_file_of_the_hub(tmp_path, home, model):
    commit = home.add(
        "org/tiny-GGUF", {"tiny.Q8_0.gguf": write(tmp_path / "t.gguf", model, "Q8_0").read_bytes(), "other": b"x"}
    )
    found = hub.directory("org/tiny-GGUF:tiny.Q8_0.gguf", say=lambda _: None)
    assert read_architecture(found).family == "qwen2"
    assert hub.pinned("org/tiny-GGUF:tiny.Q8_0.gguf", found) == f"org/tiny-GGUF@{commit}:tiny.Q8_0.gguf"
    assert [path.rpartition("/")[2] for path in home.downloads()] == ["tiny.Q8_0.gguf"]


@needs_reader
def test_what_cannot_be_read_is_said_and_leaves_nothing(tmp_path, home, model):
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF nonsense")
    other = write(tmp_path / "other.gguf", model, "F32", architecture="rwkv6")
    for path, why in ((tmp_path / "damaged.gguf", "cannot read"), (other, "rwkv6 is not supported")):
        with pytest.raises(ValueError, match=why) as refused:
            hub.directory(str(path), say=lambda _: None)
        assert str(path) in str(refused.value)
    assert {path.suffix for path in gguf_dir.place_of(other).parent.iterdir()} <= {".lock"}


def test_without_the_package_it_says_what_to_install(tmp_path, home, monkeypatch):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-opd\[gguf\]'"):
        hub.directory(str(tmp_path / "tiny.gguf"), say=lambda _: None)
