#!/usr/bin/env bash
# `megatron-opd install-sglang`, by the name that it had before it was a command; makes .venv-sglang in the clone.
set -euo pipefail
cd "$(dirname "$0")/.."
exec megatron_opd/sglang/install.sh "$@"
