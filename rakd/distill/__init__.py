"""Distillation: an expert's features teach an apprentice's."""

from typing import Literal

Weights = Literal["pretrained", "random"]
"""What backbones start from. Defined here, where the command line can read it without loading torch."""
