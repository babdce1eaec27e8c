"""Rendered street scenes in KITTI's format: data to train on that anyone can make without a download."""

from rakd.scenes.generate import make_scenes

__all__ = ["make_scenes"]
