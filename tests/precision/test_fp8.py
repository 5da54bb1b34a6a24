"""Emulated FP8 in Megatron's models: against transformers' models rounded by hand, and what it leaves alone."""

import dataclasses
from functools import cache

import oracle
import pytest
import steps
import tiny
import torch

from megatron_opd import config as c
from megatron_opd.config import TeacherConfig
from megatron_opd.core.vocab import VocabShard
from megatron_opd.precision.fp8_plan import ModelPlan, student_plan, teacher_plan
from megatron_opd.precision.recipes import RECIPES
from megatron_opd.teachers import build_teachers

VOCAB_SIZE = 90
SIZES = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {"student": tiny.build("qwen3", vocab_size=96, **SIZES), "teacher": tiny.build("qwen3", seed=1, **SIZES)}
    made["mixture"] = tiny.build("qwen3_moe", head_dim=8, moe_intermediate_size=16)
    return {name: tiny.save(model, root / name) for name, model in made.items()}


def config(paths, *, layout=None, which="student", **fp8):
    made = tiny.config(
        paths[which], [{"name": "t", "model": paths["teacher"]}], parallel=layout or {}, student={"vocab_multiple": 4}
    )
    return dataclasses.replace(made, precision=c.PrecisionConfig(fp8=c.Fp8Config(emulate=bool(fp8), **fp8)))


# What FP8 means, by hand ------------------------------------------------------------------------------------------


def cast(x, fmt=torch.float8_e4m3fn, amax=None):
    """Under one scale a tensor."""
    scale = torch.finfo(fmt).max / (x.abs().amax() if amax is None else amax)
    return (x * scale).to(fmt).float() / scale


def rounded_model(model, *, kept=()):
    """transformers' model with rounded weights and inputs of its layers' matrices; q, k, v and gate, up are one matrix
    each, as they are in Megatron."""
    for number, layer in enumerate(model.model.layers):
        if number in kept:
            continue
        a, m = layer.self_attn, layer.mlp
        for fused in ([a.q_proj, a.k_proj, a.v_proj], [a.o_proj], [m.gate_proj, m.up_proj], [m.down_proj]):
            amax = torch.stack([linear.weight.abs().amax() for linear in fused]).amax()
            for linear in fused:
                linear.weight.data = cast(linear.weight.data, amax=amax)
                linear.register_forward_pre_hook(lambda _, args: (cast(args[0]),))
    return model


def hidden_of(parallel, teacher, plan, rollouts):
    from megatron_opd.teachers.megatron_teacher import MegatronTeacher

    made = MegatronTeacher(
        TeacherConfig(name="t", model=teacher), parallel, VocabShard(0, 96, 96), micro_batch_size=1, plan=plan
    )
    scores = [made.score([rollout])[0].hidden_RD for rollout in rollouts]
    return scores, made.fp8.resident_bytes, sum(p.numel() for p in made.model.parameters())


def plan_for(paths, model="t", path="teacher", **fp8):
    from megatron_opd.models.architecture import read_architecture

    settings, arch = config(paths, **fp8), read_architecture(paths[path], vocab_multiple=4)
    if model == "student":
        made = student_plan(settings.precision, settings.student, settings.parallel, arch)
    else:
        (teacher,) = [t for t in settings.teachers if t.name == model]
        made = teacher_plan(settings.precision, teacher, settings.parallel, arch)
    assert isinstance(made, ModelPlan)
    # Padding takes part in a tensor's scale, and the model by hand has none.
    no_padding = dataclasses.replace(
        made.layer_products, recipe=dataclasses.replace(made.layer_products.recipe, multiple=1)
    )
    return dataclasses.replace(made, rules=tuple((p, h and no_padding) for p, h in made.rules))


