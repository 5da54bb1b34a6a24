"""What is wrong about `precision` with these models on this machine, and what people should know about it."""

from __future__ import annotations

from megatron_opd.config import Config
from megatron_opd.config.checks_precision import STUDENT
from megatron_opd.models.architecture import Architecture, read_architecture
from megatron_opd.precision import installed
from megatron_opd.precision.fp8_plan import ModelPlan, check_head_rows, check_shapes, plans


def look(config: Config) -> tuple[list[str], list[str]]:
    """(problems, notes a line each). Models that cannot be read are left out: that is a problem already."""
    fp8 = config.precision.fp8
    problems = [problem] if (problem := installed.apex_problem()) else []
    problems += _attention(config)
    notes = installed.notes(config.precision.layers)
    if not fp8.is_on:
        return problems, notes
    if not fp8.emulate:
        missing = installed.fp8_problem(of_layers=fp8.has_layers)
        problems += [f"precision.fp8: {missing}"] if missing else []
        unfit = installed.recipe_problem(fp8.recipe)
        problems += [f"precision.fp8.recipe={fp8.recipe}: {unfit}"] if unfit else []
    architectures = _architectures(config)
    made = plans(config, architectures)
    for plan in made:
        problems += check_shapes(plan, architectures[plan.model], config)
    if STUDENT in architectures:
        problems += check_head_rows(made, architectures[STUDENT], config)
    notes += [plan.line() for plan in made]
    if fp8.recipe == "delayed":
        notes.append(_delayed(made))
    return problems, notes


def _attention(config: Config) -> list[str]:
    """What Transformer Engine's attention does by its fused kernels alone: in types of 16 bits, on newer devices."""
    settings = {"train.packing": config.train.packing, "parallel.context": config.parallel.context > 1}
    asked = [name for name, is_on in settings.items() if is_on]
    is_theirs = installed.has_cuda() and installed.transformer_engine() and config.precision.layers != "local"
    if not asked or not is_theirs:
        return []
    if unfit := installed.fused_attention_problem(is_deterministic=config.run.deterministic):
        return [f"{asked[0]}: {unfit}; set precision.layers=local"]
    dtypes = {"student.dtype": config.student.dtype}
    dtypes |= {f"teachers.{i}.dtype": t.dtype for i, t in enumerate(config.teachers) if not t.is_served}
    return [
        f"{asked[0]}: Transformer Engine's attention does that in 16 bits only, not in fp32; set {name}=bf16, or"
        " precision.layers=local"
        for name, dtype in dtypes.items()
        if dtype == "fp32"
    ]


def _architectures(config: Config) -> dict[str, Architecture]:
    """Of the models that something of is computed here, by the names of plans."""
    where = {STUDENT: (config.student.model, config.student.vocab_multiple)}
    where |= {t.name: (t.model, config.parallel.tensor) for t in config.teachers if t.carrier == "hidden"}
    found = {}
    for name, (model, multiple) in where.items():
        try:
            found[name] = read_architecture(model, vocab_multiple=multiple)
        except ValueError:
            continue
    return found


def _delayed(made: list[ModelPlan]) -> str:
    who = ", ".join(plan.model for plan in made if plan.rules)
    return (
        f"precision.fp8.recipe=delayed: scales of {who} follow from passes before, so a resumed run does not repeat an"
        " uninterrupted one bit by bit"
    )
