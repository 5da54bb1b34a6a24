"""Which module computes in what, for every recipe, and what Megatron and people are told of it."""

import dataclasses

import pytest
import tiny

from megatron_opd import config as c
from megatron_opd.models.architecture import Architecture
from megatron_opd.precision.fp8_plan import check_head_rows, check_shapes, length_multiple, student_plan, teacher_plan
from megatron_opd.precision.recipes import RECIPES

GRADIENTS = {"tensorwise": "e5m2", "delayed": "e5m2", "blockwise": "e4m3", "mxfp8": "e4m3"}
ARCH = Architecture(
    family="qwen3", num_layers=4, hidden_size=64, ffn_size=192, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=96,
    padded_vocab_size=96, max_positions=64, norm_eps=1e-6, rope_base=1e4, rope_factor=None, qkv_bias=False,
    qk_norm=True, tied_embeddings=False,
)  # fmt: skip
LINEARS = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
OTHERS = [
    "embedding.word_embeddings", "decoder.layers.1.input_layernorm", "decoder.layers.1.self_attention.core_attention",
    "decoder.layers.1.self_attention.q_layernorm", "decoder.layers.1.mlp.router", "decoder.final_layernorm",
]  # fmt: skip


def config(*, parallel=None, dtype="bf16", **fp8):
    teachers = [{"name": "a", "model": "ta", "dtype": dtype}, {"name": "b", "model": "tb", "dtype": dtype}]
    made = tiny.config("s", teachers, student={"dtype": dtype}, parallel=parallel or {})
    return c.Config(
        run=made.run, parallel=made.parallel, student=made.student, teachers=made.teachers, data=made.data,
        train=made.train, precision=c.PrecisionConfig(fp8=c.Fp8Config(**fp8)),
    )  # fmt: skip


def plan_of(settings, model, arch):
    if model == "student":
        return student_plan(settings.precision, settings.student, settings.parallel, arch)
    (teacher,) = [t for t in settings.teachers if t.name == model]
    return teacher_plan(settings.precision, teacher, settings.parallel, arch)


def plans(settings, architectures):
    return [plan_of(settings, model, arch) for model, arch in architectures.items()]


def shapes_of(plan, arch, settings):
    return check_shapes(plan, arch, RECIPES[settings.precision.fp8.recipe], settings.parallel)


def plan(model="student", **settings):
    return plan_of(config(**settings), model, ARCH)


def formats(plan, module):
    """(forward, gradient) formats of a module's products; None for a part that is in the model's dtype."""
    products = plan.of(module)
    if products is None:
        return None, None
    recipe = products.recipe
    assert recipe.activations.format == recipe.weights.format
    return recipe.activations.format, recipe.gradients.format if products.backward else None


@pytest.mark.parametrize("recipe", GRADIENTS)
@pytest.mark.parametrize(
    ("fp8", "model", "layers", "head"),
    [
        ({"student": "full"}, "student", "both", None),
        ({"student": "forward"}, "student", "forward", None),
        ({"student": "full"}, "a", None, None),
        ({"teachers": ["a"]}, "student", None, None),
        ({"teachers": ["a"]}, "a", "forward", None),
        ({"teachers": ["a"]}, "b", None, None),
        ({"teachers": ["all"]}, "b", "forward", None),
        ({"heads": ["a"]}, "a", None, "forward"),
        ({"heads": ["student"]}, "student", None, "both"),
        ({"heads": ["all"], "student": "forward"}, "student", "forward", "forward"),
        ({}, "student", None, None),
    ],
)
def test_every_module_of_every_model(recipe, fp8, model, layers, head):
    made = plan(model, recipe=recipe, emulate=True, **fp8)
    what = {None: (None, None), "forward": ("e4m3", None), "both": ("e4m3", GRADIENTS[recipe])}
    for layer in range(ARCH.num_layers):
        for linear in LINEARS:
            assert formats(made, f"decoder.layers.{layer}.{linear}") == what[layers]
    assert formats(made, "output_layer") == what[head]
    for module in OTHERS:
        assert made.of(module) is None, module


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_first_and_last_layers_stay(recipe):
    made = plan(recipe=recipe, student="full", first_layers_bf16=1, last_layers_bf16=2)
    inside = [made.of(f"decoder.layers.{layer}.mlp.linear_fc1") is not None for layer in range(4)]
    assert inside == [False, True, False, False]


def test_layer_1_is_not_layer_10():
    many = plan_of(config(student="full", first_layers_bf16=2), "student", _with(num_layers=24))
    assert many.of("decoder.layers.1.mlp.linear_fc1") is None
    assert many.of("decoder.layers.10.mlp.linear_fc1") is not None


