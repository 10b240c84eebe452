"""Measure which implementation of each op is fastest on this machine, for the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpeft_kernels import tuner
from fastpeft_kernels.tuning import choosing, files
from fastpeft_kernels.tuning.choosing import use_tuned
from fastpeft_kernels.tuning.measuring import Measured

from .integrations.models import model_within
from .integrations.transformers import sample_batch
from .layers.lora import FastLoraLayer
from .layers.watching import side_effects_undone
from .memory.streaming.layer import check_resident
from .verification import output_and_loss

__all__ = ["TOKENS", "Tuning", "cases_of", "measure", "tune", "use_tuned", "winners_file"]

TOKENS = (512, 1024, 2048, 4096)
"""Numbers of tokens that are measured by default: those of one forward pass, rows times length."""


@dataclass(frozen=True)
class Tuning:
    """What was measured; prints as a table.

    Attributes:
        device: its name.
        file: where the winners are kept.
        outcomes: one for each case: op, shape, times.
    """

    device: str
    file: Path
    outcomes: tuple[Measured, ...]

    def __str__(self) -> str:
        if not self.outcomes:
            return f"nothing to choose on {self.device}: each op of this model has one implementation here"
        rows: list[tuple[str, ...]] = [("op", "case", "fastest", "us", "library us", "")]
        rows += [_row(outcome) for outcome in self.outcomes]
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = [_line(row, widths) for row in rows]
        for outcome in self.outcomes:
            lines += [f"not timed: {outcome.op}, {name}: {why}" for name, why in outcome.dropped.items()]
        reused = sum(outcome.reused for outcome in self.outcomes)
        lines.append(f"{len(self.outcomes)} cases on {self.device}, {reused} of them measured earlier")
        return "\n".join([*lines, f"kept in {self.file}"])


def tune(
    model: nn.Module,
    batch: Mapping[str, Any] | None = None,
    *,
    tokens: Sequence[int] = TOKENS,
    again: bool = False,
    seed: int = 0,
) -> Tuning:
    """Time every implementation of the ops that an accelerated model takes, and use the fastest from now on.

    One step with few tokens shows which ops the model takes, and for what shapes; it runs in the autocast state of the
    caller and in training mode, and leaves the model as it was. Each case is then timed on random numbers. Another
    implementation than the plain library's is chosen where it computes the same within the error budget and is faster
    by more than the noise. Winners are kept for later processes, in a file for each device in the user's cache folder;
    what is in the file is not measured again. Call it before training, with nothing else running on the device. While
    it runs, choices are forced in the whole process: no other thread should compute.

    Args:
        model: a model that `fastpeft.accelerate` was called on.
        batch: keyword arguments of the model's forward; a small random one by default, for the model of transformers
            that is in it where another library's module holds one.
        tokens: tokens of a forward pass, rows times length, rounded up to powers of two; each number is measured.
        again: measure also what the file has.
        seed: of the random batch.

    Returns:
        A `Tuning`: `.outcomes`, and a table when printed.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: the model holds no accelerated layer or has them on several devices, no batch can be made up for it
            or for all of them at once, or a number of tokens is below one.
        RuntimeError: another thread tunes.
        OSError: the winners cannot be written; they are in use in this process all the same.
    """
    with choosing.alone():
        cases = cases_of(model, tokens, batch, seed)
        return measure(cases, device_of(model), again=again)


def measure(
    cases: Sequence[tuner.Case],
    device: torch.device,
    *,
    again: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Tuning:
    """`tune` for cases that `cases_of` gave; the model is no longer needed. `progress` takes how many are done."""
    outcomes = tuner.tune(cases, device, again=again, progress=progress)
    return Tuning(choosing.device_name(device), winners_file(device), tuple(outcomes))


def cases_of(
    model: nn.Module, tokens: Sequence[int] = TOKENS, batch: Mapping[str, Any] | None = None, seed: int = 0
) -> list[tuner.Case]:
    """Every choice that a training step of the model meets, for these numbers of tokens; arguments as `tune`."""
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens: expected one or more numbers from 1 on, got {list(tokens)}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_resident(model)
    device = device_of(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model: expected parameters that require gradients, as in training, got none")
    if batch is None:
        model = model_within(model, (FastLoraLayer,), "accelerated layers", "pass a batch")
    inputs = dict(sample_batch(model, seed) if batch is None else batch)
    with choosing.alone(), side_effects_undone(model), _in_training(model):
        with torch.no_grad():
            model(**inputs)  # finds siblings, where that was not done yet
        with choosing.meeting() as met, torch.enable_grad():
            _, loss = output_and_loss(model(**inputs))
            torch.autograd.grad(loss, trained, allow_unused=True)
    return tuner.cases_for(met, device, tokens)


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """Training mode, with dropout; modes and counts of calls are afterwards as before."""
    resting = [module for module in model.modules() if not module.training]
    calls = [(module, dict(module.__dict__.get("fastpeft_calls", {}))) for module in model.modules()]
    try:
        model.train()
        yield
    finally:
        for module in resting:
            module.training = False
        for module, before in calls:
            if "fastpeft_calls" in module.__dict__:
                module.__dict__["fastpeft_calls"] = before


def device_of(model: nn.Module) -> torch.device:
    """Where the model's accelerated layers compute.

    Raises:
        ValueError: there are none, or they are on several devices.
    """
    bases = [m.get_submodule("base_layer") for m in model.modules() if isinstance(m, FastLoraLayer)]
    devices = {str(base.weight.device): base.weight.device for base in bases}
    if not devices:
        raise ValueError("model: no accelerated layer in it; call fastpeft.accelerate(model) first")
    if len(devices) > 1:
        found = ", ".join(sorted(devices))
        raise ValueError(f"model: expected accelerated layers on one device, got {found}; tune fewer layers on one")
    return devices.popitem()[1]  # type: ignore[return-value]


def winners_file(device: torch.device) -> Path:
    """Where the winners of a device are kept."""
    return files.file_of(choosing.device_name(device), files.user_folder())


def _row(outcome: Measured) -> tuple[str, ...]:
    """Op, case, fastest, its time, the library's, and what is saved."""
    case = str(outcome.key)
    if outcome.winner is None:
        return outcome.op, case, "not measured", "", "", ""
    us, choice = outcome.winner.us, outcome.winner.choice
    saved = 1.0 - us[choice] / us[outcome.library] if choice in us and outcome.library in us else 0.0
    return outcome.op, case, choice, f"{us[choice]:.0f}", f"{us[outcome.library]:.0f}", f"-{saved:.0%}" if saved else ""


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """Three columns of words, then numbers."""
    cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
    cells += [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
    return "  ".join(cells).rstrip()