@pytest.mark.parametrize("kept", [(), (0,), (0, 2)])
def test_a_teacher_is_transformers_model_rounded_by_hand(ranks, paths, kept):
    plan = plan_for(paths, teachers=["t"], first_layers_bf16=int(0 in kept), last_layers_bf16=int(2 in kept))
    rollouts = tiny.rollouts(count=3, vocab_size=VOCAB_SIZE)
    ((scores, _, _),) = ranks.run(1, hidden_of, paths["teacher"], plan, rollouts)
    plain = tiny.build("qwen3", seed=1, **SIZES)
    model = rounded_model(tiny.build("qwen3", seed=1, **SIZES), kept=kept)
    for rollout, found_RD in zip(rollouts, scores, strict=True):
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
        rows = slice(len(rollout.prompt.token_ids) - 1, -1)
        with torch.no_grad():
            expected, other = (m.model(ids).last_hidden_state[0, rows] for m in (model, plain))
        # A difference of a rounding before a cast can move a value to its neighbour, so a few are a step off.
        error = (found_RD - expected).norm() / expected.norm()
        noise = (other - expected).norm() / expected.norm()
        assert error < noise / 10, (error, noise)


def test_resident_matrices_take_a_byte_and_say_the_same(ranks, paths):
    rollouts = tiny.rollouts(count=3, vocab_size=VOCAB_SIZE)
    plan = plan_for(paths, teachers=["t"], recipe="blockwise")
    kept = plan_for(paths, teachers=["t"], recipe="blockwise", resident=True)
    ((scores, _, num_before),) = ranks.run(1, hidden_of, paths["teacher"], plan, rollouts)
    ((resident, num_bytes, num_left),) = ranks.run(1, hidden_of, paths["teacher"], kept, rollouts)
    for one, other in zip(scores, resident, strict=True):
        assert torch.equal(one, other)
    num_moved = num_before - num_left
    per_layer = 32 * (64 + 2 * 32) + 64 * 32 + 3 * 32 * 48
    assert num_moved == 3 * per_layer
    assert num_moved <= num_bytes < 1.02 * num_moved


