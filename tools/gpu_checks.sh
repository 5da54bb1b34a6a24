#!/usr/bin/env bash
# Everything that a machine with one GPU can prove, check by check, in 15 minutes or less: docs/gpu.md. Needs Python with
# a CUDA build of torch, and the packages of setup.py or a folder of wheels that was carried along.
#
#   tools/gpu_checks.sh --list                               # what would run; --help has the options
#   WHEELS=.carry tools/gpu_checks.sh --stage plain          # installs what tools/gpu_carry.sh made, first
#   OUT=/tmp/found PYTHON=python3.12 tools/gpu_checks.sh --limit 120 --budget 540
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/tools${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m gpu_machine.run_checks "$@"
