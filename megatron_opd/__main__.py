"""The command line. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_opd import __version__
from megatron_opd.core import causes, compiler_cache, interrupts, lifeline
from megatron_opd.core.arguments import Parser, add_config
from megatron_opd.launch import launchers
from megatron_opd.planner import options as planner
from megatron_opd.tracking import push

if TYPE_CHECKING:
    from megatron_opd.core.preemption import Notice

_ROWS_OF_CHECK = 1000
"""The most rows of a source whose tests `check` tries; other commands try fewer."""

_EPILOG = """\
examples:
  megatron-opd check examples/quickstart.yaml                  what would run, without running it
  megatron-opd check my.yaml --plan --gpu H100                 what it needs, and how long a step takes
  megatron-opd train examples/quickstart.yaml                  start, or continue after an interruption
  megatron-opd train examples/quickstart.yaml optim.lr=5e-4 parallel.tensor=1 run.dir=runs/mine
  torchrun --nproc-per-node 4 -m megatron_opd train examples/quickstart.yaml
  megatron-opd report runs/quickstart                          table and plot of a run
  megatron-opd eval examples/quickstart.yaml --model runs/quickstart/hf
  megatron-opd methods gkd                                     the settings of a method; without a name, all methods
  megatron-opd serve my.yaml --only teacher-math               its SGLang servers, in a job step of their own
  megatron-opd launch my.yaml --slurm --dry-run                the Slurm job of a run; without --dry-run it is submitted