def one_layer(parallel, is_column, backward, recipe):
    """(x, w, upstream, y, dx, dw) of one linear layer of Megatron's under emulation."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megatron_opd.precision.fp8_plan import Products
    from megatron_opd.precision.recipes import RECIPES
    from megatron_opd.student.fp8 import _Emulated

    torch.manual_seed(0)
    options = {"config": ModelParallelConfig(use_cpu_initialization=True), "init_method": torch.nn.init.normal_}
    if is_column:
        layer = ColumnParallelLinear(32, 48, bias=False, **options)
    else:
        layer = RowParallelLinear(32, 48, bias=False, input_is_parallel=True, skip_bias_add=True, **options)
    _Emulated(layer, Products(RECIPES[recipe], backward), parallel, resident=False)
    x = torch.randn(5, 2, 32).requires_grad_()
    upstream = torch.randn(5, 2, 48)
    y, _ = layer(x)
    y.backward(upstream)
    return [t.detach() for t in (x, layer.weight, upstream, y, x.grad, layer.weight.grad)]


@pytest.mark.parametrize("is_column", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_the_three_products_of_a_layer(ranks, is_column, backward):
    ((x, w, upstream, y, dx, dw),) = ranks.run(1, one_layer, is_column, backward, "tensorwise")
    qx, qw = cast(x), cast(w)
    dy = cast(upstream, torch.float8_e5m2) if backward else upstream
    torch.testing.assert_close(y, qx @ qw.T)
    torch.testing.assert_close(dx, dy @ qw)
    torch.testing.assert_close(dw, dy.flatten(0, 1).T @ qx.flatten(0, 1))
    assert not torch.equal(y, x @ w.T)


# Whole students ---------------------------------------------------------------------------------------------------


def train(parallel, config, rollouts):
    """([metrics by step], whether a model with its FP8 off says what it says without, exported weights)."""
    from megatron_opd.student.student import Student

    student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    plain = Student(dataclasses.replace(config, precision=c.PrecisionConfig()), parallel)
    (batch,) = pack(rollouts[:2])
    on = student.logits(batch)
    with student.fp8.off():
        off = student.logits(batch)
    same = on is None or (torch.equal(off, plain.logits(batch)) and not torch.equal(off, on))
    if on is None:
        plain.logits(batch)
    again = student.logits(batch)
    if on is not None and config.precision.fp8.recipe != "delayed":  # whose scales follow from the pass before
        same = same and torch.equal(on, again)
    metrics = [student.step(pack(rollouts), objective) for _ in range(3)]
    return metrics, same, {name: tensor.clone() for name, tensor in student.export()}


LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor": 2},
    "tp2sp": {"tensor": 2, "sequence": True},
    "pp3": {"pipeline": 3},
}


@pytest.fixture(scope="module")
def trained(ranks, paths):
    @cache
    def run(layout, recipe="tensorwise", student="full"):
        settings = config(paths, layout=LAYOUTS[layout], recipe=recipe, student=student)
        # Padded to 32 on every layout: what is padded takes part in a tensor's scale.
        rollouts = tiny.rollouts(count=8, vocab_size=VOCAB_SIZE, longest_prompt=20, longest_response=10)
        assert 16 < max(len(r.prompt.token_ids) + len(r.token_ids) for r in rollouts) <= 32
        answers = ranks.run(settings.parallel.world_size, train, settings, rollouts, **LAYOUTS[layout])
        assert all(same for _, same, _ in answers)
        assert all(metrics == answers[0][0] for metrics, _, _ in answers)
        return answers[0][0], answers[0][2]

    return run


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_student_trains_and_is_itself_when_fp8_is_off(trained, recipe):
    metrics, weights = trained("tp1", recipe)
    assert all(0 < step["loss"] < 100 for step in metrics)
    assert all(step["grad_norm"] > 0 for step in metrics)
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_fp8_gradients_are_not_those_of_the_forward_pass_alone(trained):
    full, forward = (trained("tp1", student=how)[0][0] for how in ("full", "forward"))
    assert full["loss"] == forward["loss"]
    assert full["grad_norm"] != forward["grad_norm"]
    assert full["grad_norm"] == pytest.approx(forward["grad_norm"], rel=0.05)


def straight_through(model):
    """The rounded model, through whose roundings gradients pass as they are."""
    for layer in rounded_model(model).model.layers:
        a, m = layer.self_attn, layer.mlp
        for linear in (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj):
            linear._forward_pre_hooks.clear()
            linear.register_forward_pre_hook(lambda _, args: (args[0] + (cast(args[0].float()) - args[0]).detach(),))
    return model


def grad_norm(parallel, config, rollouts):
    student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    return student.step(pack(rollouts), objective)["grad_norm"]


def test_the_forward_pass_alone_has_the_gradient_of_the_rounded_model(ranks, paths):
    """In full precision: that of transformers' model rounded by hand, in float64."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB_SIZE, (4, 16), generator=draw).tolist()  # of 16, so that nothing is padded
    rollouts = [tiny.rollout(row[:9], row[9:], index=i) for i, row in enumerate(ids)]
    found = {}
    for how in ("off", "forward", "full"):
        made = config(paths, **({} if how == "off" else {"student": how}))
        made = dataclasses.replace(made, train=dataclasses.replace(made.train, micro_batch_size=1))
        (found[how],) = ranks.run(1, grad_norm, made, rollouts)
    student = straight_through(tiny.build("qwen3", vocab_size=96, **SIZES))
    reference = steps.Reference(made, student, [tiny.build("qwen3", seed=1, **SIZES)], VOCAB_SIZE)
    expected = reference.step(rollouts, 1)["grad_norm"]
    assert abs(found["forward"] - expected) < min(abs(found[how] - expected) for how in ("off", "full")) / 4
    assert found["forward"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("layout", ["tp2", "tp2sp", "pp3"])
def test_other_layouts_train(trained, layout):
    (one, _), (other, _) = trained("tp1"), trained(layout)
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)  # scales of shards are not those of the whole


