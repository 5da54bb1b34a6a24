"""The stand-in server as a program, called as SGLang is: -m sglang.launch_server --port N [--config KEYS] ...

STANDIN_DIES_ONCE names a file that is not there yet: it is killed once, and the file is there then."""

import argparse
import os
import signal
import sys
from pathlib import Path

import yaml

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "sglang")]
from standin import StandIn  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--config", type=Path)
arguments, _ = parser.parse_known_args()
keys = yaml.safe_load(arguments.config.read_text()) if arguments.config else {}
server = StandIn(port=arguments.port, api_key=keys.get("api-key", ""), admin_key=keys.get("admin-api-key", ""))
if (once := os.environ.get("STANDIN_DIES_ONCE")) and not Path(once).exists():
    # In the middle of the twelfth request, and only in its first life: the file remembers.
    server.faults = [*[None] * 11, "killed"]
signal.sigwait({signal.SIGTERM, signal.SIGINT})
server.close()
