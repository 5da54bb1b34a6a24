"""Problems that the settings of `precision` alone reveal; each names the setting to change."""

from __future__ import annotations

from megatron_opd.config import Fp8Config, PrecisionConfig, StudentConfig, TeacherConfig
from megatron_opd.config.models import crosses_tokenizers

ALL = "all"
STUDENT = "student"


def check_precision(
    precision: PrecisionConfig, student: StudentConfig, teachers: list[TeacherConfig], *, has_adapters: bool
) -> list[str]:
    """Every such problem; `precision/fits.py` checks the models and this machine."""
    fp8 = precision.fp8
    problems = _check_names(fp8, teachers)
    if fp8.recipe == "delayed" and (fp8.first_layers_bf16 or fp8.last_layers_bf16):
        problems.append(
            "precision.fp8.recipe delayed shares its scales between all layers: set first_layers_bf16 and"
            " last_layers_bf16 to 0, or take another recipe"
        )
    if fp8.resident and not fp8.teachers:
        problems.append("precision.fp8.resident has no effect without precision.fp8.teachers")
    if fp8.resident and not fp8.emulate:
        offloaded = [t.name for t in teachers if t.offload and is_named(t, fp8.teachers)]
        problems += [f"precision.fp8.resident: set offload=false for teacher '{name}'" for name in offloaded]
    if not fp8.is_on:
        return problems + (
            ["precision.fp8.emulate: nothing is in FP8; set student, teachers or heads"] if fp8.emulate else []
        )
    if has_adapters and fp8.student != "off":
        problems.append("precision.fp8.student: adapters (lora.rank) do not work in FP8; turn one of the two off")
    if crosses_tokenizers(teachers):
        problems.append("precision.fp8 does not support teachers with their own tokenizer (teachers.N.tokenizer)")
    if not fp8.emulate:
        problems += _check_real(precision, student, teachers)
    return problems


def is_named(teacher: TeacherConfig, names: list[str]) -> bool:
    """Whether a list of models names this teacher, or all."""
    return teacher.name in names or ALL in names


def _check_names(fp8: Fp8Config, teachers: list[TeacherConfig]) -> list[str]:
    by_name = {t.name: t for t in teachers}
    problems = []
    if fp8.is_on and {ALL, STUDENT} & set(by_name):
        problems.append("teachers: the names 'all' and 'student' mean other models in precision.fp8; choose another")
        return problems
    for setting, names, others in (
        ("precision.fp8.teachers", fp8.teachers, {ALL}),
        ("precision.fp8.heads", fp8.heads, {ALL, STUDENT}),
    ):
        for name in names:
            if name not in by_name and name not in others:
                known = ", ".join([*sorted(others), *by_name])
                problems.append(f"{setting}: there is no model '{name}' (there are {known})")
    for name in set(fp8.teachers) & set(by_name):
        if by_name[name].backend != "megatron":
            problems.append(
                f"precision.fp8.teachers: '{name}' is behind servers; set FP8 there, e.g. servers.args="
                "[--quantization, fp8]"
            )
    for name in set(fp8.heads) & set(by_name):
        if by_name[name].carrier != "hidden":
            problems.append(f"precision.fp8.heads: '{name}' needs the carrier hidden, or the trainer has no head of it")
    return problems


def _check_real(precision: PrecisionConfig, student: StudentConfig, teachers: list[TeacherConfig]) -> list[str]:
    """Settings that only the emulation supports."""
    fp8, problems = precision.fp8, []
    if fp8.student == "forward":
        problems.append(
            "precision.fp8.student=forward is emulated only: Transformer Engine has a backward pass in bf16 since 2.15,"
            " but 2.9 to 2.11 silently ignore that setting, and no later one has been tried here; set full, or off with"
            " teachers and heads in FP8, or precision.fp8.emulate=true (docs/fp8.md)"
        )
    if fp8.recipe == "delayed" and fp8.teachers:
        problems.append(
            "precision.fp8.recipe=delayed: Transformer Engine updates scales only in passes with gradients, so those"
            " of teachers would stay at 1; set recipe=tensorwise, or precision.fp8.teachers=[]"
        )
    if fp8.heads and fp8.recipe != "tensorwise":
        problems.append(
            f"precision.fp8.heads: the recipe {fp8.recipe} is emulated only for output heads; set recipe=tensorwise, or"
            " precision.fp8.emulate=true"
        )
    if precision.layers == "local" and fp8.has_layers:
        problems.append("precision.layers=local has no FP8: set auto, or precision.fp8.emulate=true")
    if fp8.student != "off" and student.dtype != "bf16":
        problems.append(f"precision.fp8.student needs student.dtype=bf16, not {student.dtype}")
    for i, teacher in enumerate(teachers):
        if is_named(teacher, fp8.teachers) and not teacher.is_served and teacher.dtype != "bf16":
            problems.append(f"precision.fp8.teachers: '{teacher.name}' needs teachers.{i}.dtype=bf16")
    return problems