def test_pipeline_stages_change_nothing(trained):
    """Layers are numbered over all stages, and scales are a matrix's own."""
    (one, weights), (other, same) = trained("tp1"), trained("pp3")
    assert one[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-6)
    torch.testing.assert_close(weights, same, rtol=1e-4, atol=1e-5)


def test_sequence_parallelism_changes_no_scale(trained):
    (one, _), (other, _) = trained("tp2"), trained("tp2sp")
    assert one[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-6)
    assert one[0]["grad_norm"] == pytest.approx(other[0]["grad_norm"], rel=1e-4)


def logits_of_mixture(parallel, config, rollouts):
    student, _, pack = steps.build(parallel, config, VOCAB_SIZE)
    with_fp8 = student.logits(pack(rollouts)[0])
    with student.fp8.off():
        return with_fp8, student.logits(pack(rollouts)[0])


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "expert": 2, "sequence": True}], ids=["one", "tp2ep2"])
def test_experts(ranks, paths, layout):
    """Also those that no token of two short answers goes to."""
    settings = config(paths, which="mixture", layout=layout, student="full")
    rollouts = tiny.rollouts(count=2, vocab_size=VOCAB_SIZE, longest_prompt=3, longest_response=2)
    for with_fp8, without in ranks.run(settings.parallel.world_size, logits_of_mixture, settings, rollouts, **layout):
        assert with_fp8.isfinite().all()
        assert not torch.equal(with_fp8, without)


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_a_head_in_fp8_proper_is_the_emulated_one(ranks, paths, layout):
    """Torch multiplies FP8 on a CPU too; sums are in another order, so a gradient may round to its other neighbour."""
    emulated = config(paths, layout=LAYOUTS[layout], heads=["student"])
    fp8 = dataclasses.replace(emulated.precision.fp8, emulate=False)
    real = dataclasses.replace(emulated, precision=c.PrecisionConfig(fp8=fp8))
    rollouts = tiny.rollouts(count=8, vocab_size=VOCAB_SIZE)
    told = []
    for settings in (real, emulated):
        answers = ranks.run(settings.parallel.world_size, train, settings, rollouts, **LAYOUTS[layout])
        assert all(is_itself_when_off for _, is_itself_when_off, _ in answers)
        told.append(answers[0][0])
    for mine, theirs in zip(*told, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-3)


def step_of(parallel, config, rollouts):
    """([metrics by step], what a teacher's head is and how many bytes of it there are)."""
    student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    (head,) = objective.distillation.heads
    kind = (
        None if head is None else (type(head).__name__, head.num_bytes if hasattr(head, "num_bytes") else head.nbytes)
    )
    return [student.step(pack(rollouts), objective) for _ in range(2)], kind


def in_one_chunk(made, *, emulate):
    """All tokens of a step in one product, emulated or not: then the same hidden states share a scale."""
    fp8 = dataclasses.replace(made.precision.fp8, emulate=emulate)
    train = dataclasses.replace(made.train, micro_batch_size=8)
    return dataclasses.replace(made, precision=c.PrecisionConfig(fp8=fp8), train=train)


def assert_steps_are_the_emulated_ones(ranks, made, layout, *, loss, gradient):
    """With heads in FP8 proper; up to these shares of the distance to the teacher and of the gradient's norm."""
    rollouts = tiny.rollouts(count=8, vocab_size=VOCAB_SIZE)
    told = []
    for settings in (in_one_chunk(made, emulate=False), in_one_chunk(made, emulate=True)):
        told.append(ranks.run(settings.parallel.world_size, step_of, settings, rollouts, **LAYOUTS[layout]))
    (real, _), (emulated, _) = (answers[0] for answers in told)
    for mine, theirs in zip(real, emulated, strict=True):
        assert mine["kl/t"] == pytest.approx(theirs["kl/t"], rel=loss)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=gradient)
    values = 96 * 32 // LAYOUTS[layout].get("tensor", 1)
    assert told[0][-1][1] == ("ScaledHead", values + 4)
    assert told[1][-1][1] == ("Tensor", 4 * values)
    if layout == "pp3":
        assert [kind for _, kind in told[0][:-1]] == [None, None]


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp3"])
@pytest.mark.parametrize("heads", [["t"], ["all"]])
def test_a_teacher_s_head_in_fp8_proper_is_the_emulated_one(ranks, paths, layout, heads):
    """Also where the student's is, too, with which the loss takes logits of it; shards have the same scales in both."""
    made = config(paths, layout=LAYOUTS[layout], heads=heads)
    assert_steps_are_the_emulated_ones(ranks, made, layout, loss=1e-4, gradient=5e-3)


