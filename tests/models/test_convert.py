"""Whole checkpoints: Hugging Face -> torch_dist -> Hugging Face bit for bit, and any torch_dist into any layout."""

import json

import pairwise
import pytest
import tiny
import torch
from safetensors.torch import load_file

from megatron_opd.models import convert
from megatron_opd.models.torch_dist_dir import TorchDistDir

FAMILIES = {
    "llama": {},
    "llama_mqa": {"num_key_value_heads": 1},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_tied": {},
    "qwen3_moe": {},
}
LAYOUTS = pairwise.LAYOUTS
MOE_LAYOUTS = {
    "tp1": {"tensor": 1},
    "pp2": {"pipeline": 2},
    "dp2ep2": {"data": 2, "expert": 2},
    "tp2sp": {"tensor": 2, "sequence": True},
    "tp2ep2sp": {"tensor": 2, "expert": 2, "sequence": True},
    "tp2pp2ep2sp": {"tensor": 2, "pipeline": 2, "expert": 2, "sequence": True},
}


def size(layout):
    return layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)


def model_dir(directory, family, *, dtype=torch.float32, shards=None, **changes):
    model = tiny.build(family.removesuffix("_mqa"), **{**FAMILIES[family], **changes}).to(dtype)
    tiny.save(model, directory, **({"max_shard_size": shards} if shards else {}))
    return directory


def to_megatron(source, out, **options):
    convert.to_megatron(convert.plan_to_megatron(source, **options), source, out)
    return out


def to_hf(source, out, **options):
    like = options.pop("like", source)
    convert.to_hf(convert.plan_to_hf(source, like=like, **options), source, out, like=like)
    return out


def tensors_of(directory):
    files = {}
    for path in sorted(directory.glob("*.safetensors")):
        files |= load_file(path)
    return files


def assert_same_tensors(one, other):
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    ("family", "dtype", "vocab_multiple"),
    pairwise.thin(pairwise.product([*FAMILIES], [torch.float32, torch.bfloat16], [1, 64])),
)
def test_there_and_back_is_bit_identical(tmp_path, family, dtype, vocab_multiple):
    source = model_dir(tmp_path / "hf", family, dtype=dtype, vocab_size=93)
    to_megatron(source, tmp_path / "mg", vocab_multiple=vocab_multiple)
    stored = TorchDistDir(tmp_path / "mg").shape("embedding.word_embeddings.weight")
    assert stored[0] == (128 if vocab_multiple == 64 else 93)
    to_hf(tmp_path / "mg", tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_sharded_input_and_transformers_reads_the_output(tmp_path, family):
    from transformers import AutoModelForCausalLM

    source = model_dir(tmp_path / "hf", family, shards="20KB")
    assert (source / "model.safetensors.index.json").is_file()
    to_hf(to_megatron(source, tmp_path / "mg"), tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")
    ids = torch.arange(3, 20)[None]
    models = [AutoModelForCausalLM.from_pretrained(d, attn_implementation="eager") for d in (source, tmp_path / "back")]
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in models))


def test_another_type(tmp_path):
    source = model_dir(tmp_path / "hf", "qwen2")
    to_megatron(source, tmp_path / "mg", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "mg/config.json").read_text())["dtype"] == "bfloat16"
    to_hf(tmp_path / "mg", tmp_path / "back", dtype=torch.float16)
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "float16"
    back = tensors_of(tmp_path / "back")
    for name, tensor in tensors_of(source).items():
        assert torch.equal(back[name], tensor.bfloat16().half())


def save_by_megatron(parallel, source, saved):
    """Save with Megatron's own dist_checkpointing a model filled from Hugging Face files."""
    from megatron.core import dist_checkpointing

    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.student import streamed, weights
    from megatron_opd.student.model import DTYPES, build_gpt, transformer_config

    multiple = parallel.tensor_size
    arch = read_architecture(source, vocab_multiple=multiple)
    dtype = DTYPES["bf16" if json.loads((source / "config.json").read_text())["dtype"] == "bfloat16" else "fp32"]
    model = build_gpt(arch, transformer_config(arch, parallel, dtype=dtype), parallel)
    weights.load(model, arch, source, parallel)
    if parallel.is_main:
        saved.mkdir()
    torch.distributed.barrier()
    with streamed.writing({}):  # a test's rank may not have children
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(saved))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_tied", "qwen3_moe"])
@pytest.mark.parametrize("layout", [{"tensor": 1}, {"tensor": 2, "pipeline": 2}], ids=["tp1", "tp2pp2"])
def test_keys_shapes_and_offsets_are_megatrons_own(ranks, tmp_path, family, layout):
    if family == "qwen3_moe" and layout.get("pipeline"):
        layout = {**layout, "expert": 2, "sequence": True}
    source = model_dir(tmp_path / "hf", family, vocab_size=93)
    ranks.run(size(layout), save_by_megatron, source, tmp_path / "saved", **layout)
    megatrons, ours = TorchDistDir(tmp_path / "saved"), TorchDistDir(to_megatron(source, tmp_path / "mg"))
    assert megatrons.tensors.keys() == ours.tensors.keys()
    for parameter in convert.plan_to_hf(tmp_path / "mg", like=source).parameters:
        region = parameter.region
        if "word_embeddings" not in region.key and "output_layer" not in region.key:
            assert megatrons.shape(region.key) == ours.shape(region.key) == region.whole
            assert torch.equal(megatrons.read(region), ours.read(region)), parameter.name
    metadata = [json.loads((tmp_path / d / "metadata.json").read_text()) for d in ("saved", "mg")]
    assert {**_COMMON_BACKEND, **metadata[0]} == metadata[1]
    to_hf(tmp_path / "saved", tmp_path / "back", like=source)
    assert_same_tensors(source, tmp_path / "back")


