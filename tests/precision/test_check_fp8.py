"""What `megatron-opd check-fp8` measures by default, and that it takes what `megatron-opd train` takes."""

import argparse
from pathlib import Path

import pytest

from megatron_opd.commands import check_fp8
from megatron_opd.config.file import ConfigError

ROOT = Path(__file__).resolve().parents[2]
BF16 = ["student.dtype=bf16", "teachers.0.dtype=bf16", "teachers.1.dtype=bf16"]


@pytest.fixture
def fp8_of():
    """precision.fp8 by recipe."""

    def made(*overrides, emulate=False, recipes=()):
        arguments = argparse.Namespace(
            config=ROOT / "examples/quickstart.yaml",
            overrides=[*overrides],
            emulate=emulate,
            recipes=recipes,
            model=None,
        )
        return {recipe: config.precision.fp8 for recipe, config in check_fp8._configs(arguments).items()}

    return made


@pytest.mark.parametrize(
    ("emulate", "recipes", "heads"),
    [
        (False, ["tensorwise"], ["all"]),
        (False, ["tensorwise", "blockwise"], []),
        (True, ["tensorwise", "blockwise"], ["all"]),
    ],
)
def test_by_default_everything_that_can_be_is_in_fp8(fp8_of, emulate, recipes, heads):
    found = fp8_of(*([] if emulate else BF16), emulate=emulate, recipes=recipes)
    assert list(found) == recipes
    for recipe, fp8 in found.items():
        assert (fp8.recipe, fp8.student, fp8.teachers, fp8.heads) == (recipe, "full", ["all"], heads)
        assert fp8.emulate == emulate


@pytest.mark.parametrize(
    "asked", [{"student": "forward"}, {"student": "full"}, {"heads": ["carry"]}, {"teachers": ["all"]}]
)
def test_what_is_asked_for_is_measured_alone_also_where_only_the_emulation_has_it(fp8_of, asked):
    overrides = [f"precision.fp8.{name}={value}" for name, value in asked.items()]
    (fp8,) = fp8_of(*overrides, emulate=True).values()
    everything = {"student": "off", "teachers": [], "heads": []} | asked
    assert {name: getattr(fp8, name) for name in everything} == everything
    (fp8,) = fp8_of(*overrides, "precision.fp8.emulate=true", "precision.fp8.recipe=blockwise").values()
    assert (fp8.recipe, fp8.student) == ("blockwise", everything["student"])


def test_what_train_would_refuse_is_refused(fp8_of):
    with pytest.raises(ConfigError, match="student=forward is emulated only"):
        fp8_of(*BF16, "precision.fp8.student=forward")
    with pytest.raises(ConfigError, match="precision"):
        fp8_of("precision=3")
