"""Benchmarks of ``rakd_ops`` against torchvision on the same tensors: ``python -m benchmarks --help``."""
