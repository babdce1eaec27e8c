"""Run by a user's Python, outside the source tree: the installed package must compute right values and gradients.

Needs torch and numpy only. Ends with an error, or prints what it checked.
"""

import sys
from pathlib import Path

import torch

import rakd_ops
from rakd_ops._backends import build_info

assert Path(rakd_ops.__file__).resolve().parents[1] != Path(__file__).resolve().parents[1], "this is the source tree"
assert rakd_ops.available_backends()["cpu"] is True, rakd_ops.available_backends()
cuda = rakd_ops.available_backends()["cuda"]
if build_info()["cuda_built"] and torch.version.cuda:  # the library loads, whether there is a device or not
    assert cuda is True or "torch finds no CUDA device" in cuda, cuda
assert not {"torchvision", "matplotlib", "tyro", "triton"} & set(sys.modules), "imports more than torch and numpy"

torch.manual_seed(0)
apprentice = [torch.randn(2, 20, 64 >> i, 96 >> i, dtype=torch.float64, requires_grad=True) for i in range(4)]
expert = [torch.randn_like(m) for m in apprentice]
boxes = torch.tensor([[0, 10.0, 12.0, 90.0, 200.0], [1, 0.0, 0.0, 380.0, 250.0], [1, 33.0, 40.0, 47.0, 51.0]])
results = {}
for backend in ("cpu", "reference"):
    loss = rakd_ops.soft_roi_distill(apprentice, expert, boxes, backend=backend)
    pooled = rakd_ops.multilevel_roi_align(apprentice, boxes, backend=backend)
    results[backend] = [loss, pooled, *torch.autograd.grad(loss + pooled.square().sum(), apprentice)]
for got, expected in zip(results["cpu"], results["reference"], strict=True):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
print(f"installed under torch {torch.__version__}: values and gradients are right")
