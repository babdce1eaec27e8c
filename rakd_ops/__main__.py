"""``python -m rakd_ops``: versions, how the libraries were built, and which backends can run."""

from __future__ import annotations

import platform

import torch

import rakd_ops
from rakd_ops._backends import available_backends, build_info


def main() -> None:
    """Print the report."""
    print(f"rakd_ops {rakd_ops.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    gpu = "none"
    if torch.cuda.is_available():
        gpu = "{}, compute capability {}.{}".format(torch.cuda.get_device_name(), *torch.cuda.get_device_capability())
    print(f"GPU: {gpu}")
    print("build:")
    for key, value in (build_info() or {"compiled libraries": "none"}).items():
        text = " ".join(value) or "none" if isinstance(value, tuple) else value
        print(f"  {key.replace('_', ' ')}: {text}")
    print("backends:")
    for backend, state in available_backends().items():
        print(f"  {backend:10s} {'available' if state is True else state}")


if __name__ == "__main__":
    main()
