"""The commands of ``rakd``: one frozen dataclass each, whose fields are its options and ``run`` its work.

Heavy imports (PyTorch, matplotlib) belong inside ``run``: `rakd.cli` imports every command to list it.
"""
