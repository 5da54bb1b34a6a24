"""`megatron-opd eval`: grade a model's answers to the config's held-out prompts."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.core.arguments import Commands, add_config
from megatron_opd.core.run_dir import HF_EXPORT

if TYPE_CHECKING:
    from megatron_opd.config import Config
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

    from megatron_opd.config.file import load
    from megatron_opd.tracking.report import print_grades

    config = load(arguments.config, arguments.overrides)
    model = arguments.model or _newest(config.run.dir, config.student.model)
    print_grades(str(model), evaluate(config, model), console=Console())
    return 0


def evaluate(config: Config, model: str | Path | None = None) -> dict[str, float]:
    """Grade a model's answers to the config's held-out prompts, by transformers in this process.

    `model` is a Hugging Face directory, a name of the hub or a checkpoint of a run; None: the run's export, or
    student.model where there is none yet. Returns `eval/<measure>/<source>`, such as `eval/accuracy/all`, with the 95 %
    interval as `<measure>_low` and `<measure>_high`: docs/metrics.md. Raises ConfigError for a config without a graded
    source, and ValueError for a model that cannot be read.
    """
    from megatron_opd.config.file import ConfigError
    from megatron_opd.core.episodes import once_an_episode
    from megatron_opd.models import hub
    from megatron_opd.models.tokenizer import load_tokenizer
    from megatron_opd.rollout.embedded_engine import LocalEngine
    from megatron_opd.rollout.episode_engine import with_environments
    from megatron_opd.rollout.worlds import build_worlds
    from megatron_opd.tracking.tracker import console_alone
    from megatron_opd.trainer import episode_metrics
    from megatron_opd.trainer.evaluate import Evaluator, means, num_answers
    from megatron_opd.trainer.preflight import check_model, read_inputs

    named = str(model or _newest(config.run.dir, config.student.model))
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
    with console_alone() as shown, _readable(places[named], shown) as readable:
        check_model(readable, config.student.model)
        with shown.phase(f"loading {hub.origin(places[named]) or named}"):
            engine = LocalEngine(readable, **ends, dtype=config.rollout.dtype)  # as the evaluations of the run
        tokenizer = load_tokenizer(readable)
        worlds = build_worlds(config.data, config.environment, config.teachers, tokenizer, context=inputs.context)
        evaluator = Evaluator(config.data, config.rewards, config.rollout, config.run, tokenizer, worlds)
        player = with_environments(engine, worlds)
        total = num_answers(len(prompts), samples)
        with closing(player), shown.phase("evaluating", total=total, unit="answers") as phase:
            told = once_an_episode(phase.advance)
            greedy, totals = evaluator.answer(player, prompts, samples=samples, told=told)
    for why in episode_metrics.troubles(greedy):
        print(episode_metrics.warning(why), file=sys.stderr)
    return means([totals], "eval") | episode_metrics.of_held_out([episode_metrics.by_source(greedy)])


def _newest(run_dir: str, student: str) -> str | Path:
    """The run's export; the student that it begins with, where there is none."""
    exported = Path(run_dir) / HF_EXPORT
    return exported if exported.is_dir() else student


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
