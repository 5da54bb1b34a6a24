#!/usr/bin/env python3
"""What a run will need, before there is anything to run it on: `megatron-opd check CONFIG --plan` as a program.

    python tools/plan_memory.py examples/quickstart.yaml
    python tools/plan_memory.py run.yaml parallel.tensor=8 student.recompute=full --gpu H200 --response 900

The models' directories need nothing but their config.json. Exits with 1 when something does not fit.
"""

from __future__ import annotations

import argparse
import sys

import tool

from megatron_opd.core.arguments import Parser, add_config
from megatron_opd.planner import options


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config(parser)
    options.add_options(parser)
    return tool.run(options.run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
