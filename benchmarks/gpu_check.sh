#!/usr/bin/env bash
# What is wanted on a machine with a GPU, in one go: build, all tests that need the GPU, the benchmarks with all peers,
# compute-sanitizer on small shapes, ncu on the hottest kernels. Tests, sanitizers and profiles see both forms of a
# training step (RAKD_CUDA_FORM).
#
#   benchmarks/gpu_check.sh OUT [PYTHON] [STEPS]
#
# Takes at most 8 minutes (RAKD_GPU_SECONDS, 480 unless set). Steps come in the order of what they tell: one that does
# not fit any more is passed over, and one that hangs is cut off after the seconds that stand behind its name. STEPS, an
# extended regular expression, chooses among them: 'ncu|racecheck'.
#
# Results are CSV and text under OUT. A step that needs a tool the machine lacks says so and is passed over. One that
# fails, or finds no time, is named at the end and makes the exit code 1, but does not keep the later ones from running.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu_check.sh OUT [PYTHON] [STEPS]}
python=${2:-python3}
wanted=${3:-.}
budget=${RAKD_GPU_SECONDS:-480}
mkdir -p "$out"
failed=()
late=()

step() { # name, seconds at most, command...
  local name=$1 limit=$2 begin=$SECONDS left=$((budget - SECONDS)) code
  shift 2
  [[ $name =~ $wanted ]] || return 0
  if [ "$left" -lt 5 ]; then
    late+=("$name")
    return 0
  fi
  printf '== %s\n' "$name"
  timeout --kill-after 5 $((limit < left ? limit : left)) "$@" >"$out/$name.log" 2>&1
  code=$?
  tail -n 4 "$out/$name.log"
  printf '   %s: exit %s after %s s\n' "$name" "$code" $((SECONDS - begin))
  [ "$code" -eq 0 ] || failed+=("$name")
}

sanitize() { # tool, seconds at most
  if [ -n "$sanitizer" ]; then
    step "sanitizer-$1" "$2" "$sanitizer" --tool "$1" --error-exitcode 9 "$python" -m benchmarks.gpu_steps small
  elif [[ sanitizer-$1 =~ $wanted ]]; then
    echo "compute-sanitizer is not here: $1 is passed over" | tee "$out/sanitizer-$1.log"
  fi
}

profile() { # workload
  if [ -n "$profiler" ]; then
    step "ncu-$1" 60 "$profiler" --clock-control none --set full --kernel-name 'regex:distill_pool|spread|gram' \
      "$python" -m benchmarks.gpu_steps hot "$1"
  elif [[ ncu-$1 =~ $wanted ]]; then
    echo "ncu is not here: $1 is passed over" | tee "$out/ncu-$1.log"
  fi
}

"$python" - <<'END' | tee "$out/machine.txt"
import torch
assert torch.cuda.is_available(), "no CUDA device"
p = torch.cuda.get_device_properties(0)
print(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}, torch {torch.__version__}")
END
[ "${PIPESTATUS[0]}" -eq 0 ] || exit 1

# This machine's architecture alone: the others are compiled in CI.
arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
sanitizer=$(command -v compute-sanitizer)
profiler=$(command -v ncu)
workers=$(($(nproc) < 8 ? $(nproc) : 8))

step build 150 env RAKD_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch" "$python" setup.py build_ext --inplace
step backends 30 "$python" -c 'import rakd_ops; s = rakd_ops.available_backends(); print(s); assert s["cuda"] is True'
step tests 150 env OMP_NUM_THREADS=1 "$python" -m pytest -q -n "$workers" tests/ops \
  -k '(cuda or triton) and not emulated'
step benchmark-float32 90 "$python" -m benchmarks --backends cuda triton --peers torchvision --most-seconds 2 \
  --out "$out/float32"
for form in pooled gram; do
  step "benchmark-$form" 40 env RAKD_CUDA_FORM="$form" "$python" -m benchmarks --backends cuda --peers none \
    --workloads train train19 --most-seconds 2 --out "$out/$form"
done
sanitize memcheck 60
for workload in train train19; do profile "$workload"; done
step tests-gram 100 env OMP_NUM_THREADS=1 RAKD_CUDA_FORM=gram "$python" -m pytest -q -n "$workers" tests/ops \
  -k 'cuda and not emulated'
for dtype in bfloat16 float16; do
  step "benchmark-$dtype" 60 "$python" -m benchmarks --backends cuda triton --peers torchvision --dtypes "$dtype" \
    --most-seconds 2 --out "$out/$dtype"
done
for tool in racecheck synccheck initcheck; do sanitize "$tool" 60; done
step benchmark-peers 90 "$python" -m benchmarks --backends cuda --workloads train train19 --layouts nchw \
  --most-seconds 2 --out "$out/peers"
step benchmark-align 40 "$python" -m benchmarks --op align --backends cuda triton --most-seconds 2 --out "$out/align"
step training-step 60 "$python" -m benchmarks.training_cost --pair kitti --backends cuda triton --out "$out/training"
step tests-pooled 100 env OMP_NUM_THREADS=1 RAKD_CUDA_FORM=pooled "$python" -m pytest -q -n "$workers" tests/ops \
  -k 'cuda and not emulated'
step tests-training 60 "$python" -m pytest -q tests/rakd/test_training.py -k test_on_a_gpu

[ ${#failed[@]} -eq 0 ] || echo "failed: ${failed[*]}"
[ ${#late[@]} -eq 0 ] || echo "no time left for: ${late[*]}"
[ $((${#failed[@]} + ${#late[@]})) -eq 0 ] || exit 1
echo "all steps passed in $SECONDS s"
