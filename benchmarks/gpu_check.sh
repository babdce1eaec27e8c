#!/usr/bin/env bash
# What is wanted on a machine with a GPU, in one go: build, all tests that need the GPU, compute-sanitizer on small
# shapes, the benchmarks with all peers, ncu on the hottest kernels. Tests, sanitizers, train and train19 run in both
# forms of a training step (RAKD_CUDA_FORM).
#
# Meant to take about 12 minutes where all goes well. A step that hangs is cut off after the seconds that stand behind
# its name; these allow for slower machines, and come to half an hour in all.
#
#   benchmarks/gpu_check.sh OUT [PYTHON]
#
# Results are CSV and text under OUT. Steps that need a tool the machine lacks say so and are passed over; a step that
# fails is reported at the end and makes the exit code 1, but does not keep the later ones from running.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu_check.sh OUT [PYTHON]}
python=${2:-python3}
mkdir -p "$out"
failed=()

step() { # name, seconds at most, command...
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  printf '== %s\n' "$name"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local code=$?
  tail -n 4 "$out/$name.log"
  printf '   %s: exit %s after %s s\n' "$name" "$code" $((SECONDS - begin))
  [ "$code" -eq 0 ] || failed+=("$name")
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
step build 150 env RAKD_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch" "$python" setup.py build_ext --inplace
step backends 30 "$python" -c 'import rakd_ops; s = rakd_ops.available_backends(); print(s); assert s["cuda"] is True'
step tests 170 "$python" -m pytest -q tests/ops -k 'cuda or triton'
for form in pooled gram; do
  step "tests-$form" 170 env RAKD_CUDA_FORM="$form" "$python" -m pytest -q tests/ops -k cuda
done
step tests-training 90 "$python" -m pytest -q tests/rakd/test_training.py -k test_on_a_gpu

small='import torch, sys; sys.path.insert(0, "tests/ops"); from cases import pyramid, random_boxes
from rakd_ops import soft_roi_distill, multilevel_roi_align
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for layout in ("contiguous", "channels_last", "strided"):
        for strides in (None, (3.0, 6.0, 12.0, 24.0)):
            a = pyramid(2, 19, device="cuda", dtype=dtype, layout=layout, requires_grad=True)
            e = pyramid(2, 19, strides=strides or (4, 8, 16, 32), device="cuda", dtype=dtype, layout=layout, seed=1, requires_grad=True)
            boxes = random_boxes(9).cuda()
            loss = soft_roi_distill(a, e, boxes, expert_strides=strides, sampling_ratio=len(layout) % 3)
            torch.autograd.grad(loss, a + e)
            torch.autograd.grad(multilevel_roi_align(a, boxes, sampling_ratio=0).float().sum(), a)
torch.cuda.synchronize()'
if sanitizer=$(command -v compute-sanitizer); then
  for tool in memcheck racecheck initcheck synccheck; do
    for form in pooled gram; do
      step "sanitizer-$tool-$form" 60 env RAKD_CUDA_FORM="$form" "$sanitizer" --tool "$tool" --error-exitcode 9 \
        "$python" -c "$small"
    done
  done
else
  echo "compute-sanitizer is not here: passed over" | tee "$out/sanitizer.log"
fi

for dtype in float32 bfloat16 float16; do
  step "benchmark-$dtype" 120 "$python" -m benchmarks --backends cuda triton --dtypes "$dtype" --out "$out/$dtype"
done
for form in pooled gram; do
  step "benchmark-$form" 120 env RAKD_CUDA_FORM="$form" "$python" -m benchmarks --backends cuda --peers none \
    --workloads train train19 --dtypes float32 bfloat16 --out "$out/$form"
done
step training-step 90 "$python" -m benchmarks.training_cost --pair kitti --backends cuda triton --out "$out/training"

hot='import sys, torch; from benchmarks.workloads import WORKLOADS, make_inputs
from rakd_ops import soft_roi_distill
w = WORKLOADS["distill"][sys.argv[1]]
i = make_inputs(w, "float32", "nchw", "cuda", 0)
for _ in range(2):
    torch.autograd.grad(soft_roi_distill(i.apprentice, i.expert, i.boxes, output_size=w.output_size), i.apprentice)
torch.cuda.synchronize()'
if profiler=$(command -v ncu); then
  for workload in train train19; do
    for form in pooled gram; do
      step "ncu-$workload-$form" 60 env RAKD_CUDA_FORM="$form" "$profiler" --clock-control none --set full \
        --launch-skip 2 --launch-count 2 --kernel-name 'regex:distill_pool|spread|gram' "$python" -c "$hot" "$workload"
    done
  done
else
  echo "ncu is not here: passed over" | tee "$out/ncu.log"
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all steps passed in $SECONDS s"
