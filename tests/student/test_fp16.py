"""A student in fp16: scaled losses give the gradients of unscaled ones; an overflow costs a step and nothing else."""

import copy
import dataclasses
import math

import pytest
import steps
import tiny
import torch
from test_skipped import same, state

VOCAB_SIZE = 90
NUM_STEPS = 3
NUM_TO_SETTLE = 24
MIXED = {"tensor": 2, "expert": 2, "sequence": True}
LAYOUTS = [{"tensor": 1}, {"tensor": 2}, {"pipeline": 2}, {"data": 2}]
OPTIM = {"lr": 1e-2, "eps": 1e-2, "clip_grad": 1.0}
"""eps: Adam divides by a gradient's size, so without it the signs of gradients that are nothing but rounding count."""


def half(family, **changes):
    """A model whose weights fp16 knows."""
    return tiny.build(family, **changes).half().float()


MODELS = {
    "qwen3": ("qwen3", {"seed": 1}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "llama": ("llama", {"hidden_size": 48, "seed": 2}),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.save(half(family, **made), root / name) for name, (family, made) in MODELS.items()}


def config(paths, student="qwen3", *, dtype="fp16", scale=64.0, distributed=True, **train):
    teachers = [{"name": name, "model": paths[name], "dtype": dtype} for name in ("llama", "qwen3_moe")]
    return tiny.config(
        paths[student],
        teachers,
        student={"dtype": dtype},
        optim={**OPTIM, "distributed": distributed, "initial_loss_scale": scale},
        train={"steps": 10, "micro_batch_size": 2, **train},
    )


def size(layout):
    return math.prod(layout.get(name, 1) for name in ("tensor", "pipeline", "data"))


def rollouts():
    return tiny.rollouts(count=8, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def reference(paths):
    """[metrics by step], and the student after the last, by the dense float64 formula."""
    student, *teachers = (half(MODELS[n][0], **MODELS[n][1]) for n in ("qwen3", "llama", "qwen3_moe"))
    dense = steps.Reference(config(paths), copy.deepcopy(student), teachers, VOCAB_SIZE)
    return [dense.step(rollouts(), number) for number in range(1, NUM_STEPS + 1)], dense.student


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_steps_follow_the_dense_formula(ranks, paths, reference, layout, distributed):
    if not distributed and layout != {"tensor": 2}:
        pytest.skip("the plain optimizer is Megatron's own; one layout shows that it is used rightly")
    made = config(paths, distributed=distributed)
    found, _, weights = ranks.run(size(layout), steps.train, made, rollouts(), VOCAB_SIZE, NUM_STEPS, **layout)[0]
    expected, student = reference
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-3)
        assert theirs["grad_norm"] > OPTIM["clip_grad"]  # so that clipping by a scaled norm would show
        assert (mine["loss_scale"], mine["step/skipped"]) == (64.0, 0.0)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    start = half("qwen3", seed=1).state_dict()
    moved, apart = 0.0, 0.0
    for name, parameter in student.named_parameters():
        moved += float((parameter.data - start[name].double()).pow(2).sum())
        apart += float((weights[name].double() - parameter.data).pow(2).sum())
    assert math.sqrt(apart / moved) <= 0.05


def overflowing(parallel, made):
    """Metrics and reasons of steps at a scale that is too large, whether they changed anything, those of the first step
    that did, and whether that is as if training had begun at the scale that it found."""
    student, objective, pack = steps.build(parallel, made, VOCAB_SIZE)
    batches = pack(rollouts()[parallel.data_rank :: parallel.data_size])
    told, unchanged, before = [], True, weights_and_moments(student)
    while (after := student.step(batches, objective))["step/skipped"]:
        told.append((after, student.skipped))
        unchanged = unchanged and same(before, weights_and_moments(student))
    settled = dataclasses.replace(made.optim, initial_loss_scale=after["loss_scale"])
    other, objective, _ = steps.build(parallel, dataclasses.replace(made, optim=settled), VOCAB_SIZE)
    expected = other.step(batches, objective)
    return told, unchanged, after, expected == after and same(*map(weights_and_moments, (student, other)))


def weights_and_moments(student):
    """What an update changes; the loss scale is no part of it."""
    made = [leaf for leaf in state(student) if isinstance(leaf, torch.Tensor) and leaf.numel() > 1]
    return [*made, student.optimizer.param_groups[0]["lr"], student.scheduler.state_dict()]


@pytest.mark.parametrize(
    ("student", "layout", "distributed"),
    [
        *(pytest.param("qwen3", layout, True, id=str(layout)) for layout in LAYOUTS[1:]),
        pytest.param("qwen3", {"tensor": 2}, False, id="plain optimizer"),
        pytest.param("qwen3_moe", MIXED, True, id="experts"),
    ],
)
def test_an_overflow_halves_the_scale_and_is_otherwise_nothing(ranks, paths, student, layout, distributed):
    first = 2.0**26
    made = config(paths, student, scale=first, distributed=distributed, max_skipped=0)
    for told, unchanged, after, is_same in (answers := ranks.run(size(layout), overflowing, made, **layout)):
        assert (told, after) == (answers[0][0], answers[0][2])
        assert unchanged
        assert is_same
        assert told
        assert after["loss_scale"] == first / 2 ** len(told)
        assert after["grad_norm"] > 0
        for number, (metrics, why) in enumerate(told):
            assert metrics["loss_scale"] == first / 2**number
            assert metrics["step/skipped"] == 1
            assert metrics["loss"] == after["loss"]
            assert "grad_norm" not in metrics
            assert f"it is {first / 2 ** (number + 1):g} from now on" in why


def hopeless(parallel, made):
    """How many steps with an infinite gradient on the last rank are survived at the smallest scale, and the error."""
    student, objective, pack = steps.build(parallel, made, VOCAB_SIZE)
    batches = pack(rollouts())
    if parallel.rank == parallel.world_size - 1:
        student.gpt.decoder.layers[-1].mlp.linear_fc2.weight.register_hook(lambda grad: grad * float("inf"))
    for count in range(10):
        try:
            student.step(batches, objective)
        except FloatingPointError as error:
            return count, str(error)
    return None


def test_overflows_at_the_smallest_scale_end_the_run(ranks, paths):
    answers = ranks.run(2, hopeless, config(paths, scale=4.0, max_skipped=1))
    assert answers[0] == answers[1]
    count, error = answers[0]
    assert count == 3  # scales 4, 2, and 1 once
    assert "mlp.linear_fc2.weight" in error
    assert "student.dtype" in error


def refused(parallel, made):
    from megatron_opd.student.student import Student

    try:
        Student(made, parallel)
    except ValueError as error:
        return str(error)
    return None


def test_weights_that_fp16_does_not_know_are_refused(ranks, paths, tmp_path):
    """They would be infinite, and the first loss not a number."""
    model = half("qwen3", seed=1)
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = 7e4
    large = {**paths, "qwen3": tiny.save(model, tmp_path / "large")}
    (problem,) = ranks.run(1, refused, config(large))
    assert "decoder.layers.1.mlp.linear_fc2.weight" in problem
    assert "student.dtype" in problem
    assert ranks.run(1, refused, config(large, dtype="bf16")) == [None]


def head_refused(parallel, made):
    from megatron_opd.core.vocab import VocabShard
    from megatron_opd.teachers.head_shard import load_head

    share = 96 // parallel.tensor_size
    first = share * parallel.tensor_rank
    try:
        load_head(made.teachers[0], parallel, VocabShard(first, first + share, VOCAB_SIZE))
    except ValueError as error:
        return str(error)
    return None


def test_a_teacher_s_head_that_fp16_does_not_know_is_refused(ranks, paths, tmp_path):
    """By the rank that has the number; in a body it is the same check."""
    model = half(*MODELS["llama"][:1], **MODELS["llama"][1])
    model.lm_head.weight.data[70, 5] = -7e4
    large = {**paths, "llama": tiny.save(model, tmp_path / "large")}
    none, problem = ranks.run(2, head_refused, config(large), tensor=2)
    assert none is None
    assert problem.startswith("teacher 'llama': the output head of ")
    assert "teachers.N.dtype" in problem
    assert ranks.run(2, head_refused, config(large, dtype="bf16"), tensor=2) == [None, None]


def interrupted(parallel, made, directory):
    """Metrics and state after many steps, and after two, a checkpoint, and the others in another student."""
    from megatron_opd.student.checkpoint import Checkpoints

    student, objective, pack = steps.build(parallel, made, VOCAB_SIZE)
    batches = pack(rollouts()[parallel.data_rank :: parallel.data_size])
    checkpoints = Checkpoints(directory, parallel, keep_last=1)
    for step in range(NUM_TO_SETTLE):
        if step == 2:
            checkpoints.save(student, {"step": step})
        last = student.step(batches, objective)
    again, objective, pack = steps.build(parallel, made, VOCAB_SIZE)
    checkpoints.restore(again)
    for _ in range(NUM_TO_SETTLE - 2):
        resumed = again.step(batches, objective)
    return last, resumed, same(state(student), state(again))


@pytest.mark.parametrize("distributed", [True, False])
def test_a_resumed_run_is_bitwise_the_same(ranks, paths, tmp_path, distributed):
    """The checkpoint is made before the first step that is not skipped, while the scale is on its way down."""
    made = config(paths, scale=2.0**26, distributed=distributed)
    for last, resumed, is_same in ranks.run(2, interrupted, made, str(tmp_path)):
        assert last["loss_scale"] < 2.0**24
        assert last["step/skipped"] == 0
        assert resumed == last
        assert is_same
