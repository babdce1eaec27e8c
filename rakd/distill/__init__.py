"""Distillation: an expert's features teach an apprentice's."""