_COMMON_BACKEND = {"common_backend": "torch", "common_backend_version": 1}
"""The newest stack's checkpoints do not say it, and it does not look."""


def load_both_ways(parallel, source, checkpoint, multiple, dtype):
    """Names of parameters that differ between loading Hugging Face files and a torch_dist checkpoint; padding rows."""
    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.student import source as weights_source
    from megatron_opd.student.model import DTYPES, build_gpt, transformer_config

    models = []
    for directory in (source, checkpoint):
        arch = read_architecture(directory, vocab_multiple=multiple)
        model = build_gpt(arch, transformer_config(arch, parallel, dtype=DTYPES[dtype]), parallel)
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        weights_source.load(model, arch, directory, parallel)
        models.append(dict(model.named_parameters()))
    one, other = models
    assert one.keys() == other.keys()
    padding = 0
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in other:
            first = parallel.tensor_rank * len(other[name])
            rows = other[name][max(arch.vocab_size - first, 0) :]
            assert not rows.any()
            padding += len(rows)
    return [name for name in one if not torch.equal(one[name], other[name])], padding


@pytest.mark.parametrize(
    ("family", "layout"), pairwise.thin(pairwise.product(["llama", "qwen2", "qwen3_tied"], LAYOUTS))
)
def test_loading_a_converted_checkpoint_is_loading_the_files(ranks, tmp_path, family, layout):
    """At any layout, also one whose padding is not that of the checkpoint."""
    dtype = "bf16" if family == "qwen2" else "fp32"
    source = model_dir(
        tmp_path / "hf", family, vocab_size=93, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32
    )
    to_megatron(source, tmp_path / "mg", vocab_multiple=2)
    answers = ranks.run(size(layout), load_both_ways, source, tmp_path / "mg", 4, dtype, **layout)
    assert [different for different, _ in answers] == [[]] * size(layout)
    assert sum(padding for _, padding in answers) > 0


def head_rows(parallel, directory, cuts):
    """The rows of the output head that each of `cuts` asks for."""
    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.student import source

    arch = read_architecture(directory)
    return [source.load_head_rows(directory, arch, start, stop) for start, stop in cuts]


@pytest.mark.parametrize("family", ["llama", "qwen3_tied"])
def test_rows_of_a_head_beyond_its_vocabulary_are_zero_whatever_the_checkpoint_has_there(ranks, tmp_path, family):
    source = model_dir(tmp_path / "hf", family, vocab_size=96)
    config = to_megatron(source, tmp_path / "mg") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 93}))  # three rows are padding now
    cuts = [(0, 48), (48, 96), (90, 120), (96, 144)]
    head = tensors_of(source)["model.embed_tokens.weight" if family == "qwen3_tied" else "lm_head.weight"]
    expected = torch.cat([head[:93], torch.zeros(51, head.shape[1])])
    for (start, stop), rows in zip(cuts, ranks.run(1, head_rows, tmp_path / "mg", cuts)[0], strict=True):
        assert torch.equal(rows, expected[start:stop])