def test_a_teacher_s_head_in_fp8_proper_is_not_the_plain_one(ranks, paths):
    """Several chunks, each with a scale of its own: near the emulation, and away from what it is without."""
    made = config(paths, heads=["t"])
    made = dataclasses.replace(made, loss=dataclasses.replace(made.loss, chunk_tokens=4))
    real = dataclasses.replace(made.precision.fp8, emulate=False)
    losses = []
    for fp8 in (real, made.precision.fp8, c.Fp8Config()):
        settings = dataclasses.replace(made, precision=c.PrecisionConfig(fp8=fp8))
        ((metrics, _),) = ranks.run(1, step_of, settings, tiny.rollouts(count=8, vocab_size=VOCAB_SIZE))
        losses.append(metrics[0]["kl/t"])
    assert losses[0] != losses[2]
    assert losses[0] == pytest.approx(losses[2], rel=0.02)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def why_skipped(parallel, config, rollouts):
    student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    try:
        student.step(pack(rollouts), objective)
    except FloatingPointError as error:
        return str(error)
    return student.skipped


@pytest.mark.parametrize("emulate", [False, True])
def test_a_head_in_fp8_that_is_not_finite_is_found(ranks, paths, tmp_path, emulate):
    """FP8 has no infinity: what is too large for the model's own type must not become its largest number."""
    model = tiny.build("qwen3", seed=1, **SIZES)
    model.lm_head.weight.data[7, 3] = float("inf")
    broken = {**paths, "teacher": tiny.save(model, tmp_path / "broken")}
    made = in_one_chunk(config(broken, heads=["t"]), emulate=emulate)
    (why,) = ranks.run(1, why_skipped, made, tiny.rollouts(count=2, vocab_size=VOCAB_SIZE))
    assert "the loss is nan" in why
    assert "not finite: the output head of teacher 't'" in why


# What is measured of it -------------------------------------------------------------------------------------------


def measure(parallel, config, rollouts):
    from megatron_opd.trainer import fp8_fidelity
    from megatron_opd.trainer.experience import Experience

    student, objective, _ = steps.build(parallel, config, VOCAB_SIZE)
    teachers = build_teachers(config, parallel, objective.distillation.vocab)
    term = dataclasses.replace(objective.distillation, heads=tuple(t.head_LD for t in teachers))
    objective = dataclasses.replace(objective, distillation=term)
    experience = Experience(config, parallel, teachers, None)
    before = {name: p.detach().clone() for name, p in student.gpt.named_parameters()}
    mine = rollouts[parallel.data_rank :: parallel.data_size]
    plain = fp8_fidelity.without_fp8(config, teachers, parallel, objective.distillation.vocab)
    found = fp8_fidelity.measure(student, (teachers, plain), objective, mine, experience.score)
    assert all(torch.equal(before[name], p) for name, p in student.gpt.named_parameters())
    return found


def measured(ranks, paths, *, count=6, layout=None, emulate=True, **fp8):
    layout = layout or {}
    settings = config(paths, layout=layout, **fp8)
    settings = settings if emulate else in_one_chunk(settings, emulate=False)
    rollouts = tiny.rollouts(count=count, vocab_size=VOCAB_SIZE)
    answers = ranks.run(settings.parallel.world_size, measure, settings, rollouts, **layout)
    assert all(answer == answers[0] for answer in answers)
    return answers[0], {noise.name: noise for noise in answers[0].noises}


