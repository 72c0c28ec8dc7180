#!/usr/bin/env bash
# Everything a machine with a GPU can tell, in one call: build, CUDA tests, sanitizer, benchmarks.
#
# Usage: bash benches/gpu_check.sh [OUT]      OUT: a folder (default $OUT, else ./gpu_check_out)
# Needs no network; python, torch and a C++ compiler; nvcc and pytest for the most of it; neither
# tyro nor dacite. Each stage has a log and a time limit of its own, and a failed stage does not
# stop the others. Ten minutes in all. Exit status: 0 if every stage passed, 1 if one failed, 2 if
# none failed but some could not run here (no GPU, no tool).
set -u
cd "$(dirname "$0")/.."
root=$PWD
out=${1:-${OUT:-$root/gpu_check_out}}
mkdir -p "$out/logs" || exit 1
out=$(cd "$out" && pwd)
summary=$out/summary.txt
python=${PYTHON:-python3}
limit=${GPU_CHECK_SECONDS:-570}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
unset PYTHONPATH
failed=0
skipped=0

printf '%-12s %-8s %-8s %s\n' stage status seconds what >"$summary"

note() { # STAGE STATUS SECONDS WORDS...
  printf '%-12s %-8s %-8s %s\n' "$1" "$2" "$3" "${*:4}" | tee -a "$summary"
}

skip() { # STAGE REASON...
  skipped=1
  note "$1" skipped 0 "${*:2}"
}

# stage NAME PERCENT COMMAND...: its time limit is a share of the whole, and at most what is left.
stage() {
  local name=$1 seconds=$((limit * $2 / 100)) start=$SECONDS status left=$((limit - SECONDS))
  shift 2
  if [ "$left" -lt 5 ]; then
    skip "$name" "the time was over"
    return 1
  fi
  [ "$seconds" -le "$left" ] || seconds=$left
  timeout --kill-after=10 "$seconds" "$@" >"$out/logs/$name.log" 2>&1 </dev/null
  status=$?
  local words="exit status $status; logs/$name.log"
  [ $status -ne 124 ] && [ $status -ne 137 ] || words="stopped after $seconds s; logs/$name.log"
  if [ $status -eq 0 ]; then
    note "$name" passed $((SECONDS - start)) "$(tail -n 1 "$out/logs/$name.log" | cut -c1-150)"
  else
    failed=1
    note "$name" failed $((SECONDS - start)) "$words"
  fi
  return $status
}

has() { command -v "$1" >/dev/null 2>&1; }

gpu=no
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  gpu=yes
fi

# --- what is here
facts() {
  local status=0
  "$python" - <<'PYTHON' || status=1
import importlib.util
import platform

import torch

print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
for i in range(torch.cuda.device_count()):
    print("device", torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
names = ("pytest", "hypothesis", "pytest_timeout", "tyro", "dacite", "transformers", "cupy")
there = [name for name in names if importlib.util.find_spec(name)]
print("installed:", *there)
print("not installed:", *(name for name in names if name not in there))
PYTHON
  has nvidia-smi && nvidia-smi
  has nvcc && nvcc --version
  has compute-sanitizer && compute-sanitizer --version
  return $status
}
export -f facts has
export python
stage facts 10 bash -c facts || true

# --- build: from this source, into a folder of its own, nothing fetched
site=$out/site
cuda=OFF
if has nvcc || [ -n "${CUDACXX:-}" ]; then cuda=ON; fi
cuda=${DLM_CUDA:-$cuda}
if stage build 42 "$python" -m pip install --no-build-isolation --no-deps --no-index \
  --upgrade --target "$site" -C cmake.define.DLM_CUDA="$cuda" .; then
  export PYTHONPATH=$site
  # -P: the source tree in the working directory must not shadow what was installed
  stage import 10 "$python" -P -c '
import sys

import dlm_fast.ops
from dlm_fast import _C

assert not {"tyro", "dacite", "transformers"} & set(sys.modules), "ops need torch and numpy alone"
print(_C.build_info())'
  [ "$cuda" = ON ] || skip nvcc "built without nvcc: kernels would have to come from CuPy"
else
  skip import "nothing was built"
fi
built() { [ -e "$site/dlm_fast/__init__.py" ]; }

# can_run STAGE: false, and said, where a stage needs what is not here
can_run() {
  if ! built; then
    skip "$1" "nothing was built"
  elif [ $gpu = no ]; then
    skip "$1" "no CUDA device"
  else
    return 0
  fi
  return 1
}

# --- values of every op against its definition; then the tests marked cuda
if can_run kernels; then stage kernels 12 "$python" benches/every_kernel.py; fi
if ! "$python" -c 'import pytest' 2>/dev/null; then
  skip tests "pytest is not installed; stage kernels compares values without it"
elif can_run tests; then
  options=(-p no:cacheprovider -m cuda)
  # an option of pyproject.toml that only this plugin knows
  "$python" -c 'import pytest_benchmark' 2>/dev/null \
    || options+=(-o "addopts=-q --strict-markers --import-mode=importlib")
  path=$site
  if ! "$python" -c 'import hypothesis' 2>/dev/null; then
    path=$site:$root/tests/stand_ins
    echo "hypothesis is not installed: its tests are skipped" | tee -a "$summary"
  fi
  mapfile -t files < <(grep -rlE 'mark\.(every_backend|cuda)' tests --include='test_*.py' | sort)
  stage tests 28 env PYTHONPATH="$path" "$python" -P -m pytest "${options[@]}" "${files[@]}"
fi

# --- sanitizer: small shapes, every kernel
for tool in memcheck racecheck; do
  if ! has compute-sanitizer; then
    skip $tool "compute-sanitizer is not on PATH"
  elif can_run $tool; then
    stage $tool 10 compute-sanitizer --tool $tool --error-exitcode 9 \
      "$python" benches/every_kernel.py
  fi
done

# --- benchmarks: what was measured when the time is over stays
if can_run benchmarks; then
  left=$((limit - SECONDS))
  stage benchmarks 100 "$python" benches/protocol.py --device cuda --rounds 30 --patience 2 \
    --budget $((left > 60 ? left - 40 : 20)) --out "$out/protocol_cuda.json"
fi

[ $failed -eq 0 ] && [ $skipped -eq 0 ] && exit 0
[ $failed -eq 0 ] && exit 2
exit 1
