"""Megatron's model against transformers': logits, exported weights and written directories, on every layout."""

import math

import pairwise
import pytest
import tiny
import torch

from megatron_opd.core.batching import pack
from megatron_opd.models import hf_dir


def spelled(layouts):
    """Every axis of every layout, so that a layout without one has the same value there as one that says 1."""
    return {name: {"data": 1, "tensor": 1, "pipeline": 1, "sequence": False} | its for name, its in layouts.items()}


LAYOUTS = spelled(
    {
        "tp2pp2sp": {"tensor": 2, "pipeline": 2, "sequence": True},
        "tp2sp": {"tensor": 2, "sequence": True},
        **dict(reversed(pairwise.LAYOUTS.items())),
    }
)
"""The largest first, which leaves fewer cases for `make test`."""


def size(layout):
    return math.prod(layout.get(axis, 1) for axis in ("tensor", "pipeline", "data"))


def sequences(family):
    """Right-padded micro-batches; llama3's rope scaling shows only far from the start."""
    rollouts = tiny.rollouts(count=3)
    if family == "llama":
        rollouts.append(tiny.rollout([(7 * i) % 90 for i in range(396)], (5, 6, 7, 8)))
    return rollouts


def logits_and_weights(parallel, model_dir, rollouts, vocab_multiple=1, dtype="fp32", bucket_bytes=256 << 20):
    """([logits [B, S, L] by micro-batch] on the last stage, exported weights on the leader)."""
    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.student import pipeline, weights
    from megatron_opd.student.model import DTYPES, build_gpt, transformer_config

    arch = read_architecture(model_dir, vocab_multiple=vocab_multiple)
    model = build_gpt(arch, transformer_config(arch, parallel, dtype=DTYPES[dtype]), parallel)
    weights.load(model, arch, model_dir, parallel)
    batches = pack(rollouts, micro_batch_size=2, length_multiple=4, device=torch.device("cpu"))
    logits = pipeline.forward(model.eval(), batches, lambda _, logits_BSL: logits_BSL)
    exported = list(weights.export(model, arch, parallel, bucket_bytes))
    return logits, [(name, tensor.clone()) for name, tensor in exported]


def join(answers):
    """(logits by micro-batch over the whole vocabulary, exported (name, tensor) pairs) from the answers by rank."""
    last = [logits for logits, _ in answers if logits]
    return [torch.cat(shards, dim=-1) for shards in zip(*last, strict=True)], answers[0][1]


@torch.no_grad()
def assert_same_logits(model, rollouts, found, **tolerance):
    batches = pack(rollouts, micro_batch_size=2, length_multiple=4, device=torch.device("cpu"))
    for batch, logits in zip(batches, found, strict=True):
        expected = model(batch.tokens_BS).logits
        torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, **tolerance)


def assert_same_weights(model_dir, exported):
    """Bit for bit those of the files, each once."""
    from safetensors.torch import load_file

    files = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        files |= load_file(path)
    assert sorted(name for name, _ in exported) == sorted(files)
    for name, tensor in exported:
        assert tensor.dtype == files[name].dtype
        assert torch.equal(tensor, files[name]), name


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny.build(family)


