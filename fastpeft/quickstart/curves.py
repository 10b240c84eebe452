"""The two loss curves: do they agree, and what they look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastpeft.requirements import require

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}


@dataclass(frozen=True)
class Agreement:
    """Two loss curves compared.

    Attributes:
        largest: of |difference| over all steps, in nats.
        step: where, counted from 1.
        relative: largest of |difference| / loss.
        tolerance: what `relative` may be.
    """

    largest: float
    step: int
    relative: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.tolerance  # False for NaN


def compare(plain: Sequence[float], fast: Sequence[float], dtype: str) -> Agreement:
    """Compare the losses of two runs, step by step.

    Raises:
        ValueError: not equally many, or none.
    """
    if len(plain) != len(fast) or not plain:
        raise ValueError(f"fast: expected {len(plain)} losses and more than none, got {len(fast)}")
    differences = [abs(a - b) for a, b in zip(plain, fast, strict=True)]
    finite = all(difference == difference for difference in differences)
    largest = max(differences) if finite else float("nan")
    return Agreement(
        largest=largest,
        step=differences.index(largest) + 1 if finite else 1,
        relative=max(d / abs(a) for d, a in zip(differences, plain, strict=True)) if finite else float("nan"),
        tolerance=TOLERANCE[dtype],
    )


def plot(plain: Sequence[float], fast: Sequence[float], agreement: Agreement, title: str, path: Path) -> None:
    """Both curves, and below them how far they are apart."""
    figure_module = require("train", "matplotlib.figure", "the loss curve")
    figure = figure_module.Figure(figsize=(8, 6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = range(1, len(plain) + 1)
    above.plot(steps, plain, color="#f2a65a", linewidth=4, label="plain PEFT")
    above.plot(steps, fast, color="#1f4e79", linewidth=1.2, label="fastpeft")
    above.set_ylabel("training loss (nats per token)")
    above.set_title(f"{title}\nlargest |difference|: {agreement.largest:.1e} nats", fontsize=11)
    above.legend()
    differences = [abs(a - b) for a, b in zip(plain, fast, strict=True)]
    # A logarithmic axis has no place for curves that are the same.
    floor = 1e-9
    below.plot(steps, [max(d, floor) for d in differences], color="#555555", linewidth=1)
    allowed = [agreement.tolerance * abs(loss) for loss in plain]
    below.plot(steps, allowed, color="#b03030", linewidth=1, linestyle="--", label="allowed")
    below.set_yscale("log")
    below.set_ylabel("|difference| (nats)")
    below.set_xlabel("training step")
    below.legend(loc="lower right")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path)
