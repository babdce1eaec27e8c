"""KITTI data: label and result files, frames, the training data set.

Modules: `labels` and `frames` read and write files and need numpy and Pillow only; `kitti`, `targets` and
`augment` build training samples and need PyTorch.
"""
