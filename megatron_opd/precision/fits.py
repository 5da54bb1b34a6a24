"""What is wrong about `precision` with these models on this machine, and what people should know about it."""

from __future__ import annotations

from megatron_opd.config import ParallelConfig, PrecisionConfig, StudentConfig, TeacherConfig, TrainConfig
from megatron_opd.models.architecture import Architecture, read_architecture
from megatron_opd.precision import installed
from megatron_opd.precision.fp8_plan import ModelPlan, check_head_rows, check_shapes, student_plan, teacher_plan
from megatron_opd.precision.recipes import RECIPES


def look(
    precision: PrecisionConfig,
    student: StudentConfig,
    *,
    teachers: list[TeacherConfig],
    parallel: ParallelConfig,
    train: TrainConfig,
    is_deterministic: bool,
) -> tuple[list[str], list[str]]:
    """(problems, notes a line each). Models that cannot be read are left out: that is a problem already."""
    if unknown := installed.megatron_problem():
        return [unknown], []  # what fits it is not known either
    fp8 = precision.fp8
    broken = installed.engine_problem(precision.layers)
    found = (installed.apex_problem(), broken, installed.torch_problem([student.dtype]))
    problems = [problem for problem in found if problem]
    needed_by = "train.packing" if train.packing else "parallel.context" if parallel.context > 1 else None
    if needed_by and precision.layers != "local":
        problems += _attention(needed_by, student, teachers, is_deterministic=is_deterministic)
    notes = installed.notes(precision.layers)
    if not fp8.is_on:
        return problems, notes
    if not fp8.emulate:
        missing = installed.fp8_problem(of_layers=fp8.has_layers)
        problems += [f"precision.fp8: {missing}"] if missing and not broken else []
        unfit = installed.recipe_problem(fp8.recipe)
        problems += [f"precision.fp8.recipe={fp8.recipe}: {unfit}"] if unfit else []
    recipe = RECIPES[fp8.recipe]
    made, own = [], _architecture(student.model, student.vocab_multiple)
    if own:
        made.append((student_plan(precision, student, parallel, own), own))
    for teacher in teachers:
        if teacher.carrier == "hidden" and (arch := _architecture(teacher.model, parallel.tensor)):
            made.append((teacher_plan(precision, teacher, parallel, arch), arch))
    for plan, arch in made:
        problems += check_shapes(plan, arch, recipe, parallel)
    plans = [plan for plan, _ in made]
    if own:
        problems += check_head_rows(plans, own, recipe, parallel.tensor)
    notes += [plan.line() for plan in plans]
    if fp8.recipe == "delayed":
        notes.append(_delayed(plans))
    return problems, notes


def _attention(
    needed_by: str, student: StudentConfig, teachers: list[TeacherConfig], *, is_deterministic: bool
) -> list[str]:
    """What Transformer Engine's attention does by its fused kernels alone: in types of 16 bits, on newer devices.

    `needed_by` is the setting that takes those kernels.
    """
    if not (installed.has_cuda() and installed.transformer_engine()):
        return []
    if unfit := installed.fused_attention_problem(is_deterministic=is_deterministic):
        return [f"{needed_by}: {unfit}; set precision.layers=local"]
    dtypes = {"student.dtype": student.dtype}
    dtypes |= {f"teachers.{i}.dtype": t.dtype for i, t in enumerate(teachers) if not t.is_served}
    return [
        f"{needed_by}: Transformer Engine's attention does that in 16 bits only, not in fp32; set {name}=bf16, or"
        " precision.layers=local"
        for name, dtype in dtypes.items()
        if dtype == "fp32"
    ]


def _architecture(model: str, vocab_multiple: int) -> Architecture | None:
    try:
        return read_architecture(model, vocab_multiple=vocab_multiple)
    except ValueError:
        return None


def _delayed(made: list[ModelPlan]) -> str:
    who = ", ".join(plan.model for plan in made if plan.rules)
    return (
        f"precision.fp8.recipe=delayed: scales of {who} follow from passes before, so a resumed run does not repeat an"
        " uninterrupted one bit by bit"
    )