def test_experts_are_in_it_and_their_router_is_not():
    made = plan_of(config(student="full"), "student", _with(num_experts=4))
    assert made.of("decoder.layers.0.mlp.experts.local_experts.3.linear_fc2") is not None
    assert made.of("decoder.layers.0.mlp.router") is None


def _with(**changes):
    return dataclasses.replace(ARCH, **changes)


@pytest.mark.parametrize("recipe", GRADIENTS)
def test_megatrons_own_settings(recipe):
    kept = {} if recipe == "delayed" else {"first_layers_bf16": 1}
    found = plan(recipe=recipe, student="full", **kept).megatron()
    assert found["fp8"] == {"e5m2": "hybrid", "e4m3": "e4m3"}[GRADIENTS[recipe]]
    assert found["fp8_recipe"] == recipe
    assert found["fp8_param"] is False
    assert found.get("first_last_layers_bf16", False) == bool(kept)
    if kept:
        assert (found["num_layers_at_start_in_bf16"], found["num_layers_at_end_in_bf16"]) == (1, 0)
    assert plan("a", recipe=recipe, teachers=["a"], resident=True).megatron()["fp8_param"] is True


@pytest.mark.parametrize(
    ("fp8", "offload", "kept"),
    [({"teachers": ["a"]}, True, False), ({"teachers": ["a"]}, False, True), ({}, True, True)],
)
def test_copies_of_a_teacher_that_waits_elsewhere_are_not_kept(fp8, offload, kept):
    settings = config(**fp8)
    teacher = dataclasses.replace(settings.teachers[0], offload=offload)
    made = teacher_plan(settings.precision, teacher, settings.parallel, ARCH).megatron()
    assert ("disable_parameter_transpose_cache" not in made) == kept
    assert "disable_parameter_transpose_cache" not in plan(**fp8, student="full").megatron()


def test_megatron_is_told_nothing_of_what_is_emulated_or_off():
    assert plan().megatron() == {}
    assert plan(student="full", emulate=True).megatron() == {"transformer_impl": "local"}
    assert plan("a", student="full", emulate=True).megatron() == {}  # that model is not emulated


@pytest.mark.parametrize("recipe", GRADIENTS)
def test_megatron_takes_the_settings(ranks_free_config, recipe):
    made = ranks_free_config(plan(recipe=recipe, student="full").megatron())
    assert (made.fp8_recipe, made.bf16) == (recipe, True)


@pytest.fixture
def ranks_free_config():
    from megatron_opd.student import cpu

    cpu.enable()
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    def build(settings):
        return TransformerConfig(
            num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, params_dtype=torch.bfloat16, **settings
        )

    return build


@pytest.mark.parametrize(
    ("fp8", "arch", "tensor", "problems"),
    [
        ({"student": "full"}, {}, 1, []),
        ({"student": "full"}, {}, 2, []),
        ({"student": "full"}, {"hidden_size": 72}, 1, ["the hidden size of student.model is 72"]),
        ({"student": "full"}, {"ffn_size": 200}, 1, ["the intermediate size of student.model is 200"]),
        ({"student": "full"}, {"ffn_size": 208}, 2, ["the intermediate size of student.model is 104"]),
        ({"student": "full"}, {"num_kv_heads": 1, "head_dim": 12}, 1,
         ["the height of linear_qkv of student.model is 72"]),
        ({"student": "full", "recipe": "mxfp8"}, {"hidden_size": 80}, 1, ["the hidden size of student.model is 80"]),
        ({"student": "full"}, {"ffn_size": 200, "num_experts": 2}, 1, ["the intermediate size"]),
        ({"heads": ["student"], "emulate": True}, {"padded_vocab_size": 90, "ffn_size": 7}, 1, ["the vocabulary"]),
        ({"teachers": ["a"]}, {"hidden_size": 72}, 1, []),  # of the student: nothing in FP8
        ({"student": "full", "first_layers_bf16": 2, "last_layers_bf16": 2}, {}, 1, ["leaves none of the 4 layers"]),
    ],
)  # fmt: skip
def test_shapes(fp8, arch, tensor, problems):
    settings = config(parallel={"tensor": tensor}, **fp8)
    arch = _with(**arch)
    found = shapes_of(plan_of(settings, "student", arch), arch, settings)
    assert len(found) == len(problems), found
    for problem, fragment in zip(found, problems, strict=True):
        assert fragment in problem
        assert "precision.fp8" in problem


