#!/usr/bin/env bash
# Wheels for a GPU machine without a network, in folders of at most 56 MiB (.carry/1, .carry/2, …): docs/gpu.md.
#
#   tools/gpu_carry.sh --dry-run                        # packages, files, sizes; --help has the options
#   tools/gpu_carry.sh --python-version 3.12 --wheel transformer_engine_torch-*.whl
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m gpu_machine.carry "$@"
