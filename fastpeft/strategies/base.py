"""What a strategy may decide of a run; what it leaves alone is plain supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console
from transformers import TrainerCallback

from fastpeft.config import FastpeftConfig, LoraSection
from fastpeft.errors import UserError
from fastpeft.metrics.findings import Findings
from fastpeft.models.adapters import attach_adapter
from fastpeft.structured import build
from fastpeft.training.loading import load_model
from fastpeft.training.preparing import Prepared, Raw, prepare
from fastpeft.training.trainers import build_trainer

if TYPE_CHECKING:
    from fastpeft.memory.plan.predicting import Setting


@dataclass(frozen=True)
class NoOptions:
    """Of a strategy without settings of its own."""


class Strategy:
    """One run's strategy. The run asks for each part in the order of the methods below.

    A new strategy is a file with a subclass, an entry in `registry.STRATEGIES`, an example and a page of the docs.

    Attributes:
        name: its value of `strategy.name`.
        Options: dataclass of `strategy.options`, in the types that `structured.build` knows.
        tasks: values of `model.task` that it serves; None for all.
        read_as: the task whose rows it reads, where the model is trained to do another; None for the model's own.
        config: of the run; after `prepare` as resolved there.
        options: an instance of `Options`.
    """

    name: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    tasks: ClassVar[tuple[str, ...] | None] = None
    read_as: ClassVar[str | None] = None

    def __init__(self, config: FastpeftConfig) -> None:
        """Raises UserError for options that are unknown or of the wrong type."""
        self.config = config
        try:
            self.options: Any = build(self.Options, config.strategy.options, "strategy.options")
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error

    def check(self) -> None:
        """Raises UserError for what can be told from the configuration alone to be wrong."""

    def check_shares(self, *names: str) -> None:
        """Raises UserError for an option that is a share of something, and neither null nor between 0 and 1."""
        for name in names:
            value = getattr(self.options, name)
            if value is not None and not 0 < value < 1:
                raise UserError(f"strategy.options.{name}: expected more than 0 and less than 1, got {value}")

    def check_generate(self) -> None:
        """Raises UserError for an option `generate`, a number of prompts, below 0."""
        if self.options.generate < 0:
            raise UserError(f"strategy.options.generate: expected at least 0, got {self.options.generate}")

    def prepare(self, console: Console) -> Prepared:
        """The data, encoded, and the configuration as resolved. Nothing is written and no model is loaded."""
        prepared = prepare(self.config, console, self.edit, self.read_as)
        if self.tasks is not None and prepared.config.model.task not in self.tasks:
            raise UserError(
                f"strategy.name: {self.name} expected task {' or '.join(self.tasks)}, got {prepared.config.model.task}"
            )
        self.config = prepared.config
        return prepared

    def kept(self, config: FastpeftConfig) -> FastpeftConfig:
        """The resolved configuration as the run's folder keeps it, for whoever goes on with it or loads the adapter."""
        return config

    def edit(self, raw: Raw) -> Raw:
        """The rows as they are to be encoded; called by `prepare`. May hold an evaluation back."""
        return raw

    def planned(self, setting: Setting) -> Setting:
        """The training that memory is planned for, of a plain one; after `prepare`.

        Raises:
            ValueError: it cannot be planned.
        """
        return setting

    def settle(self, prepared: Prepared, arguments: Any, checkpoint: Path | None, console: Console) -> Any:
        """The trainer's arguments, with what short runs of the strategy's own decide.

        Args:
            prepared: model and data.
            arguments: as the configuration has them; they stay as they are.
            checkpoint: that the run goes on from; None to begin.
            console: for progress.
        """
        return arguments

    def load(self, prepared: Prepared, device: Any, dtype: Any) -> Any:
        """The model with what is trained in it, accelerated."""
        return load_model(prepared, device, dtype, self.change, self.attach)

    def change(self, base: Any, section: LoraSection) -> LoraSection:
        """What is done to the base before it gets an adapter; gives the adapter's settings. Called by `load`."""
        return section

    def attach(self, base: Any, section: LoraSection, task: str, seed: int) -> Any:
        """The PEFT model: the base with what is trained on it. Called by `load`; arguments as `attach_adapter`'s."""
        return attach_adapter(base, section, task, seed)

    def callbacks(self, prepared: Prepared) -> list[TrainerCallback]:
        """Beside those of every run."""
        return []

    def trainer(self, prepared: Prepared, model: Any, arguments: Any, callbacks: list[Any]) -> Any:
        """transformers' Trainer or one of its kind, with collator, loss and metrics."""
        evaluation = None if prepared.watched is None else prepared.watched.rows
        return build_trainer(
            prepared.config.model.task, model, prepared.tokenizer, arguments, prepared.rows.rows, evaluation, callbacks
        )

    def is_over(self, checkpoint: Path) -> bool:
        """Whether a run ended at this checkpoint though it has steps left."""
        return False

    def before(self, prepared: Prepared, trainer: Any) -> None:
        """Measure what the result is compared with. The model is as loaded; in a resumed run too."""

    def after(self, prepared: Prepared, trainer: Any) -> Findings:
        """What came of it, with the trained model."""
        return Findings()
