"""`megatron-opd check-fp8`: what FP8 does to teachers, their average, the student and its gradient, before a run.

Nothing is trained: the student answers held-out prompts of a config, every model is asked about the answers with FP8
and without, and the difference is held against the KL between student and teachers. A run does so before its first
step. Refuses what `megatron-opd train` would refuse.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from typing import TYPE_CHECKING, Any

from megatron_opd.commands import offline
from megatron_opd.core import torchrun
from megatron_opd.core.arguments import Commands, add_config
from megatron_opd.precision.recipes import RECIPES

if TYPE_CHECKING:
    from megatron_opd.config import Config
    from megatron_opd.precision.gate import Measured

_EXAMPLES = """\
examples:
  megatron-opd check-fp8 run.yaml precision.fp8.student=full "precision.fp8.teachers=[all]"
  megatron-opd check-fp8 run.yaml --recipes tensorwise blockwise --emulate
  megatron-opd check-fp8 run.yaml --model runs/mine/hf          # late in a run there is less to learn
  torchrun --nproc-per-node 8 -m megatron_opd check-fp8 run.yaml    # with as many ranks as the config's layout

Without settings of precision.fp8 in the config or behind it, student, teachers and heads are all in FP8; heads by other
recipes than tensorwise only where they are emulated.
Exit code 1 when a recipe is above precision.fp8.max_kl_ratio.
"""


def add(commands: Commands) -> None:
    """The command and its options."""
    parser = commands.add_parser("check-fp8", help="measure what FP8 does to a run, beside what is to be learned")
    offline.examples(parser, _EXAMPLES)
    add_config(parser)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=[], metavar="NAME", help="compare these")
    parser.add_argument("--emulate", action="store_true", help="precision.fp8.emulate=true")
    parser.add_argument("--model", metavar="DIR", help="the student as it is now (default: student.model)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure each recipe and print the table; 1 where one is too coarse."""
    with offline.work():
        return _check(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from megatron_opd.precision.gate import too_coarse
    from megatron_opd.student import cpu

    configs = _configs(arguments)
    for config in configs.values():
        _check_world(config.parallel.world_size)
    cpu.enable()
    found = _measure(configs)
    if not torchrun.is_main():
        return 0
    _print(found)
    problems = {recipe: too_coarse(measured, configs[recipe].precision.fp8) for recipe, measured in found.items()}
    for recipe, lines in problems.items():
        for line in lines:
            print(f"{recipe}: {line}")
    return int(any(problems.values()))


def _configs(arguments: argparse.Namespace) -> dict[str, Config]:
    """The config by recipe. Raises ConfigError."""
    from megatron_opd.config import file as config_file

    overrides = [*arguments.overrides]
    overrides += ["precision.fp8.emulate=true"] if arguments.emulate else []
    overrides += [f"student.model={arguments.model}"] if arguments.model else []
    fp8 = _section(_section(config_file.read(arguments.config, overrides), "precision"), "fp8")
    recipes = arguments.recipes or [str(fp8.get("recipe", "tensorwise"))]
    if all(fp8.get(part) in (None, False, "off", []) for part in ("student", "teachers", "heads")):
        overrides += ["precision.fp8.student=full", "precision.fp8.teachers=[all]"]
        overrides += ["precision.fp8.heads=[all]"] if fp8.get("emulate") or set(recipes) == {"tensorwise"} else []
    found = {r: config_file.load(arguments.config, [*overrides, f"precision.fp8.recipe={r}"]) for r in recipes}
    settings = next(iter(found.values())).model_settings
    places = {text: offline.model_dir(text) for text in settings}
    return {recipe: config.with_models(places) for recipe, config in found.items()}


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a config that nobody has checked: with only `emulate` in it, it would be refused."""
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _check_world(needed: int) -> None:
    if (ranks := torchrun.world_size()) != needed:
        raise ValueError(
            f"the config's layout needs {needed} ranks, not {ranks}: torchrun --nproc-per-node {needed}"
            " -m megatron_opd check-fp8 …, or parallel.tensor=1 parallel.pipeline=1 parallel.data=1"
        )


def _measure(configs: dict[str, Config]) -> dict[str, Measured]:
    """By recipe. Collective; models are loaded for each, and the process groups are gone afterwards."""
    from megatron_opd.student import token_logps
    from megatron_opd.trainer.preflight import read_inputs

    first = next(iter(configs.values()))
    parallel = token_logps.start_megatron(first.parallel, timeout_s=first.run.timeout_s)
    from megatron_opd.student import groups
    from megatron_opd.tracking.tracker import Tracker
    from megatron_opd.trainer.loop import Run

    found = {}
    try:
        for recipe, config in configs.items():
            inputs = parallel.share_world(lambda: read_inputs(config))  # noqa: B023
            for note in inputs.notes if parallel.is_main else ():
                print(note, flush=True)
            scratch = tempfile.TemporaryDirectory() if parallel.is_main else None
            at = parallel.share_world(lambda: scratch.name)  # noqa: B023
            there = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=at))
            run_of_it = Run(there, parallel, inputs, Tracker())
            try:
                run_of_it.sync()
                found[recipe] = run_of_it.measure_fp8()
            finally:
                run_of_it.close()
                if scratch is not None:
                    scratch.cleanup()
    finally:
        groups.stop()
    return found


def _print(found: dict[str, Measured]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "of", *("KL", "at most", "of the KL to learn", "top-1 agreement"))
    for column in table.columns[2:]:
        column.justify = "right"
    for recipe, measured in found.items():
        for noise in measured.noises:
            numbers = f"{noise.kl:.2e}", f"{noise.largest:.2e}", f"{measured.ratio(noise):.3%}", f"{noise.top1:.2%}"
            table.add_row(recipe, noise.name, *numbers)
        table.add_row(recipe, "gradient", f"error {measured.gradient_error:.3f}", "", "", "", end_section=True)
    console = Console(width=100)
    console.print(table)
    for recipe, measured in found.items():
        console.print(f"{recipe}: {measured.signal:.4g} nats a token to be learned, {measured.num_tokens} tokens")
