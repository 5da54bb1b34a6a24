"""The command line. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from megatron_opd import __version__
from megatron_opd.config import Config
from megatron_opd.config_file import ConfigError, dump, load

_EPILOG = """\
examples:
  megatron-opd check examples/quickstart.yaml                  what would run, without running it
  megatron-opd train examples/quickstart.yaml                  start, or continue after an interruption
  megatron-opd train examples/quickstart.yaml optim.lr=5e-4 parallel.tensor=1 run.dir=runs/mine
  torchrun --nproc-per-node 4 -m megatron_opd train examples/quickstart.yaml
  megatron-opd report runs/quickstart                          table and plot of a run
  megatron-opd eval examples/quickstart.yaml --model runs/quickstart/hf

every setting: docs/config.md
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `megatron-opd`; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-opd",
        description="On-policy distillation of large language models on Megatron-core.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run a config to its last step; continues from its newest checkpoint")
    _add_config(train)
    train.set_defaults(run=_train)

    check = commands.add_parser("check", help="validate a config against its models and data; starts nothing")
    _add_config(check)
    check.set_defaults(run=_check)

    evaluate = commands.add_parser("eval", help="greedy accuracy of a Hugging Face model on the config's eval sources")
    evaluate.add_argument("--model", help="model directory (default: the run's export, else student.model)")
    _add_config(evaluate)
    evaluate.set_defaults(run=_eval)

    report = commands.add_parser("report", help="table and plot of a run, finished or not")
    report.add_argument("run_dir", help="run.dir of the run")
    report.set_defaults(run=_report)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file (see examples/)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a setting of the file; values are YAML"
    )


def _train(arguments: argparse.Namespace) -> int:
    from megatron_opd import launch

    config = load(arguments.config, arguments.overrides)
    if launch.is_worker():
        return _work(config)
    from megatron_opd.preflight import read_inputs

    read_inputs(config)  # every problem shows before anything is started
    _write_resolved(config)
    return launch.launch(config, [arguments.config, *arguments.overrides])


def _work(config: Config) -> int:
    from megatron_opd import launch
    from megatron_opd.parallel import PeerError
    from megatron_opd.student import cpu

    # Python would notice a signal only after the collective that it waits in; the default action ends it at once.
    # Nothing is lost: what is saved is complete, and what is being saved is not a checkpoint yet.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cpu.enable()
    from megatron_opd.train import train

    if os.environ["RANK"] == "0":
        _write_resolved(config)
    try:
        train(config)
    except PeerError:
        return launch.PEER_FAILED  # the rank that failed has said why
    return 0


def _write_resolved(config: Config) -> None:
    directory = Path(config.run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(dump(config))


def _check(arguments: argparse.Namespace) -> int:
    from megatron_opd import launch
    from megatron_opd.preflight import read_inputs

    config = load(arguments.config, arguments.overrides)
    inputs = read_inputs(config)
    print(dump(config))
    for kind in ("train", "eval"):
        for source, prompts in getattr(inputs, kind):
            print(f"# data.{kind}: {source.name}: {len(prompts)} prompts")
    print(f"# vocabulary: {inputs.vocab_size} entries; a response ends with {inputs.eos_ids}")
    for process in launch.plan(config, [arguments.config, *arguments.overrides]):
        print(f"# {process}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from megatron_opd.evaluate import accuracies, count_right, greedy
    from megatron_opd.preflight import read_inputs
    from megatron_opd.report import print_accuracies
    from megatron_opd.rollout.local import LocalEngine
    from megatron_opd.tokenizer import load_tokenizer

    config = load(arguments.config, arguments.overrides)
    inputs = read_inputs(config)
    if not inputs.eval:
        raise ConfigError(["data.eval: there is nothing to evaluate on"])
    exported = Path(config.run.dir) / "hf"
    model = arguments.model or (exported if exported.is_dir() else config.student.model)
    engine = LocalEngine(model, eos_ids=inputs.eos_ids, vocab_size=inputs.vocab_size)
    prompts = [p for _, source in inputs.eval for p in source]
    rollouts = greedy(engine, prompts, max_new_tokens=config.rollout.max_new_tokens)
    print_accuracies(str(model), accuracies([count_right(rollouts, load_tokenizer(model))], "accuracy"))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_opd.report import report

    report(arguments.run_dir, console=Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