@pytest.fixture(scope="module")
def model_dir(model, family, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / family
    tiny.save(model, directory)
    return directory


@pytest.mark.parametrize(
    ("family", "layout"),
    pairwise.thin(pairwise.product([*tiny.FAMILIES], LAYOUTS)),
    indirect=["family"],
    scope="module",
)
def test_logits_and_exported_weights(ranks, family, model, model_dir, layout):
    rollouts = sequences(family)
    answers = ranks.run(size(layout), logits_and_weights, str(model_dir), rollouts, **layout)
    logits, exported = join(answers)
    assert_same_logits(model, rollouts, logits, atol=2e-5, rtol=1e-5)
    assert_same_weights(model_dir, exported)
    assert all(not exported for _, exported in answers[1:])


MOE_LAYOUTS = spelled(
    {
        "tp2pp2ep2sp": {"tensor": 2, "pipeline": 2, "expert": 2, "sequence": True},
        "tp4ep2sp": {"tensor": 4, "expert": 2, "sequence": True},
        "dp2": {"data": 2, "expert": 1},
        "tp2ep2sp": {"tensor": 2, "expert": 2, "sequence": True},
        "tp1": {"tensor": 1, "expert": 1},
    }
)


@pytest.mark.parametrize(("layout", "normalized"), pairwise.thin(pairwise.product(MOE_LAYOUTS, [True, False])))
def test_mixture_of_experts(ranks, layout, normalized, tmp_path):
    model = tiny.build("qwen3_moe", norm_topk_prob=normalized)
    tiny.save(model, tmp_path / "moe")
    rollouts = sequences("qwen3_moe")
    answers = ranks.run(size(layout), logits_and_weights, str(tmp_path / "moe"), rollouts, **layout)
    if layout["data"] == 2:  # both replicas saw the same and export all of it
        assert torch.equal(answers[0][0][0], answers[1][0][0])
        assert_same_weights(tmp_path / "moe", answers[1][1])
        answers = answers[:1]
    logits, exported = join(answers)
    assert_same_logits(model, rollouts, logits, atol=2e-5, rtol=1e-5)
    assert_same_weights(tmp_path / "moe", exported)


@pytest.mark.parametrize(
    ("family", "vocab_size", "multiple", "layout"),
    [
        ("qwen3", 93, 2, {"tensor": 2}),
        ("qwen3_tied", 93, 4, {"tensor": 4}),
        ("qwen3_tied", 93, 2, {"tensor": 2, "pipeline": 2}),
        ("llama", 70, 64, {"tensor": 4}),  # the last shard is padding only
    ],
)
def test_padded_vocabulary(ranks, tmp_path, family, vocab_size, multiple, layout):
    model = tiny.build(family, vocab_size=vocab_size)
    tiny.save(model, tmp_path / "m")
    rollouts = tiny.rollouts(count=3, vocab_size=vocab_size)
    answers = ranks.run(size(layout), logits_and_weights, str(tmp_path / "m"), rollouts, multiple, **layout)
    logits, exported = join(answers)
    assert logits[0].shape[-1] == -(-vocab_size // multiple) * multiple
    assert_same_logits(model, rollouts, logits, atol=2e-5, rtol=1e-5)
    assert_same_weights(tmp_path / "m", exported)


EXPORTS = pairwise.product([1, 3000], ["fp32", "bf16"], ["tp1", "tp2pp2"])
ONCE = [(1, "fp32", "tp1"), (1, "bf16", "tp2pp2"), (3000, "fp32", "tp2pp2"), (3000, "bf16", "tp1")]
"""Each pair of values in one case; `thin` would keep six."""


@pytest.mark.parametrize(
    ("bucket_bytes", "dtype", "layout"),
    [pytest.param(*c.values, marks=[] if c.values in ONCE else pytest.mark.slow) for c in EXPORTS],
)
def test_export_in_many_buckets(ranks, tmp_path, layout, dtype, bucket_bytes):
    model, layout = tiny.build("qwen2"), LAYOUTS[layout]
    model = model.bfloat16() if dtype == "bf16" else model
    tiny.save(model, tmp_path / "m")
    answers = ranks.run(
        size(layout), logits_and_weights, str(tmp_path / "m"), sequences("qwen2"), 1, dtype, bucket_bytes, **layout
    )
    logits, exported = join(answers)
    assert_same_weights(tmp_path / "m", exported)
    loose = {"atol": 0.1, "rtol": 0.02} if dtype == "bf16" else {"atol": 2e-5, "rtol": 1e-5}
    assert_same_logits(model, sequences("qwen2"), [x.to(model.dtype) for x in logits], **loose)


@pytest.mark.parametrize("shard_bytes", [4 << 30, 10_000], ids=["one file", "several files"])
@pytest.mark.parametrize("family", ["llama", "qwen3_tied"])
def test_written_directory_is_the_model(ranks, tmp_path, family, shard_bytes):
    """Files -> Megatron at TP=2 -> files: transformers and Megatron read both alike."""
    from transformers import AutoModelForCausalLM

    model = tiny.build(family, vocab_size=93)
    tiny.save(model, tmp_path / "in", max_shard_size="20KB")
    assert (tmp_path / "in" / "model.safetensors.index.json").is_file()
    rollouts = sequences(family)
    _, exported = join(ranks.run(2, logits_and_weights, str(tmp_path / "in"), rollouts, 2))
    hf_dir.write(iter(exported), tmp_path / "out", like=tmp_path / "in", shard_bytes=shard_bytes)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_bytes == 10_000)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert again.dtype == torch.float32
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    logits, exported_again = join(ranks.run(1, logits_and_weights, str(tmp_path / "out"), rollouts))
    assert_same_logits(model, rollouts, logits, atol=2e-5, rtol=1e-5)
    assert dict(exported_again).keys() == dict(exported).keys()
    assert all(torch.equal(tensor, dict(exported)[name]) for name, tensor in exported_again)


def load_fails(parallel, model_dir):
    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.student import weights
    from megatron_opd.student.model import build_gpt, transformer_config

    arch = read_architecture(model_dir)
    model = build_gpt(arch, transformer_config(arch, parallel, dtype=torch.float32), parallel)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        weights.load(model, arch, model_dir, parallel)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "no tensor 'model.layers.1.mlp.up_proj.weight'"),
        (lambda w: w.update({"model.norm.weight": torch.ones(31)}), "[31], but config.json requires [32]"),
    ],
    ids=["missing", "wrong shape"],
)
def test_contradicting_files_are_refused(ranks, tmp_path, change, message):
    from safetensors.torch import load_file, save_file

    tiny.save(tiny.build("qwen3"), tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    assert message in ranks.run(1, load_fails, str(tmp_path / "m"))[0]
