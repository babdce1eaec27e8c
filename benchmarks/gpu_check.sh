#!/usr/bin/env bash
# On a machine with a GPU, in 8 minutes: correctness, cost, profile, sanitizers; all results in one archive.
#
#   benchmarks/gpu_check.sh OUT [PYTHON] [STEPS]
#
# Needs python 3.10+ with torch (a CUDA build), torchvision, numpy, pytest, pytest-xdist, hypothesis, tqdm; no package
# index. Where a package is missing: RAKD_WHEELS names a folder of wheels, which are installed first. Compiled
# libraries are taken where rakd_ops/_cpu*.so, _cuda*.so and _build_info.py are there and fit the GPU (the stable ABI
# lets them come from a machine with another torch); else they are built here, for this GPU alone.
#
# Steps come in the order of their worth: smoke, memcheck, CUDA tests, the benchmark (host, device, end to end),
# profiles, Triton, further sanitizers. All of it takes at most 8 minutes (RAKD_GPU_SECONDS, 480 unless set); a step
# that does not fit any more is passed over, and one that hangs is cut off after the seconds behind its name. STEPS, an
# extended regular expression, chooses among them: 'profile|racecheck'.
#
# OUT/summary.txt has each step's verdict; OUT/results.tgz has all logs and CSV files, packed anew after each step. A
# step that fails, or finds no time, is named at the end and makes the exit code 1; later steps run all the same.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu_check.sh OUT [PYTHON] [STEPS]}
python=${2:-python3}
wanted=${3:-.}
budget=${RAKD_GPU_SECONDS:-480}
mkdir -p "$out/results"
results=$(cd "$out/results" && pwd)
summary=$out/summary.txt
: >"$summary"
failed=()
late=()
export OMP_NUM_THREADS=1

say() { printf '%s\n' "$*" | tee -a "$summary"; }

pack() { # after each step, so that a later failure loses nothing
  cp "$summary" "$results"
  tar czf "$out/results.tgz.part" -C "$results" . && mv "$out/results.tgz.part" "$out/results.tgz"
}

step() { # name, seconds at most, command...
  local name=$1 limit=$2 begin=$SECONDS left=$((budget - SECONDS)) code
  shift 2
  [[ $name =~ $wanted ]] || return 0
  if [ "$left" -lt 5 ]; then
    late+=("$name")
    return 0
  fi
  timeout --kill-after 5 $((limit < left ? limit : left)) "$@" >"$results/$name.log" 2>&1
  code=$?
  say "== $name: exit $code after $((SECONDS - begin)) s$([ $code -eq 124 ] && echo ', cut off')"
  tail -n 4 "$results/$name.log" | cut -c1-300 | tee -a "$summary"
  [ "$code" -eq 0 ] || failed+=("$name")
  pack
  return "$code"
}

with_tool() { # tool, step name, seconds at most, command...
  local tool=$1 name=$2
  shift 2
  if command -v "$tool" >/dev/null; then
    step "$name" "$@"
  elif [[ $name =~ $wanted ]]; then
    say "== $name: passed over, $tool is not here"
  fi
}

sanitize() { # tool of compute-sanitizer, seconds at most
  with_tool compute-sanitizer "$1" "$2" compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" -m benchmarks.gpu_steps small
}

tests() { # step name, seconds at most, pytest's expression; tests that are all skipped have failed
  step "$1" "$2" bash -o pipefail -c '"$@" | awk "{print; fflush()} /[0-9] passed/ {ok = 1} END {exit !ok}"' - \
    "$python" -m pytest -q -n "$workers" tests/ops -k "$3"
}

bench() { # step name, seconds at most, options...
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" -m benchmarks --max-seconds 2 --repeats 15 --out "$results/$name" "$@"
}

workers=$(($(nproc) < 8 ? $(nproc) : 8))
[ -z "${RAKD_WHEELS:-}" ] || step wheels 60 "$python" -m pip install --quiet --no-index --no-deps "$RAKD_WHEELS"/*.whl
step machine 60 "$python" -c 'import torch
assert torch.cuda.is_available(), f"torch {torch.__version__} finds no CUDA device"
p = torch.cuda.get_device_properties(0)
print(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}, torch {torch.__version__}")'
[[ " ${failed[*]-} " != *" machine "* ]] || { say "no GPU: nothing else is run"; exit 1; }

if ! "$python" -m rakd_ops >"$results/backends.log" 2>&1 || ! grep -q '^  cuda *available' "$results/backends.log"; then
  arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  step build 240 env RAKD_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch" "$python" setup.py build_ext --inplace
fi
step backends 60 "$python" -m rakd_ops
step smoke 90 "$python" -m benchmarks.gpu_steps smoke
sanitize memcheck 90
tests tests-cuda 150 'cuda and not emulated and not triton'
bench probe 120 --backends cuda cuda-rows --baselines torchvision difference
bench probe-batch8 60 --backends cuda --baselines torchvision difference --workloads batch8 --layouts nchw \
  --dtypes bfloat16
for workload in train train19; do
  with_tool ncu "profile-$workload" 60 ncu --clock-control none --set full \
    --kernel-name 'regex:prepare|tables|forward|backward|scale_gradients' \
    "$python" -m benchmarks.gpu_steps hot "$workload"
done
bench probe-compiled 120 --backends cuda --workloads train --layouts nchw
bench probe-align 60 --op align --backends cuda
tests tests-triton 120 'triton and not interpreted and not kernels_compile and not cuda'
bench probe-triton 60 --backends cuda triton --baselines none --workloads train gt
for tool in racecheck initcheck synccheck; do sanitize "$tool" 60; done
step training-step 90 "$python" -m benchmarks.training_cost --pair kitti --backends cuda --out "$results/training"
step tests-training 60 "$python" -m pytest -q tests/rakd/test_training.py -k gpu

[ ${#failed[@]} -eq 0 ] || say "failed: ${failed[*]}"
[ ${#late[@]} -eq 0 ] || say "no time left for: ${late[*]}"
say "$SECONDS s; logs, CSV and profiles are in $out/results.tgz"
pack
[ $((${#failed[@]} + ${#late[@]})) -eq 0 ] || exit 1
say "all steps passed"