@pytest.mark.parametrize("layout", pairwise.thin(pairwise.product(MOE_LAYOUTS)))
def test_loading_a_converted_mixture(ranks, tmp_path, layout):
    source = model_dir(tmp_path / "hf", "qwen3_moe", vocab_size=93)
    to_megatron(source, tmp_path / "mg")
    answers = ranks.run(size(layout), load_both_ways, source, tmp_path / "mg", 2, "fp32", **layout)
    assert [different for different, _ in answers] == [[]] * size(layout)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("qwen3_tied", torch.bfloat16),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("llama", torch.bfloat16), ("qwen3_tied", torch.float32)]
        ),
    ],
    ids=str,
)
def test_resharding_what_megatron_saved(ranks, tmp_path, family, dtype):
    """Saved by Megatron at TP=2 x PP=2; read at TP=4, at PP=4, on one rank, and by the converter."""
    source = model_dir(tmp_path / "hf", family, vocab_size=93, num_hidden_layers=4, dtype=dtype)
    ranks.run(4, save_by_megatron, source, tmp_path / "saved", tensor=2, pipeline=2)
    for file in source.glob("*.json"):
        (tmp_path / "saved" / file.name).write_text(file.read_text())
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    for layout in ({"tensor": 4}, {"pipeline": 4}, {"tensor": 1}):
        answers = ranks.run(size(layout), load_both_ways, source, tmp_path / "saved", 4, kind, **layout)
        assert [different for different, _ in answers] == [[]] * size(layout)
    to_hf(tmp_path / "saved", tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")


def save_a_run(parallel, source, run_dir):
    """What a run saves: a student with its optimizer; returns what the run would export."""
    from megatron_opd.student.checkpoint import Checkpoints
    from megatron_opd.student.student import Student

    student = Student(tiny.config(str(source), [{"name": "t", "model": str(source)}]), parallel)
    Checkpoints(run_dir, parallel, keep_last=1).save(student, {"step": 3})
    return {name: tensor.clone() for name, tensor in student.export()}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3_tied", {"tensor": 2, "pipeline": 2}),
        ("qwen3_moe", {"tensor": 2, "expert": 2, "sequence": True}),
    ],
)
def test_a_runs_own_checkpoint(ranks, tmp_path, family, layout):
    from megatron_opd.models.describe import describe

    source = model_dir(tmp_path / "hf", family)
    exported = ranks.run(size(layout), save_a_run, source, tmp_path / "run", **layout)[0]
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    to_hf(checkpoint, tmp_path / "out", like=source)
    assert_same_tensors(source, tmp_path / "out")
    assert exported.keys() == tensors_of(source).keys()
    facts = describe(checkpoint, like=source)
    assert (facts["step"], facts["optimizer"], facts["problems"]) == (3, True, [])
    data = bytearray((checkpoint / "__1_0.distcp").read_bytes())
    data[len(data) // 3] ^= 1
    (checkpoint / "__1_0.distcp").write_bytes(data)
    with pytest.raises(ValueError, match=r"step_00000003 is damaged: __1_0\.distcp is not as it was written"):
        to_hf(checkpoint, tmp_path / "damaged", like=source)
    assert not (tmp_path / "damaged").exists()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.raises(ValueError, match="its student's norm_eps is 1e-06, in the config"):
        convert.plan_to_hf(checkpoint, like=source)


def share_the_work(parallel, source, out):
    parts = []
    plan = convert.plan_to_megatron(source)
    convert.to_megatron(plan, source, out / "mg", progress=parts.append)
    plan = convert.plan_to_hf(out / "mg", like=out / "mg")
    convert.to_hf(plan, out / "mg", out / "back", like=out / "mg")
    return sum(parts)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_several_processes_share_the_work(ranks, tmp_path, family):
    source = model_dir(tmp_path / "hf", family)
    answers = ranks.run(3, share_the_work, source, tmp_path, data=3)
    total = sum(tensor.numel() * 4 for tensor in tensors_of(source).values())
    assert sum(answers) == total
    assert max(answers) < 0.6 * total
    assert len(list((tmp_path / "mg").glob("*.distcp"))) == 3
    assert_same_tensors(source, tmp_path / "back")


def fail_on_one(parallel, source, out):
    """What each rank is told when rank 1 cannot do its part."""
    plan = convert.plan_to_megatron(source)

    def progress(_):
        if parallel.rank == 1:
            raise OSError(28, "No space left on device")

    said = []
    for act in (
        lambda: convert.to_megatron(plan, source, out / "mg", progress=progress),
        lambda: convert.to_hf(
            convert.plan_to_hf(out / "whole", like=source), out / "whole", out / "back", like=source, progress=progress
        ),
    ):
        try:
            act()
        except (OSError, ValueError) as error:
            said.append(str(error))
    return said


def test_an_error_on_one_rank_is_raised_on_all_and_leaves_nothing(ranks, tmp_path):
    source = model_dir(tmp_path / "hf", "qwen3")
    to_megatron(source, tmp_path / "whole")
    answers = ranks.run(2, fail_on_one, source, tmp_path, data=2)
    assert all(len(said) == 2 and all("No space left" in text for text in said) for said in answers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "whole"]
