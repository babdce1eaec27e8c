"""The public functions. Each validates its arguments and hands them to a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rakd_ops import _autograd, _inputs, reference
from rakd_ops._backends import choose_backend, is_installed
from rakd_ops._inputs import Boxes, Maps
from rakd_ops._options import RoIOptions, check_options


def distill(
    apprentice: Maps,
    expert: Maps,
    boxes: Boxes,
    options: RoIOptions,
    *,
    level_weights: Tensor | None,
    box_weights: Tensor | None,
    reduction: str,
    backend: str,
) -> Tensor:
    """Compute the loss with checked options; shared by the function and the module."""
    inputs = _inputs.check_distillation(apprentice, expert, boxes, box_weights, level_weights, reduction, options)
    chosen = choose_backend(backend, inputs.apprentice[0].device)
    if chosen == "reference":
        return reference.distill(inputs, options, reduction)
    return _autograd.distill(inputs, options, reduction, chosen)


def soft_roi_distill(
    apprentice: Maps,
    expert: Maps,
    boxes: Boxes,
    *,
    strides: Sequence[float] = (4, 8, 16, 32),
    expert_strides: Sequence[float] | None = None,
    output_size: int | tuple[int, int] = 7,
    sampling_ratio: int = 2,
    assignment: str = "soft",
    sigma: float = 1.0,
    canonical_size: float = 224.0,
    canonical_level: float = 4,
    level_weights: Tensor | None = None,
    box_weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Region-aware distillation loss: RoI features of two pyramids compared level by level, softly assigned.

    For box ``k`` and level ``l`` let ``D_kl = RoIAlign(A_l, b_k) - RoIAlign(E_l, b_k)``. The box's loss is
    ``u_k Σ_l w_kl mean(D_kl²)``, where ``w_kl`` are the level weights (:func:`level_weights`) and ``u_k`` the box
    weights. Values accumulate in float32, in float64 where any map is float64.

    Args:
        apprentice: The apprentice's maps ``[B, C_l, H_l, W_l]``, fine to coarse: a sequence, a dict (in its order), or
            one map. Channels may differ from level to level. float32, float64, float16 or bfloat16, also mixed; any
            memory layout.
        expert: The expert's maps, as many, with the apprentice's batch size, device and channels at each level. Other
            heights and widths need ``expert_strides``; dtypes may differ.
        boxes: ``[K, 5]`` rows ``(batch_index, x1, y1, x2, y2)`` in pixels of the apprentice's input image, or a list
            of one ``[K_b, 4]`` per image; any real dtype. Boxes of ``torchvision.tv_tensors`` are read by the format
            they carry (``torch.compile(fullgraph=True)`` refuses such). Data: no gradient flows to them.
        strides: Pixels per cell of each of the apprentice's maps, increasing.
        expert_strides: Pixels of the apprentice's images per cell of the expert's maps; default ``strides``, for maps
            of the same images. Given, they allow one network to pad its images more, by up to the coarsest stride;
            under ``torch.compile`` this is allowed always.
        output_size: Bins of RoIAlign: one integer, or (height, width).
        sampling_ratio: Samples per bin and axis; 0 adapts to the box, ``ceil(box size in cells / bins)``.
        assignment: ``"soft"`` (Gaussian over levels, the paper's SFA), ``"hard"`` (one level, HFA) or ``"uniform"``
            (all levels alike, L_RoI).
        sigma: Width of the Gaussian, in levels.
        canonical_size: Side in pixels of a box that belongs to ``canonical_level``.
        canonical_level: Level (log2 of the stride) of a box of ``canonical_size``.
        level_weights: ``[K, L]`` weights ``w_kl`` of your own in place of those four options; finite, not negative.
        box_weights: ``[K]`` weights ``u_k``; default 1.
        reduction: ``"mean"`` (over boxes; 0 without boxes), ``"sum"`` or ``"none"``.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        The loss, a scalar, or ``[K]`` for ``reduction="none"``; float64 where any map is float64, else float32.

    Raises:
        ValueError: A shape, value, device or name is wrong, or a gradient with respect to boxes is asked for. Values of
            boxes and weights on a GPU are not looked at, since that would wait for the device: there, a box whose
            batch index is no image's, or that is not finite or inverted, contributes zero (and counts in the mean), as
            does a weight that is not finite.
        TypeError: An argument has the wrong type or dtype.
        RuntimeError: The backend asked for cannot run; or a box on the CPU is invalid under ``torch.compile``, where
            only the op can look at it.

    Source:
        Cheon, Shin, Bae: Region-aware knowledge distillation between monocular camera-based 3D object detectors, ICT
        Express 2025, L^S_RoI. RoIAlign: ``torchvision.ops.roi_align`` with ``aligned=True``. Levels: Lin et al.,
        Feature Pyramid Networks, equation 1 without the floor.

    Example:
        >>> maps = [torch.randn(1, 16, 128 // s, 256 // s, requires_grad=True) for s in (4, 8, 16, 32)]
        >>> expert_maps = [torch.randn_like(m) for m in maps]
        >>> loss = soft_roi_distill(maps, expert_maps, [torch.tensor([[20.0, 10.0, 180.0, 90.0]])])
        >>> loss.backward()
    """
    options = check_options(
        strides=strides,
        expert_strides=expert_strides,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        assignment=assignment,
        sigma=sigma,
        canonical_size=canonical_size,
        canonical_level=canonical_level,
    )
    return distill(
        apprentice,
        expert,
        boxes,
        options,
        level_weights=level_weights,
        box_weights=box_weights,
        reduction=reduction,
        backend=backend,
    )