@pytest.mark.parametrize(
    ("padded", "tensor", "heads", "problem"),
    [
        (96, 2, ["all"], None),
        (
            90,
            1,
            ["a", "b"],
            "the heads of a, b, is 90 at parallel.tensor=1: set student.vocab_multiple to a multiple of 16",
        ),
        (96, 4, ["b"], "the heads of b, is 24 at parallel.tensor=4: set student.vocab_multiple to a multiple of 64"),
        (90, 1, ["student"], None),  # said by the shapes of the student
        (90, 1, [], None),
    ],
)
def test_teachers_heads_are_cut_by_the_student_s_vocabulary(padded, tensor, heads, problem):
    settings = config(parallel={"tensor": tensor}, heads=heads)
    student = _with(padded_vocab_size=padded)
    made = plans(settings, {"student": student, "a": ARCH, "b": ARCH})
    found = check_head_rows(made, student, RECIPES[settings.precision.fp8.recipe], settings.parallel.tensor)
    assert len(found) == (problem is not None)
    assert all(problem in text for text in found)


def test_a_teacher_s_hidden_size_must_fit_its_head_in_fp8():
    arch = _with(hidden_size=72)
    settings = config(heads=["a"])
    (problem,) = shapes_of(plan_of(settings, "a", arch), arch, settings)
    assert "the hidden size of the model of teacher 'a' is 72" in problem


def test_megatron_keeps_no_more_layers_out_than_a_stage_has():
    settings = config(parallel={"pipeline": 4}, student="full", first_layers_bf16=2)
    (problem,) = shapes_of(plan_of(settings, "student", ARCH), ARCH, settings)
    assert "must not be above the 1 layers of a pipeline stage" in problem


@pytest.mark.parametrize(
    ("recipe", "multiple", "emulated"), [("tensorwise", 16, 16), ("blockwise", 128, 16), ("mxfp8", 32, 32)]
)
def test_what_is_gathered_has_whole_blocks_on_a_rank(recipe, multiple, emulated):
    """Transformer Engine asserts that of what sequence parallelism gathers, in the middle of a pass."""
    settings = config(parallel={"tensor": 2, "sequence": True}, student="full", teachers=["a"], recipe=recipe)
    assert length_multiple(settings.precision.fp8, settings.parallel, shards=2) == 2 * multiple
    assert [made.multiple for made in plans(settings, {"student": ARCH, "a": ARCH})] == [multiple, multiple]
    wide, narrow = _with(hidden_size=256), _with(hidden_size=96)
    assert shapes_of(plan_of(settings, "student", wide), wide, settings) == []
    found = shapes_of(plan_of(settings, "student", narrow), narrow, settings)
    assert [f"multiples of {multiple}, but the hidden size" in problem for problem in found] == [True] * (
        recipe == "blockwise"
    )
    settings = config(parallel={"tensor": 2, "sequence": True}, student="full", recipe=recipe, emulate=True)
    assert length_multiple(settings.precision.fp8, settings.parallel, shards=1) == emulated
    assert shapes_of(plan_of(settings, "student", narrow), narrow, settings) == []


@pytest.mark.parametrize(
    ("fp8", "shards", "multiple"),
    [
        ({}, 1, 1),
        ({}, 2, 2),
        ({"student": "full"}, 1, 16),
        ({"student": "full"}, 2, 32),
        ({"student": "full", "recipe": "mxfp8"}, 1, 32),
        ({"teachers": ["a"]}, 1, 1),
    ],
)
def test_sequences_are_padded_to_what_the_kernels_take(fp8, shards, multiple):
    assert length_multiple(config(**fp8).precision.fp8, config(**fp8).parallel, shards=shards) == multiple


def test_lines_for_people():
    lines = [p.line() for p in plans(config(student="full", teachers=["b"], first_layers_bf16=1), {
        "student": ARCH, "a": ARCH, "b": ARCH})]  # fmt: skip
    assert lines == [
        "precision of student: fp8 e4m3, gradients e5m2, tensorwise in linear_qkv, linear_proj, linear_fc1, linear_fc2;"
        " first 1 layers bf16; everything else bf16",
        "precision of teacher a: bf16",
        "precision of teacher b: fp8 e4m3, tensorwise in linear_qkv, linear_proj, linear_fc1, linear_fc2;"
        " first 1 layers bf16; everything else bf16",
    ]
    assert plan("a", heads=["a"], emulate=True).line() == (
        "precision of teacher a: output head fp8 e4m3, tensorwise; everything else bf16 (emulated)"
    )
    assert plan("a", heads=["a"]).line() == (
        "precision of teacher a: output head fp8 e4m3, tensorwise, kept in FP8; everything else bf16"
    )
