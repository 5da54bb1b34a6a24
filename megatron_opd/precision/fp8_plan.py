"""Which module of which model computes in what: a pure function of settings and the models' architectures.

A plan is a list of rules over Megatron's module names, layers counted from the model's first; the first that matches
counts. The emulation wraps modules by it, Megatron's own FP8 settings follow from it, and people read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from megatron_opd.config import Fp8Config, ParallelConfig, PrecisionConfig, StudentConfig, TeacherConfig
from megatron_opd.config.checks_precision import ALL, STUDENT, is_named
from megatron_opd.models.architecture import Architecture
from megatron_opd.precision.recipes import HISTORY, RECIPES, Recipe

HEAD = "output_layer"
LINEARS = (
    "decoder.layers.*.self_attention.linear_qkv",
    "decoder.layers.*.self_attention.linear_proj",
    "decoder.layers.*.mlp.*linear_fc1",
    "decoder.layers.*.mlp.*linear_fc2",
)
"""What Transformer Engine computes in FP8; the star in the MLP is for experts."""
_HIDDEN = "the hidden size"


@dataclass(frozen=True, slots=True)
class Products:
    """The products of a module in FP8."""

    recipe: Recipe
    backward: bool
    """Whether the gradients are in FP8 too."""


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What each module of one model computes in."""

    model: str
    """student, or the teacher's name."""
    dtype: str
    """Of all that is not in FP8."""
    rules: tuple[tuple[str, Products | None], ...]
    """(pattern, FP8 or None); what no pattern matches is in `dtype`."""
    bf16_layers: tuple[int, int] = (0, 0)
    """Layers at the start and at the end that stay out of it."""
    resident: bool = False
    """Whether the FP8 matrices stay in FP8 between passes."""
    keeps_copies: bool = True
    """Whether matrices that are rounded in every step are kept in FP8 from one micro-batch to the next."""
    emulate: bool = False
    layers: str = "auto"
    """`precision.layers`."""
    gathers: bool = False
    """Whether Transformer Engine gathers the tokens of sequence-parallel ranks."""

    def of(self, module: str) -> Products | None:
        """FP8 of a module, None where it computes in `dtype`."""
        return next((how for pattern, how in self.rules if fnmatchcase(module, pattern)), None)

    @property
    def layer_products(self) -> Products | None:
        """FP8 of the layers, which is one for all that have any."""
        return next((how for pattern, how in self.rules if pattern in LINEARS), None)

    @property
    def head_products(self) -> Products | None:
        """FP8 of the output head."""
        return self.of(HEAD)

    @property
    def multiple(self) -> int:
        """What the tokens of a rank must be a multiple of."""
        return 1 if self.layer_products is None else _multiple(self.layer_products.recipe, gathers=self.gathers)

    def megatron(self) -> dict[str, Any]:
        """Settings of Megatron's TransformerConfig."""
        how = self.layer_products
        made: dict[str, Any] = {"transformer_impl": "local"} if self.layers == "local" or self.emulate else {}
        if how is None or self.emulate:
            return made
        made |= {"fp8": how.recipe.format, "fp8_recipe": how.recipe.name, "fp8_param": self.resident}
        if not self.keeps_copies:
            made |= {"disable_parameter_transpose_cache": True}  # Transformer Engine's cache of all FP8 copies
        if how.recipe.name == "delayed":
            made |= {"fp8_amax_history_len": HISTORY, "fp8_amax_compute_algo": "max"}
        if any(self.bf16_layers):
            first, last = self.bf16_layers
            made |= {"first_last_layers_bf16": True}
            made |= {"num_layers_at_start_in_bf16": first, "num_layers_at_end_in_bf16": last}
        return made

    def line(self) -> str:
        """In one line for people."""
        who = self.model if self.model == STUDENT else f"teacher {self.model}"
        parts = []
        if self.layer_products is not None:
            text = self.layer_products.recipe.line(backward=self.layer_products.backward)
            kept = [f"{which} {n}" for n, which in zip(self.bf16_layers, ("first", "last"), strict=True) if n]
            text += f" in linear_qkv, linear_proj, linear_fc1, linear_fc2{', kept in FP8' if self.resident else ''}"
            parts.append(f"{text}; {' and '.join(kept)} layers {self.dtype}" if kept else text)
        if self.head_products is not None:
            text = f"output head {self.head_products.recipe.line(backward=self.head_products.backward)}"
            parts.append(f"{text}{'' if self.model == STUDENT or self.emulate else ', kept in FP8'}")
        rest = f"everything else {self.dtype}" if parts else self.dtype
        return f"precision of {who}: {'; '.join([*parts, rest])}{' (emulated)' if parts and self.emulate else ''}"


def student_plan(
    precision: PrecisionConfig, student: StudentConfig, parallel: ParallelConfig, arch: Architecture
) -> ModelPlan:
    """The plan of the student, whose architecture is `arch`."""
    fp8 = precision.fp8
    head = bool({STUDENT, ALL} & set(fp8.heads))
    plan = _plan(precision, STUDENT, student.dtype, layers=fp8.student != "off", head=head)
    return _on_the_layout(plan, parallel, arch)


def teacher_plan(
    precision: PrecisionConfig, teacher: TeacherConfig, parallel: ParallelConfig, arch: Architecture
) -> ModelPlan:
    """The plan of a teacher, whose architecture is `arch`."""
    fp8 = precision.fp8
    layers = not teacher.is_served and is_named(teacher, fp8.teachers)
    head = teacher.carrier == "hidden" and is_named(teacher, fp8.heads)
    plan = _plan(precision, teacher.name, teacher.dtype, layers=layers, head=head)
    # Copies of an offloaded teacher would stay on the GPU while its weights wait elsewhere: half as much as those.
    return _on_the_layout(replace(plan, keeps_copies=not teacher.offload), parallel, arch)


