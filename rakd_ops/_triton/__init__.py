"""The registered ops as Triton kernels: for GPUs where the compiled CUDA library is missing.

Imported when one of its ops first runs, so that ``import rakd_ops`` needs no Triton.

RoIAlign on an axis-aligned box is ``R_y F R_xᵀ`` per channel, ``R`` sparse. Every step is one launch over all
levels at once, without atomics, host synchronisation or sizes that depend on values on the device:

1. ``sampling.py``: the rows of ``R_y`` and ``R_x`` of each box and level (float64 positions).
2. ``kernels.py``: one program per box, level, row of bins and block of channels pools the maps, or their
   difference.
3. ``kernels.py``: one program per tile of cells and block of channels gathers ``Σ_k R_yᵀ G_k R_x`` over the
   boxes of its image that meet it, in their order, and writes each cell of the gradient once.

``launch.py`` checks, allocates and launches. A box of unknown batch index (negative, fractional, too large, NaN), that
is inverted or whose coordinates are not finite contributes zero: nothing is read outside the maps whatever the boxes,
the ranges of images or the order hold.
"""

from rakd_ops._triton.launch import align, align_backward, distill_gradient, distill_loss

__all__ = ["align", "align_backward", "distill_gradient", "distill_loss"]