def multilevel_roi_align(
    features: Maps,
    boxes: Boxes,
    *,
    strides: Sequence[float] = (4, 8, 16, 32),
    output_size: int | tuple[int, int] = 7,
    sampling_ratio: int = 2,
    assignment: str = "hard",
    sigma: float = 1.0,
    canonical_size: float = 224.0,
    canonical_level: float = 4,
    level_weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """RoIAlign over all levels of a pyramid at once: ``out_k = Σ_l w_kl RoIAlign(F_l, b_k)``.

    With ``assignment="hard"`` this is the usual FPN pooling (``torchvision.ops.MultiScaleRoIAlign``).

    Args:
        features: Maps ``[B, C, H_l, W_l]``, fine to coarse: a sequence, a dict (in its order), or one map. Gradients
            flow to them. Maps of several dtypes are brought to the widest.
        boxes: As for :func:`soft_roi_distill`.
        strides: Pixels per cell of each map, increasing.
        output_size: Bins: one integer, or (height, width).
        sampling_ratio: Samples per bin and axis; 0 adapts to the box.
        assignment: ``"hard"``, ``"soft"`` or ``"uniform"``; see :func:`level_weights`.
        sigma: Width of the Gaussian of ``"soft"``, in levels.
        canonical_size: Side in pixels of a box that belongs to ``canonical_level``.
        canonical_level: Level (log2 of the stride) of a box of ``canonical_size``.
        level_weights: ``[K, L]`` weights ``w_kl`` of your own in place of those four options; finite, not negative.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        ``[K, C, Py, Px]`` in the maps' dtype; rows in the order of the boxes.

    Raises:
        ValueError, TypeError, RuntimeError: As :func:`soft_roi_distill`.
    """
    options = check_options(
        strides=strides,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        assignment=assignment,
        sigma=sigma,
        canonical_size=canonical_size,
        canonical_level=canonical_level,
    )
    maps, inputs = _inputs.check_alignment(features, boxes, level_weights, options)
    chosen = choose_backend(backend, maps[0].device)
    if chosen == "reference":
        return reference.align(maps, inputs, options)
    return _autograd.align(maps, inputs, options, chosen)


def level_weights(
    boxes: Boxes,
    *,
    strides: Sequence[float] = (4, 8, 16, 32),
    assignment: str = "soft",
    sigma: float = 1.0,
    canonical_size: float = 224.0,
    canonical_level: float = 4,
) -> Tensor:
    """Weights of the pyramid's levels for each box.

    A box of sides ``w, h`` has the continuous level ``m = canonical_level + log2(sqrt(w h) / canonical_size)``,
    clamped to the levels that exist; level ``l`` of a map is ``log2`` of its stride.

    - ``"soft"``: ``w_l ∝ exp(-(l - m)² / (2 sigma²))``.
    - ``"hard"``: 1 for the coarsest level not above ``m + 1e-6`` (torchvision's ``LevelMapper``), else 0.
    - ``"uniform"``: ``1 / L``.

    Args:
        boxes: As for :func:`soft_roi_distill`.
        strides: Pixels per cell of each level, increasing.
        assignment: See above.
        sigma: Width of the Gaussian, in levels.
        canonical_size: Side in pixels of a box of level ``canonical_level``.
        canonical_level: See ``canonical_size``.

    Returns:
        ``[K, L]``, rows summing to 1; float64 where boxes (of a list, the first) are float64, else float32. Carries no
        gradient.

    Raises:
        ValueError, TypeError: As :func:`soft_roi_distill`.
    """
    options = check_options(
        strides=strides,
        assignment=assignment,
        sigma=sigma,
        canonical_size=canonical_size,
        canonical_level=canonical_level,
    )
    inputs = _inputs.check_boxes_alone(boxes)
    chosen = choose_backend("auto", inputs.boxes[0].device)
    if chosen in ("cpu", "cuda"):
        return _autograd.weigh_levels(inputs, options.strides, options.rule)
    return reference.weigh(inputs, options.strides, options.rule)


def release_memory() -> None:
    """Give back to the system the memory that the CPU backend caches between calls.

    The memory of gradients and pooled features of 2 MiB and more is cached when they are freed, as are the ops' large
    buffers: the next step then needs no fresh pages, whose cost exceeds that of the arithmetic. The system may take
    cached memory when it runs short; this function returns it at once. The environment variable ``RAKD_CPU_KEEP_MIB``
    limits it (read at the first call; 1024 unless set, 0 caches nothing). Nothing is cached outside Linux, and no
    tensors under torch 2.10. The storage of a tensor in cached memory cannot be enlarged in place.
    """
    if is_installed("cpu"):
        torch.ops.rakd_ops.release_memory()
