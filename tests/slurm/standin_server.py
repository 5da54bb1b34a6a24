"""The stand-in server as a program, called as SGLang is: -m sglang.launch_server --port N [--config KEYS] ..."""

import argparse
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
signal.sigwait({signal.SIGTERM, signal.SIGINT})
server.close()