@pytest.mark.parametrize(
    ("fp8", "noisy"),
    [
        ({"student": "full"}, {"student"}),
        ({"teachers": ["t"]}, {"t", "ensemble"}),
        ({"heads": ["t"]}, {"t", "ensemble"}),
        ({"heads": ["student"]}, {"student"}),
        ({"student": "forward", "teachers": ["all"], "heads": ["all"]}, {"t", "ensemble", "student"}),
    ],
)
def test_noise_is_where_fp8_is(ranks, paths, fp8, noisy):
    found, noises = measured(ranks, paths, **fp8)
    assert {name for name, noise in noises.items() if noise.kl > 1e-6} == noisy
    for name, noise in noises.items():
        assert noise.largest >= noise.kl
        assert 0.5 < noise.top1 <= 1
        assert name in noisy or noise.top1 == 1
    assert 0 < found.gradient_error < 1
    assert found.signal > 0.1
    if "ensemble" in noisy:  # one teacher is the ensemble
        assert noises["ensemble"].kl == pytest.approx(noises["t"].kl, rel=1e-4)


@pytest.mark.parametrize("emulate", [True, False])
def test_measured_by_hand(ranks, paths, emulate):
    """A head alone: its rows and the hidden states rounded, the KL in float64."""
    found, noises = measured(ranks, paths, heads=["t"], recipe="tensorwise", emulate=emulate)
    rollouts = tiny.rollouts(count=6, vocab_size=VOCAB_SIZE)
    model = tiny.build("qwen3", seed=1, **SIZES)
    hidden = []
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
        with torch.no_grad():
            hidden.append(model.model(ids).last_hidden_state[0, len(rollout.prompt.token_ids) - 1 : -1])
    hidden_TD, head_LD = torch.cat(hidden), model.lm_head.weight.detach()
    plain, noisy = (
        oracle.log_softmax(h @ w.T, VOCAB_SIZE) for h, w in ((hidden_TD, head_LD), (cast(hidden_TD), cast(head_LD)))
    )
    kl_T = oracle.kl(plain, noisy)
    assert found.num_tokens == len(kl_T)
    assert noises["t"].kl == pytest.approx(kl_T.mean().item(), rel=1e-3)
    assert noises["t"].largest == pytest.approx(kl_T.max().item(), rel=1e-3)
    assert noises["t"].top1 == pytest.approx((plain.argmax(-1) == noisy.argmax(-1)).double().mean().item())


@pytest.mark.parametrize(
    ("count", "layout"),
    [(6, {"tensor": 2}), (6, {"pipeline": 3}), (6, {"data": 2}), (1, {"data": 2})],
    ids=["tp2", "pp3", "dp2", "a replica without answers"],
)
def test_every_layout_measures_the_same_head(ranks, paths, count, layout):
    one, noises = measured(ranks, paths, count=count, heads=["t"], recipe="blockwise")
    other, others = measured(ranks, paths, count=count, heads=["t"], recipe="blockwise", layout=layout)
    assert other.num_tokens == one.num_tokens
    assert other.signal == pytest.approx(one.signal, rel=1e-5)
    # Blocks of 128 of the teacher's 32 columns do not depend on shards, but their 128 rows do.
    assert others["t"].kl == pytest.approx(noises["t"].kl, rel=0.2 if "tensor" in layout else 1e-3)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 3}], ids=["tp2", "pp3"])
def test_the_gate_measures_a_head_in_fp8_proper(ranks, paths, layout):
    found, noises = measured(ranks, paths, heads=["t"], layout=layout, emulate=False)
    emulated, others = measured(ranks, paths, heads=["t"], layout=layout)
    assert found.num_tokens == emulated.num_tokens
    for name in ("t", "ensemble"):
        assert noises[name].kl > 1e-6
        assert noises[name].kl == pytest.approx(others[name].kl, rel=1e-2)
    assert noises["student"].kl == 0
    assert found.gradient_error == pytest.approx(emulated.gradient_error, rel=1e-2)
