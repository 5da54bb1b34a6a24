"""FP8 by Transformer Engine on a GPU: the assertions of tests/precision/test_fp8.py, against its emulation.

The device's sums are not ours, so a value can fall on the other side of a rounding: real and emulated FP8 must agree
several times better than FP8 agrees with bf16.
"""

import dataclasses

import pytest
import tiny
import torch

from megatron_opd import config as c
from megatron_opd.core.vocab import VocabShard

pytestmark = pytest.mark.gpu
VOCAB_SIZE = 90
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_hidden_layers": 3}  # fmt: skip
RECIPES = ["tensorwise", "delayed", "blockwise"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    pytest.importorskip("transformer_engine.pytorch")
    root = tmp_path_factory.mktemp("models")
    made = {"student": tiny.build("qwen3", vocab_size=96, **SIZES), "teacher": tiny.build("qwen3", seed=1, **SIZES)}
    return {name: tiny.save(model.bfloat16(), root / name) for name, model in made.items()}


def config(paths, **fp8):
    made = tiny.config(
        paths["student"],
        [{"name": "t", "model": paths["teacher"], "dtype": "bf16"}],
        student={"vocab_multiple": 4, "dtype": "bf16"},
    )
    return dataclasses.replace(made, precision=c.PrecisionConfig(fp8=c.Fp8Config(**fp8)))


def hidden_of(parallel, config, rollouts):
    """(hidden states of the rollouts, twice; bytes of bf16 parameters; bytes that the teacher takes)."""
    from megatron_opd.teachers import build_teacher

    before = torch.cuda.memory_allocated()
    teacher = build_teacher(config.teachers[0], config, parallel, VocabShard(0, 96, 96))
    taken = torch.cuda.memory_allocated() - before
    scores = [torch.cat([s.hidden_RD.float().cpu() for s in teacher.score(rollouts)]) for _ in range(2)]
    num_bytes = sum(p.untyped_storage().nbytes() for p in teacher.model.parameters() if p.dtype == torch.bfloat16)
    return *scores, num_bytes, taken


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_a_teacher_is_nearer_to_its_emulation_than_to_bf16(ranks, paths, recipe):
    rollouts = tiny.rollouts(count=4, vocab_size=VOCAB_SIZE)
    ((_, real, *_),) = ranks.run(1, hidden_of, config(paths, teachers=["t"], recipe=recipe), rollouts)
    ((_, emulated, *_),) = ranks.run(1, hidden_of, config(paths, teachers=["t"], recipe=recipe, emulate=True), rollouts)
    ((plain, *_),) = ranks.run(1, hidden_of, config(paths), rollouts)
    assert distance(real, plain) > 0.005, "FP8 was quietly left out"
    assert distance(real, emulated) < distance(real, plain) / 2


def test_resident_matrices_say_about_the_same(ranks, paths):
    rollouts = tiny.rollouts(count=4, vocab_size=VOCAB_SIZE)
    ((real, _, num_bytes, taken),) = ranks.run(1, hidden_of, config(paths, teachers=["t"]), rollouts)
    ((kept, _, _, taken_resident),) = ranks.run(1, hidden_of, config(paths, teachers=["t"], resident=True), rollouts)
    assert num_bytes > 0
    assert taken_resident < taken - num_bytes / 4, "kept a second time, transposed"
    assert distance(kept, real) < 0.05


def left_behind(parallel, config, rollouts):
    """Bytes on the GPU that are more after an offloaded teacher has scored than before, and those of its weights."""
    from megatron_opd.teachers import build_teacher

    teacher = build_teacher(config.teachers[0], config, parallel, VocabShard(0, 96, 96))
    with teacher.offloaded.there():
        size = sum(p.nbytes for p in teacher.model.parameters())
    teacher.score(rollouts)  # what any model leaves: cuBLAS's workspace, the process's first buffers
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for module in teacher.model.modules():
        assert not getattr(module, "_fp8_workspaces", None), "a copy in FP8 stays"
    teacher.score(rollouts)
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before, size


def test_an_offloaded_teacher_leaves_no_copies_in_fp8(ranks, paths):
    made = config(paths, teachers=["t"])
    made = dataclasses.replace(made, teachers=[dataclasses.replace(made.teachers[0], offload=True)])
    ((left, size),) = ranks.run(1, left_behind, made, tiny.rollouts(count=4, vocab_size=VOCAB_SIZE))
    assert left < size / 10


def train(parallel, config, rollouts):
    """([metrics by step], whether the model says something else with its FP8 off, exported weights before)."""
    import steps

    student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    before = {name: tensor.float().cpu() for name, tensor in student.export()}
    batch = pack(rollouts)[0]
    on = student.logits(batch)
    with student.fp8.off():
        off = student.logits(batch)
    differs = not torch.equal(on, off)
    return [student.step(pack(rollouts), objective) for _ in range(3)], differs, before


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_student_trains(ranks, paths, recipe):
    rollouts = tiny.rollouts(count=8, vocab_size=VOCAB_SIZE)
    ((metrics, differs, before),) = ranks.run(1, train, config(paths, student="full", recipe=recipe), rollouts)
    assert differs
    assert all(0 < step["loss"] < 100 and step["grad_norm"] > 0 for step in metrics)
    ((plain, same, _),) = ranks.run(1, train, config(paths), rollouts)
    assert not same
    assert metrics[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.05)
    # Transformer Engine's names of norms lead to the same tensors.
    from safetensors.torch import load_file

    files = load_file(f"{paths['student']}/model.safetensors")
    assert before.keys() == files.keys()
    assert all(torch.equal(before[name], tensor.float()) for name, tensor in files.items())


def measure(parallel, config, rollouts):
    import steps

    from megatron_opd.teachers import build_teachers
    from megatron_opd.trainer import fp8_fidelity
    from megatron_opd.trainer.experience import Experience

    student, objective, _ = steps.build(parallel, config, VOCAB_SIZE)
    teachers = build_teachers(config, parallel, objective.distillation.vocab)
    experience = Experience(config, parallel, teachers, None)
    plain = fp8_fidelity.without_fp8(config, teachers, parallel, objective.distillation.vocab)
    return fp8_fidelity.measure(student, (teachers, plain), objective, rollouts, experience.score)


@pytest.mark.parametrize(
    ("fp8", "noisy"),
    [
        ({"student": "full"}, {"student"}),
        ({"teachers": ["t"]}, {"t", "ensemble"}),
        ({"heads": ["t"]}, {"t", "ensemble"}),
        ({"heads": ["student"]}, {"student"}),
    ],
)
def test_noise_is_where_fp8_is(ranks, paths, fp8, noisy):
    (found,) = ranks.run(1, measure, config(paths, **fp8), tiny.rollouts(count=6, vocab_size=VOCAB_SIZE))
    assert {noise.name for noise in found.noises if noise.kl > 1e-6} == noisy
    assert 0 < found.gradient_error < 1
