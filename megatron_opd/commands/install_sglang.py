"""`megatron-opd install-sglang`: an environment with SGLang, for the servers that runs start."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from megatron_opd.commands import offline
from megatron_opd.core.arguments import Commands

_DIRECTORY = ".venv-sglang"
_EXAMPLES = """\
examples:
  megatron-opd install-sglang                       # .venv-sglang here, where runs look for it
  megatron-opd install-sglang /opt/sglang           # and in the config: servers: {python: /opt/sglang/bin/python}
  megatron-opd install-sglang --torch "torch==2.13.0 --index-url …"     # of the index with builds for CPUs

SGLang is a server with a torch of its own, so it gets an environment of its own. With a GPU it is the ordinary package;
without one it is what SGLang needs to compute in plain torch (2 GB). Does nothing where it is installed already.
"""


def add(commands: Commands) -> None:
    """The command and its options."""
    parser = commands.add_parser("install-sglang", help="make an environment with SGLang, with or without a GPU")
    offline.examples(parser, _EXAMPLES)
    parser.add_argument("directory", nargs="?", default=_DIRECTORY, help="of the environment (default: %(default)s)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to make it with (default: this one)")
    parser.add_argument("--torch", metavar="REQUIREMENT", help="without a GPU: what pip is asked for first")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the installer; its exit code."""
    from megatron_opd import sglang

    installer = Path(sglang.__file__).with_name("install.sh")
    environment = {**os.environ, "PYTHON": arguments.python}
    if arguments.torch:
        environment["TORCH"] = arguments.torch
    code = subprocess.run(["bash", str(installer), arguments.directory], env=environment, check=False).returncode
    if code == 0:
        print(
            f"SGLang is in {arguments.directory}; runs start it with servers.python: {arguments.directory}/bin/python"
        )
    return code
