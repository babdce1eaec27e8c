"""Fused multi-level RoIAlign and Gaussian soft-weighted feature distillation."""
