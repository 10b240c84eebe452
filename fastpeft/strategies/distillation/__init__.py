"""Distillation: a student learns what its teacher would say, beside what the labels say."""

from .strategy import Distillation

__all__ = ["Distillation"]
