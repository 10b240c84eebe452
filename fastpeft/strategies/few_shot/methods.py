"""The methods by name, each imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from .method import Method
from .options import MethodName

METHODS: dict[str, tuple[str, str]] = {
    "contrastive": ("contrastive", "Contrastive"),
    "classifier": ("supervised", "Supervised"),
    "pattern": ("pattern_tuning", "PatternTuning"),
    "t-few": ("t_few", "TFew"),
    "reptile": ("meta", "Meta"),
    "fomaml": ("meta", "Meta"),
}
"""Module and class of each `strategy.options.method`."""


def method_class(name: MethodName) -> type[Method]:
    module, kind = METHODS[name]
    found: type[Method] = getattr(import_module(f".{module}", __package__), kind)
    return found
