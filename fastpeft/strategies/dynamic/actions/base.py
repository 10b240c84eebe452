"""What a rule is asked, and what it is told of the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError

from ..decisions import Decision
from ..trained import Trained

if TYPE_CHECKING:
    from ..losses import Tokens


@dataclass
class Run:
    """What rules act on.

    Attributes:
        trainer: transformers', as built.
        trained: which layers are.
        step: how many steps are done.
        loss: mean over the learned tokens (rows, for classes) of the step's cross-entropy, unweighted; None before the
            first.
        decisions: so far.
        over: whether a rule ended the run.
        write: called after each decision.
    """

    trainer: Any
    trained: Trained
    step: int = 0
    loss: float | None = None
    decisions: list[Decision] = field(default_factory=list)
    over: bool = False
    write: Callable[[], None] = lambda: None

    @property
    def optimizer(self) -> Any:
        return self.trainer.optimizer

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir)


class Action:
    """A rule of `strategy.options.rules`: one file here with a subclass, and an entry in `ACTIONS`.

    Attributes:
        name: its value of `action`.
        Options: dataclass of the rule's other keys.
        chooses_layers: it decides which layers are trained; only one rule of a run may.
        changes_parameters: it freezes or shrinks what is trained, or leaves a part of it out of steps.
        weighs: it changes the loss by `weights`.
        key: of the rule in the configuration, for messages.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    chooses_layers: ClassVar[bool] = False
    changes_parameters: ClassVar[bool] = False
    weighs: ClassVar[bool] = False

    def __init__(self, options: Any, number: int, seed: int) -> None:
        self.options, self.number, self.seed = options, number, seed
        self.key = f"strategy.options.rules[{number}]"

    @property
    def looks_at_validation(self) -> bool:
        """Whether rows are to be held back for it."""
        return getattr(self.options, "signal", None) == "validation"

    def check(self, config: FastpeftConfig) -> None:
        """Raises UserError for what can be told from the configuration alone to be wrong."""

    def begin(self, run: Run) -> None:
        """With the trainer built, before anything is trained. Raises UserError for what does not fit the model."""

    def resume(self, run: Run) -> None:
        """Put a state that `restore` was given into effect; the optimizer is there."""

    def begin_step(self, run: Run) -> None:
        """Before the first forward of a step, with `run.step` of them done."""

    def measure(self, run: Run) -> None:
        """In each step: gradients are there, clipped, and the optimizer has not acted on them."""

    def act(self, run: Run) -> None:
        """Once before the first step, and after each but the last."""

    def evaluated(self, run: Run, loss: float) -> None:
        """After an evaluation on the rows that are looked at during training."""

    def weights(self, tokens: Tokens) -> Any:
        """(tokens,) factor of each token's loss, without a gradient."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, as JSON has it."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave."""

    def decide(self, run: Run, signal: str, value: float | dict[str, float] | None, does: str, why: str) -> None:
        """Note an action in the run's log; a value that is no number is null there, as JSON has none."""
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        run.decisions.append(Decision(run.step, self.number, self.name, signal, value, does, why))
        run.write()

    def at_least(self, **wanted: float) -> None:
        """Raises UserError for an option below its least value, or null where that is not one."""
        for name, least in wanted.items():
            value = getattr(self.options, name)
            if value is not None and not value >= least:
                raise UserError(f"{self.key}.{name}: expected at least {least}, got {value}")

    def between(self, low: float, high: float, *names: str) -> None:
        """Raises UserError for an option that is not above `low` and below `high`."""
        for name in names:
            value = getattr(self.options, name)
            if not low < value < high:
                raise UserError(f"{self.key}.{name}: expected more than {low} and less than {high}, got {value}")
