"""The command line: the list of commands, and how errors are said. A command is a module of `commands/`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import suppress

from megatron_opd import __version__
from megatron_opd.commands import (
    check,
    check_fp8,
    compare_logprobs,
    convert,
    eval,
    example,
    inspect,
    install_sglang,
    launch,
    methods,
    prune,
    push,
    report,
    serve,
    train,
    verify,
    view,
)
from megatron_opd.core import causes, compiler_cache, interrupts, lifeline
from megatron_opd.core.arguments import Commands, Parser

COMMANDS = {
    "to begin with": (example, methods, install_sglang),
    "a run": (check, train, launch, serve),
    "what came of it": (report, view, eval, push),
    "models and checkpoints": (convert, inspect, verify, compare_logprobs, prune, check_fp8),
}
"""The modules of the commands, by their heading in --help."""
_EPILOG = """\
examples:
  megatron-opd example quickstart                              a config with its models and data, written here
  megatron-opd check examples/quickstart.yaml                  what would run, without running it
  megatron-opd check my.yaml --plan --gpu H100                 what it needs, and how long a step takes
  megatron-opd train examples/quickstart.yaml                  start, or continue after an interruption
  megatron-opd train examples/quickstart.yaml optim.lr=5e-4 parallel.tensor=1 run.dir=runs/mine
  torchrun --nproc-per-node 4 -m megatron_opd train examples/quickstart.yaml
  megatron-opd report runs/quickstart                          table and plot of a run
  megatron-opd view runs/quickstart                            its answers token by token, as a page for a browser
  megatron-opd eval examples/quickstart.yaml --model runs/quickstart/hf
  megatron-opd push runs/quickstart --to Org/Name --dry-run    its model card, and the files that would be uploaded
  megatron-opd launch my.yaml --slurm --dry-run                the Slurm job of a run; without --dry-run it is submitted

each command has its own --help; every setting: `megatron-opd check CONFIG --all`, and docs/config.md of the sources
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
    with suppress(FileNotFoundError):
        os.getcwd()
        return True
    return False


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="megatron-opd",
        description="On-policy distillation of large language models on Megatron-core.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = Commands(parser)
    for heading, modules in COMMANDS.items():
        commands.begin(heading)
        for module in modules:
            module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
