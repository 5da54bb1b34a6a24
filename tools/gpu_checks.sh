#!/usr/bin/env bash
# Everything that a single bare GPU machine can prove, in one call. Nothing is downloaded: needs Python with torch (CUDA) and
# the packages of setup.py, or WHEELS, a folder of wheels and source packages carried along (docs/gpu.md says how to fill
# it). Writes logs and tables under OUT (default: runs/gpu_checks); exits with 1 when a check failed.
#
#   tools/gpu_checks.sh                      # PYTHON=... to choose the interpreter
#   WHEELS=wheels tools/gpu_checks.sh        # installs from there first, and builds Transformer Engine's PyTorch part
#   LIMIT=120 tools/gpu_checks.sh            # seconds for one check (default 300)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-runs/gpu_checks}
python=${PYTHON:-python3}
limit=${LIMIT:-300}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
mkdir -p "$out"
results="$out/results.tsv"
: >"$results"
failed=0

# check NAME COMMAND...: run with a time-out, keep the log, note how it ended.
check() {
  local name=$1 started=$SECONDS ended=ok code
  shift
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  if [ "$code" -ne 0 ]; then
    ended="FAILED ($code)"
    failed=1
    echo "--- $name: the end of $out/$name.log"
    tail -n 25 "$out/$name.log"
  fi
  printf '%s\t%s\t%s\n' "$name" "$ended" $((SECONDS - started)) >>"$results"
}

# skip NAME WHY: what this machine cannot do is in the table too.
skip() {
  printf '%s\tskipped: %s\t0\n' "$1" "$2" >>"$results"
}

has() {
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

if [ -n "${WHEELS:-}" ]; then
  limit=600 # compiling
  check install-wheels "$python" -m pip install --no-index --find-links "$WHEELS" --no-deps "$WHEELS"/*.whl
  # Headers of cuDNN and its frontend come with their wheels; the package would otherwise look for a built wheel online.
  headers=$("$python" - <<'PY'
import pathlib, sysconfig
root = pathlib.Path(sysconfig.get_paths()["purelib"])
print(":".join(str(p) for p in sorted([*root.glob("nvidia/*/include"), *root.glob("include")])))
PY
  )
  for source in "$WHEELS"/transformer_engine_torch-*.tar.gz; do
    [ -e "$source" ] || continue
    check build-transformer-engine env NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch MAX_JOBS="$(nproc)" \
      CPLUS_INCLUDE_PATH="$headers" C_INCLUDE_PATH="$headers" \
      "$python" -m pip install --no-index --no-build-isolation --no-deps "$source"
  done
  limit=${LIMIT:-300}
fi

"$python" - <<'PY' | tee "$out/machine.txt"
import torch
from megatron_opd.precision import installed
if not torch.cuda.is_available():
    raise SystemExit("there is no CUDA device")
p = torch.cuda.get_device_properties(0)
print(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}, torch {torch.__version__}")
print("\n".join(installed.notes("auto")))
print(installed.apex_problem() or f"NVIDIA's Apex: {'there' if installed.has_apex() else 'not installed'}")
PY
[ "${PIPESTATUS[0]}" -eq 0 ] || exit 1

check gpu-tests "$python" -m pytest -q -m gpu -p no:cacheprovider tests
check loss-kernels "$python" tools/bench_loss.py --device cuda --json "$out/loss.json"

quickstart=(examples/quickstart.yaml parallel.tensor=1 parallel.pipeline=1)
# run NAME OVERRIDES...: the quickstart with its report.
run() {
  local name=$1
  shift
  rm -rf "$out/quickstart-$name"
  check "quickstart-$name" "$python" -m megatron_opd train "${quickstart[@]}" run.dir="$out/quickstart-$name" "$@"
  "$python" -m megatron_opd report "$out/quickstart-$name" >"$out/report-$name.log" 2>&1 || failed=1
}
bf16=(student.dtype=bf16 teachers.0.dtype=bf16 teachers.1.dtype=bf16)
fp8=(precision.fp8.student=full "precision.fp8.teachers=[all]")
run fp32 teachers.0.offload=true teachers.1.offload=true
run bf16 "${bf16[@]}" teachers.0.offload=true
run fp16 student.dtype=fp16 teachers.0.dtype=fp16 teachers.1.dtype=fp16
run head-fp8 "${bf16[@]}" "precision.fp8.heads=[all]"
check fp8-emulated "$python" tools/check_fp8.py "${quickstart[@]}" "${bf16[@]}" "${fp8[@]}" --emulate \
  --recipes tensorwise delayed blockwise mxfp8
if has transformer_engine; then
  check fp8-against-bf16 "$python" tools/check_fp8.py "${quickstart[@]}" "${bf16[@]}" "${fp8[@]}" \
    --recipes tensorwise blockwise
  check fp8-delayed "$python" tools/check_fp8.py "${quickstart[@]}" "${bf16[@]}" precision.fp8.student=full \
    --recipes delayed
  run fp8-tensorwise "${bf16[@]}" "${fp8[@]}"
  run fp8-blockwise "${bf16[@]}" "${fp8[@]}" precision.fp8.recipe=blockwise
  run fp8-resident "${bf16[@]}" "${fp8[@]}" precision.fp8.resident=true
else
  skip fp8 "Transformer Engine is not installed"
fi

"$python" tools/gpu_table.py "$out"
exit "$failed"
