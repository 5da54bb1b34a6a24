"""`megatron-opd eval`: grade a model's answers to the config's held-out prompts."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.core.arguments import Commands, add_config

if TYPE_CHECKING:
    from megatron_opd.tracking.tracker import Tracker


def add(commands: Commands) -> None:
    """The command and its options."""
    parser = commands.add_parser("eval", help="grade answers of a model or a checkpoint to the config's eval sources")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="Hugging Face directory, hub name, or a checkpoint of a run, e.g. runs/mine/checkpoints/step_00000100"
        " (default: the run's export, else student.model)",
    )
    add_config(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Sample the answers, grade them, print the means."""
    from rich.console import Console

    from megatron_opd.config.file import ConfigError, load
    from megatron_opd.core.run_dir import HF_EXPORT
    from megatron_opd.models import hub
    from megatron_opd.models.tokenizer import load_tokenizer
    from megatron_opd.rollout.embedded_engine import LocalEngine
    from megatron_opd.tracking.report import print_grades
    from megatron_opd.tracking.tracker import console_alone
    from megatron_opd.trainer.evaluate import Evaluator, means, num_answers
    from megatron_opd.trainer.preflight import check_model, read_inputs

    config = load(arguments.config, arguments.overrides)
    exported = Path(config.run.dir) / HF_EXPORT
    named = str(arguments.model or (exported if exported.is_dir() else config.student.model))
    wanted: dict[str, hub.Need] = {**dict.fromkeys(config.model_settings, "texts"), named: "weights"}
    places, unavailable = hub.look_up(wanted)
    config = config.with_models(places)
    inputs = read_inputs(config, unavailable=unavailable)
    if not inputs.eval:
        raise ConfigError(["data.eval is empty: add a source to evaluate on"])
    if all(source.reward == "none" for source, _ in inputs.eval):
        raise ConfigError(
            ["data.eval: no source has a reward, so there is nothing to grade; set one, e.g. reward: exact"]
        )
    for note in inputs.notes:
        print(note, file=sys.stderr)
    if named in unavailable:
        raise ConfigError([f"--model: {unavailable[named]}"])
    samples, prompts = config.train.eval_samples, [p for _, source in inputs.eval for p in source]
    ends = {"eos_ids": inputs.eos_ids, "vocab_size": inputs.vocab_size}
    called = hub.origin(places[named]) or named
    with console_alone() as shown, _readable(places[named], shown) as model:
        check_model(model, config.student.model)
        with shown.phase(f"loading {called}"):
            engine = LocalEngine(model, **ends, dtype=config.rollout.dtype)  # as the evaluations of the run
        evaluator = Evaluator(config.data, config.rewards, config.rollout, config.run, load_tokenizer(model))
        with shown.phase("evaluating", total=num_answers(len(prompts), samples), unit="answers") as phase:
            _, totals = evaluator.answer(engine, prompts, samples=samples, told=lambda _: phase.advance())
    print_grades(called, means([totals], "eval"), console=Console())
    return 0


@contextmanager
def _readable(model: str | Path, shown: Tracker) -> Iterator[str | Path]:
    """The model as transformers reads it: a Megatron checkpoint is converted into a folder that is removed again."""
    from megatron_opd.models import convert, output_dir
    from megatron_opd.models.torch_dist_dir import is_torch_dist

    if not is_torch_dist(model):
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="megatron-opd-eval-") as folder:
        out, like = f"{folder}/{Path(model).name}", convert.find_like(model)
        plan = convert.plan_to_hf(model, like=like)
        output_dir.check_output(out, inputs=[model, like], num_bytes=plan.num_bytes)
        with shown.phase(f"converting the checkpoint {model}"):
            convert.to_hf(plan, model, out, like=like, progress=lambda _: None)
        yield out