every setting: docs/config.md
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `megatron-opd`; returns the exit code."""
    interrupts.keep()
    lifeline.tie_to_launcher()  # before the imports that take seconds
    compiler_cache.keep_out_of_temporary()
    arguments = _parser().parse_args(argv)
    try:
        if not _has_directory():  # torch's libraries end the process then, with words of their own
            raise ValueError("the current directory is not there any more; go to another one (`cd`)")
        return int(arguments.run(arguments) or 0)
    except BrokenPipeError:  # the reader of our output has seen enough, like `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except Exception as error:
        if (said := causes.foreseen(error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr, flush=True)
        return 1


def _has_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="megatron-opd",
        description="On-policy distillation of large language models on Megatron-core.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run a config to its last step; continues from its newest checkpoint")
    add_config(train)
    train.set_defaults(run=_train)

    launch = commands.add_parser("launch", help="train with restarts on this machine, or as a Slurm job (--slurm)")
    launchers.add_options(launch)
    add_config(launch)
    launch.set_defaults(run=_launch)

    check = commands.add_parser("check", help="validate a config against its models and data; starts nothing")
    check.add_argument("--settings-only", action="store_true", help="do not check models, tokenizers and data")
    check.add_argument("--all", action="store_true", help="print every setting, not only those that are no default")
    add_config(check)
    check.add_argument("--plan", action="store_true", help="what it needs and how long a step takes; needs no weights")
    planner.add_options(check)
    check.set_defaults(run=_check)

    evaluate = commands.add_parser("eval", help="grade answers of a Hugging Face model to the config's eval sources")
    evaluate.add_argument("--model", help="model directory or hub name (default: the run's export, else student.model)")
    add_config(evaluate)
    evaluate.set_defaults(run=_eval)

    serve = commands.add_parser("serve", help="start the SGLang servers of a config and keep them until Ctrl-C")
    serve.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="rollout or teacher-NAME; repeatable"
    )
    add_config(serve)
    serve.set_defaults(run=_serve)

    methods = commands.add_parser("methods", help="list the methods that a config can name, or print one")
    methods.add_argument("name", nargs="?", help="print the settings of this method, with their comments")
    methods.set_defaults(run=_methods)

    push.add(commands)

    report = commands.add_parser("report", help="table and plot of a run, finished or not")
    report.add_argument("run_dir", help="run.dir of the run")
    report.set_defaults(run=_report)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from megatron_opd.launch import worker

    if worker.is_worker():
        return _work(arguments)
    from megatron_opd.config.file import load
    from megatron_opd.launch import first_look

    config = load(arguments.config, arguments.overrides)
    config = first_look.look(config, arguments.config)
    from megatron_opd.launch import local

    return local.launch(config, [arguments.config, *arguments.overrides])


def _refuse(arguments: argparse.Namespace, needed: str, defaults: Mapping[str, Any]) -> None:
    """Raises ValueError for options that do nothing without the option `needed`."""
    given = [f"--{name.replace('_', '-')}" for name, default in defaults.items() if vars(arguments)[name] != default]
    if given:
        raise ValueError(f"{', '.join(given)} {'requires' if len(given) == 1 else 'require'} {needed}")


def _launch(arguments: argparse.Namespace) -> int:
    from megatron_opd.config.file import load

    for name, launcher in launchers.LAUNCHERS.items():
        if name != arguments.launcher:
            _refuse(arguments, f"--{name}", launchers.defaults_of(launcher))
    config = load(arguments.config, arguments.overrides)
    return launchers.LAUNCHERS[arguments.launcher].launch(config, [arguments.config, *arguments.overrides], arguments)


def _work(arguments: argparse.Namespace) -> int:
    """One rank. Whatever goes wrong on all ranks alike is said once."""
    _begin(arguments)
    from megatron_opd.launch import one_rank

    return one_rank.live(lambda notice: _train_here(arguments, notice))


def _begin(arguments: argparse.Namespace) -> None:
    """Rank 0 says what it does next, before the imports that take seconds."""
    if os.environ["RANK"] != "0":
        return
    from megatron_opd.config.file import load
    from megatron_opd.tracking import train_log

    with suppress(ValueError):  # which is said when all ranks are there
        config = load(arguments.config, arguments.overrides)
        train_log.say_early(config.run.dir, "importing torch and Megatron")


def _train_here(arguments: argparse.Namespace, notice: Notice) -> None:
    from megatron_opd.config.file import load
    from megatron_opd.core.parallel import PeerError
    from megatron_opd.core.preemption import Preempted
    from megatron_opd.student import cpu, groups

    try:
        config = load(arguments.config, arguments.overrides)
        groups.check_world_size(config.parallel)
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of every machine: each has its own files
            raise
        raise PeerError(str(error)) from None
    cpu.enable()
    from megatron_opd.trainer.loop import train

    try:
        train(config, notice)
    except Preempted:
        groups.stop()
        raise


def _check(arguments: argparse.Namespace) -> int:
    if arguments.plan:
        return planner.run(arguments)
    _refuse(arguments, "--plan", planner.DEFAULTS)
    from megatron_opd.config.file import dump, load, method_in, not_defaults, read, to_dict
    from megatron_opd.launch import local, memory_warning
    from megatron_opd.models import hub
    from megatron_opd.planner.job import build
    from megatron_opd.trainer.other_data import check_newest
    from megatron_opd.trainer.preflight import read_inputs

    config = load(arguments.config, arguments.overrides)
    origins = [f"# {line}" for line in method_in(read(arguments.config, arguments.overrides))]
    if arguments.settings_only:
        processes = local.plan(config, [arguments.config, *arguments.overrides])
        print(*origins, "# models, tokenizers and data were not looked at", *processes, sep="\n")
        return 0
    found = config.with_models(hub.directories(dict.fromkeys(config.model_settings, "texts"), config.model_settings))
    inputs = read_inputs(found, rows_to_try=_ROWS_OF_CHECK)
    if config.data.on_change == "error":
        check_newest(config.run.dir, inputs.data)
    print(dump(to_dict(config) if arguments.all else not_defaults(config)))
    others = [] if arguments.all else ["# all other settings have their defaults (--all prints them)"]
    print(*others, *origins, sep="\n")
    for kind, sources in (("train", inputs.train), ("eval", inputs.eval)):
        for source, prompts in sources:
            print(f"# data.{kind}: {source.name}: {len(prompts)} prompts")
    for note in (
        *inputs.notes,
        *hub.notes(found.model_settings),
        *memory_warning.lines(build(found), inputs.longest_prompt),
    ):
        print(f"# {note}")
    print(f"# vocabulary: {inputs.vocab_size} entries; a response ends with {inputs.eos_ids}")
    processes = local.plan(config, [arguments.config, *arguments.overrides])
    for line in (*processes, *local.not_here(processes)):
        print(f"# {line}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
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
    model = str(arguments.model or (exported if exported.is_dir() else config.student.model))
    wanted: dict[str, hub.Need] = {**dict.fromkeys(config.model_settings, "texts"), model: "weights"}
    found = hub.directories(wanted, {model: "--model", **config.model_settings})
    config, model = config.with_models(found), found[model]
    inputs = read_inputs(config)
    if not inputs.eval:
        raise ConfigError(["data.eval is empty: add a source to evaluate on"])
    if all(source.reward == "none" for source, _ in inputs.eval):
        raise ConfigError(
            ["data.eval: no source has a reward, so there is nothing to grade; set one, e.g. reward: exact"]
        )
    for note in inputs.notes:
        print(note, file=sys.stderr)
    check_model(model, config.student.model)
    samples, prompts = config.train.eval_samples, [p for _, source in inputs.eval for p in source]
    ends = {"eos_ids": inputs.eos_ids, "vocab_size": inputs.vocab_size}
    with console_alone() as shown:
        with shown.phase(f"loading {hub.shown(model)}"):
            engine = LocalEngine(model, **ends, dtype=config.rollout.dtype)  # as the evaluations of the run
        evaluator = Evaluator(config.data, config.rewards, config.rollout, config.run, load_tokenizer(model))
        with shown.phase("evaluating", total=num_answers(len(prompts), samples), unit="answers") as phase:
            _, totals = evaluator.answer(engine, prompts, samples=samples, told=lambda _: phase.advance())
    print_grades(hub.shown(model), means([totals], "eval"), console=Console())
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from megatron_opd.config.file import load
    from megatron_opd.launch import local
    from megatron_opd.models import hub
    from megatron_opd.sglang import serve
    from megatron_opd.sglang.keeper import Keeper

    config = load(arguments.config, arguments.overrides)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job step's end is an end like Ctrl-C
    served = [t.model for t in config.teachers if t.is_served] + [config.student.model] * config.rollout.is_served
    config = config.with_models(hub.directories(dict.fromkeys(served, "weights"), config.model_settings))
    try:
        with serve.running(config, say=local.say, only=arguments.only) as servers:
            if not servers:
                raise ValueError(
                    "this config starts no servers: rollout.engine and teachers.N.backend are not sglang,"
                    " or the servers have urls"
                )
            local.say(f"{len(servers)} server(s) up; Ctrl-C ends them")
            keeper = Keeper(servers, restarts=config.run.max_restarts, say=local.say)
            while not keeper.lost():
                time.sleep(1.0)
                keeper.look()
            raise ValueError(f"no server is left for {', '.join(keeper.lost())}")
    except KeyboardInterrupt:
        return 0


def _methods(arguments: argparse.Namespace) -> int:
    from megatron_opd.config import methods

    if arguments.name:
        print(methods.text(arguments.name), end="")
        return 0
    for name in methods.names():
        what, source = methods.about(name)
        print(f"{name:20} {what}\n{'':20} {source}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_opd.tracking.report import report

    report(arguments.run_dir, console=Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
