#!/usr/bin/env bash
# Everything that a single bare GPU machine can prove, in one call. Needs Python with torch (CUDA), transformers and the
# packages of setup.py; nothing is downloaded. Writes logs and tables under OUT (default: runs/gpu_checks).
#
#   tools/gpu_checks.sh                      # PYTHON=... to choose the interpreter
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-runs/gpu_checks}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
failed=0

# check NAME COMMAND...: run with a time-out, keep the log, say how it ended.
check() {
  local name=$1 started=$SECONDS
  shift
  if timeout 300 "$@" >"$out/$name.log" 2>&1; then
    printf '%-28s ok      %4ds\n' "$name" $((SECONDS - started))
  else
    printf '%-28s FAILED  %4ds  (%s)\n' "$name" $((SECONDS - started)) "$out/$name.log"
    tail -n 25 "$out/$name.log"
    failed=1
  fi
}

"$python" - <<'PY'
import torch
p = torch.cuda.get_device_properties(0)
print(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, torch {torch.__version__}")
PY
check gpu-tests "$python" -m pytest -q -m gpu -p no:cacheprovider tests
for dtype in fp32 bf16; do
  run="/tmp/opd-quickstart-$dtype"
  rm -rf "$run"
  check "quickstart-$dtype" "$python" -m megatron_opd train examples/quickstart.yaml run.dir="$run" \
    parallel.tensor=1 parallel.pipeline=1 student.dtype="$dtype" \
    teachers.0.dtype="$dtype" teachers.1.dtype="$dtype" teachers.0.offload=true
  "$python" -m megatron_opd report "$run" >"$out/report-$dtype.log" 2>&1 && cp "$run/report.md" "$out/report-$dtype.md"
done
exit "$failed"
