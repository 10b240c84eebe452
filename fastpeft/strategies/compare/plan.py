"""What a comparison consists of: its settings, and one trial for each method, learning rate and seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from fastpeft.config import FastpeftConfig, MemorySection
from fastpeft.errors import UserError
from fastpeft.hints import did_you_mean
from fastpeft.structured import build

from .methods import METHODS

Phase = Literal["search", "test"]


@dataclass(frozen=True)
class Options:
    """`strategy.options` of a comparison.

    Attributes:
        methods: names of METHODS, in the order of the table; empty for all.
        seeds: how often each method is trained and tested.
        rates: how many learning rates are tried for each method.
        ranges: by method, the lowest and the highest rate in place of its own.
        rows: to learn from, at the most.
        validation_rows: that learning rates are chosen by.
        test_rows: that each trained model sees once.
        similarity: from which rows are twins; see splits.split.
        minutes: no trial begins that would end later; None for no limit.
        generate: how many prompts of the test rows each trained model answers, where rows have prompts.
        save: keep what the tests' trials trained, in `trained/`.
    """

    methods: list[str] = field(default_factory=list)
    seeds: int = 3
    rates: int = 3
    ranges: dict[str, list[float]] = field(default_factory=dict)
    rows: int = 400
    validation_rows: int = 150
    test_rows: int = 300
    similarity: float = 0.8
    minutes: float | None = None
    generate: int = 50
    save: bool = False


@dataclass(frozen=True)
class Trial:
    """One training. `key` names it in the file of results."""

    phase: Phase
    method: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.phase} {self.method} {self.rate:g} {self.seed}"


def options_of(config: FastpeftConfig) -> Options:
    """The options, checked.

    Raises:
        UserError: unknown keys or methods, a number out of range, or no number of steps.
    """
    given = config.strategy
    if given.name not in ("task", "compare"):
        raise UserError(f"strategy.name: expected 'compare', got {given.name!r}")
    try:
        options = build(Options, given.options, "strategy.options")
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    for name in (*options.methods, *options.ranges):
        if name not in METHODS:
            known = f"expected some of {', '.join(METHODS)}"
            raise UserError(f"strategy.options.methods: {known}, got {name!r}{did_you_mean(name, METHODS)}")
    if len(set(options.methods)) < len(options.methods):
        raise UserError(f"strategy.options.methods: expected each once, got {', '.join(options.methods)}")
    for name in ("seeds", "rates", "rows", "validation_rows", "test_rows"):
        if getattr(options, name) < 1:
            raise UserError(f"strategy.options.{name}: expected at least 1, got {getattr(options, name)}")
    if options.generate < 0:
        raise UserError(f"strategy.options.generate: expected at least 0, got {options.generate}")
    if config.data.packing:
        raise UserError("data.packing: expected false, because prompts and prefixes stand before each text, got true")
    if not 0 < options.similarity <= 1:
        raise UserError(f"strategy.options.similarity: expected above 0 and at most 1, got {options.similarity}")
    if options.minutes is not None and not options.minutes > 0:
        raise UserError(f"strategy.options.minutes: expected more than 0, got {options.minutes}")
    for name, ends in options.ranges.items():
        if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
            raise UserError(f"strategy.options.ranges.{name}: expected the lowest and the highest rate, got {ends}")
    if config.method != "lora" or config.model.quantization not in (None, "none"):
        raise UserError("method: expected 'lora' and no model.quantization, because qlora is one of the methods")
    if replace(config.memory, gradient_checkpointing=False) != MemorySection():
        raise UserError("memory: expected no key but gradient_checkpointing, which most methods can train under")
    if config.training.max_steps < 1:
        raise UserError(
            f"training.max_steps: expected at least 1, as every method trains as long, got {config.training.max_steps}"
        )
    return options


def searches(options: Options, seed: int) -> list[Trial]:
    """Each method with each rate, by the rates' order, so that a run cut short has tried all methods."""
    named = options.methods or list(METHODS)
    rates = {name: rates_of(name, options) for name in named}
    return [Trial("search", name, rates[name][i], seed) for i in range(options.rates) for name in named]


def rates_of(name: str, options: Options) -> list[float]:
    """The learning rates that a method is tried with, rising."""
    method = METHODS[name]
    if name in options.ranges:
        low, high = options.ranges[name]
        method = type(method)(**{**vars(method), "low": low, "high": high})
    return method.rates(options.rates)


def chosen_rates(options: Options, results: Iterable[dict[str, Any]], seed: int) -> dict[str, float]:
    """By method, the rate with the best score on validation, then the smallest loss; of methods searched whole.

    A method without a rate that worked is left out.
    """
    found = {result["key"]: result for result in results}
    chosen = {}
    for name in options.methods or list(METHODS):
        tried = [found.get(trial.key) for trial in searches(options, seed) if trial.method == name]
        done = [one for one in tried if one is not None]
        worked = [one for one in done if one["failed"] is None]
        if len(done) == len(tried) and worked:
            chosen[name] = max(worked, key=lambda one: (one["score"], -one["loss"]))["rate"]
    return chosen


def tests(options: Options, chosen: dict[str, float], seed: int) -> list[Trial]:
    """Each method with its rate for each seed; seed by seed, so that all methods meet the machine's good and bad hours.

    The seeds follow that of the search, whose run was picked for doing well.
    """
    seeds = range(seed + 1, seed + 1 + options.seeds)
    return [Trial("test", name, rate, one) for one in seeds for name, rate in chosen.items()]


def plan_of(config: FastpeftConfig, options: Options, fingerprints: dict[str, str]) -> dict[str, Any]:
    """What all trials of a folder have in common.

    Args:
        config: as resolved.
        options: its `strategy.options`.
        fingerprints: of the parts of the data.
    """
    kept = {name: value for name, value in asdict(options).items() if name not in ("minutes", "methods", "seeds")}
    settings = config.to_dict()
    settings["training"] = {name: value for name, value in settings["training"].items() if name != "output_dir"}
    return {"config": settings | {"strategy": None}, "options": kept, "rows": fingerprints}
