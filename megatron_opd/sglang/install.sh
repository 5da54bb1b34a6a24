#!/usr/bin/env bash
# Makes an environment of its own with SGLang 0.5.23, for `servers.python`. Does nothing where it is there already.
#
#   megatron-opd install-sglang [DIRECTORY]  # runs this; default: .venv-sglang
#   PYTHON=python3.11                        # or --python: the interpreter to make it with
#   TORCH="torch==2.13.0 --index-url ..."    # or --torch: without a GPU, what pip is asked for first
#
# With a GPU it is the ordinary package with everything it asks for. Without one it is SGLang and what its plain-torch
# path imports (requirements_cpu.txt; about 2 GB), to be run with the cpu_stand_ins/ beside this file.
set -euo pipefail
directory=${1:-.venv-sglang}
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}
requirements=$(dirname "$0")/requirements_cpu.txt
release=$(sed -n 's/^sglang==//p' "$requirements")

fail() {
  echo "error: $*" >&2
  exit 1
}

has_gpu=no
command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU && has_gpu=yes
wanted="$release gpu=$has_gpu torch=$torch $(cksum <"$requirements")"
stamp=$directory/.installed
[ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && exit 0

"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
  fail "SGLang $release needs Python 3.10 to 3.12, and $python is another one; name one (--python python3.11, or PYTHON=python3.11)"
"$python" -m venv "$directory" || fail "no environment could be made in $directory"
pip=("$directory/bin/python" -m pip install -q --disable-pip-version-check)
echo "installing SGLang $release into $directory (GPU: $has_gpu); this takes minutes"
if [ "$has_gpu" = yes ]; then
  "${pip[@]}" "sglang==$release" || fail "pip could not install sglang==$release; its own words are above"
else
  # shellcheck disable=SC2086  # TORCH may hold options of pip
  "${pip[@]}" $torch || fail "pip could not install $torch; its own words are above"
  "${pip[@]}" --no-deps -r "$requirements" || fail "pip could not install $requirements; its own words are above"
fi
echo "$wanted" >"$stamp"
