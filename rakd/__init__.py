"""Region-Aware Knowledge Distillation for monocular 3D detection, on top of ``rakd_ops``."""