def length_multiple(fp8: Fp8Config, parallel: ParallelConfig, *, shards: int) -> int:
    """What the length of the student's sequences must be a multiple of, whatever their number, where each is split over
    `shards` ranks."""
    if fp8.student == "off":
        return shards
    return shards * _multiple(RECIPES[fp8.recipe], gathers=parallel.sequence and not fp8.emulate)


def _plan(precision: PrecisionConfig, model: str, dtype: str, *, layers: bool, head: bool) -> ModelPlan:
    fp8 = precision.fp8
    recipe, is_student = RECIPES[fp8.recipe], model == STUDENT
    rules: list[tuple[str, Products | None]] = []
    if layers:
        how = Products(recipe, backward=is_student and fp8.student == "full")
        rules += [(pattern, how) for pattern in LINEARS]
    if head:
        # The student's head alone has no setting that says otherwise: both of its passes are in FP8.
        rules.append((HEAD, Products(recipe, backward=is_student and fp8.student != "forward")))
    return ModelPlan(
        model=model,
        dtype=dtype,
        rules=tuple(rules),
        bf16_layers=(fp8.first_layers_bf16, fp8.last_layers_bf16) if layers else (0, 0),
        resident=fp8.resident and layers and not is_student,
        emulate=fp8.emulate and bool(rules),
        layers=precision.layers,
    )


def _on_the_layout(plan: ModelPlan, parallel: ParallelConfig, arch: Architecture) -> ModelPlan:
    """The plan with what follows from the layout and the number of layers."""
    plan = replace(plan, gathers=parallel.sequence and not plan.emulate)
    return _with_layer_count(plan, arch.num_layers) if plan.layer_products else plan


def _multiple(recipe: Recipe, *, gathers: bool) -> int:
    return recipe.gathered_multiple if gathers else recipe.multiple


def _with_layer_count(plan: ModelPlan, num_layers: int) -> ModelPlan:
    """The plan with a rule for every layer that stays out, before the others."""
    first, last = plan.bf16_layers
    kept = sorted({*range(min(first, num_layers)), *range(max(num_layers - last, 0), num_layers)})
    out = tuple((f"decoder.layers.{layer}.*", None) for layer in kept)
    return replace(plan, rules=out + plan.rules)


def check_shapes(plan: ModelPlan, arch: Architecture, recipe: Recipe, parallel: ParallelConfig) -> list[str]:
    """Sides of the matrices of a rank that FP8 products do not take, and layers that there are not."""
    problems, tensor = [], parallel.tensor
    who = "student.model" if plan.model == STUDENT else f"the model of teacher '{plan.model}'"
    first, last = plan.bf16_layers
    if plan.layer_products is not None and first + last >= arch.num_layers:
        problems.append(
            f"precision.fp8: first_layers_bf16 + last_layers_bf16 = {first + last} leaves none of the"
            f" {arch.num_layers} layers of {who} in FP8"
        )
    stage = arch.num_layers // parallel.pipeline
    if plan.layer_products is not None and not plan.emulate and max(first, last) > stage:
        problems.append(
            f"precision.fp8: first_layers_bf16 and last_layers_bf16 must not be above the {stage} layers of a pipeline"
            f" stage of {who}"
        )
    for side, size in _sides(plan, arch, tensor).items():
        is_gathered = plan.gathers and plan.layer_products is not None and side == _HIDDEN
        multiple = _multiple(recipe, gathers=is_gathered)
        if size % multiple:
            problems.append(
                f"precision.fp8.recipe={recipe.name} needs multiples of {multiple}, but"
                f" {side} of {who} is {size} at parallel.tensor={tensor}{' with parallel.sequence' * is_gathered}"
            )
    return problems


def check_head_rows(made: Sequence[ModelPlan], student: Architecture, recipe: Recipe, tensor: int) -> list[str]:
    """Whether teachers' heads in FP8 are cut into what its products take: along the student's vocabulary. Where the
    student's own head is in FP8, `check_shapes` says it."""
    size, multiple = student.padded_vocab_size // tensor, recipe.multiple
    cut = [plan.model for plan in made if plan.head_products is not None]
    if not cut or STUDENT in cut or size % multiple == 0:
        return []
    return [
        f"precision.fp8.recipe={recipe.name} needs multiples of {multiple}, but the vocabulary of student.model, which"
        f" cuts the heads of {', '.join(cut)}, is {size} at parallel.tensor={tensor}: set student.vocab_multiple to a"
        f" multiple of {multiple * tensor}"
    ]


def _sides(plan: ModelPlan, arch: Architecture, tensor: int) -> dict[str, int]:
    """Sizes on one rank, by name."""
    sides: dict[str, int] = {}
    if plan.layer_products is not None:
        queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        ffn = arch.ffn_size // (1 if arch.num_experts else tensor)
        sides |= {_HIDDEN: arch.hidden_size, "the width of linear_proj": queries // tensor}
        sides |= {"the height of linear_qkv": (queries + 2 * keys) // tensor, "the intermediate size": ffn}
    if plan.head_products is not None:
        sides |= {_HIDDEN: arch.hidden_size}
        if plan.model == STUDENT:
            sides["the vocabulary (student.vocab_multiple pads it)"] = arch.padded_vocab_size // tensor
    return sides
