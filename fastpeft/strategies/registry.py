"""The strategies by name, each imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.hints import did_you_mean

from .base import Strategy

STRATEGIES = {
    "task": ("task", "TaskAdaptive"),
    "domain": ("domain", "DomainAdaptive"),
    "few-shot": ("few_shot.strategy", "FewShot"),
    "distillation": ("distillation", "Distillation"),
    "dynamic": ("dynamic.strategy", "Dynamic"),
    "multi-task": ("multi_task.strategy", "MultiTask"),
}
"""Module and class of each `strategy.name`."""


def strategy_of(config: FastpeftConfig) -> Strategy:
    """The strategy that a configuration asks for, checked as far as that alone can be.

    Raises:
        UserError: an unknown name, or options that cannot be.
    """
    name = config.strategy.name
    if name not in STRATEGIES:
        hint = "; fastpeft compare runs it" if name == "compare" else did_you_mean(name, STRATEGIES)
        raise UserError(f"strategy.name: expected one of {', '.join(STRATEGIES)}, got {name!r}{hint}")
    module, kind = STRATEGIES[name]
    found: type[Strategy] = getattr(import_module(f".{module}", __package__), kind)
    strategy = found(config)
    strategy.check()
    return strategy
