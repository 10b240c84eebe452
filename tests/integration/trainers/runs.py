"""A short training by any trainer: its losses, step by step, and how far it moved the adapters.

The same training runs three times from the same adapters: plain PEFT in fp64, plain PEFT, and accelerated. The last
two are held against the first by the budget of one step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

import fastpeft
from tests.integration.reports import notes, siblings
from tests.integration.steps import Step, assert_step_close
from tests.integration.test_training import trained_values

FAR = 0.5
"""Of what a training moves: the most by which rounding may change it. Of 16-bit adapters it was up to 0.11."""
Rows = list[dict[str, Tensor]]
Train = Callable[[PeftModel, Path], Sequence[float]]
"""Trains the model and gives the loss of each step."""


@dataclass
class Run:
    model: PeftModel
    """As it was left."""
    step: Step
    """The losses, and by how much the training moved each trained parameter."""


def run(model: PeftModel, train: Train, folder: Path, *, seed: int = 3) -> Run:
    """Trains the model itself."""
    torch.manual_seed(seed)
    before = trained_values(model)
    losses = torch.tensor(list(train(model, folder)), dtype=torch.float32)
    after = trained_values(model)
    moved = {name: after[name].double() - value.double() for name, value in before.items()}
    model.zero_grad(set_to_none=True)
    return Run(model, Step(losses, moved))


def check_same_training(
    model: PeftModel,
    train: Train,
    folder: Path,
    *,
    exact: Train | None = None,
    wide: PeftModel | None = None,
    together: bool = True,
) -> Run:
    """Fails unless accelerated training ends within the budget of plain PEFT's; gives the accelerated run.

    `exact` is the same training without mixed precision, `wide` the same model in fp64 where `.double()` is not,
    `together` whether projections of one input are to be found.
    """
    wide = copy.deepcopy(model).double() if wide is None else wide
    true = run(wide, exact or train, folder / "exact").step
    plain = run(copy.deepcopy(model), train, folder / "plain").step
    ours = run(fastpeft.accelerate(copy.deepcopy(model)), train, folder / "ours")
    assert len(true.loss) > 1 and true.loss.isfinite().all()
    assert all(moved.any() for moved in true.gradients.values()), "some adapter was not trained"
    for name, moved in true.gradients.items():  # else the budget would let anything pass
        away = (plain.gradients[name] - moved).norm() / moved.norm()
        assert away < FAR, f"{name}: plain PEFT moves it otherwise than the exact training, by {away:.2f} of its way"
    assert_step_close(ours.step, plain, true)
    assert not notes(ours.model) and bool(siblings(ours.model)) == together
    return ours


def losses_of(trainer: Any) -> list[float]:
    """What a Trainer logged in each step."""
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]
