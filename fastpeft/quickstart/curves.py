"""The two loss curves: do they agree, and what they look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastpeft.requirements import require

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}
"""What |difference| / loss may be, by the dtype that is computed in.

Measured with the shipped model: PEFT with other vector instructions (AVX2 for AVX-512) comes to 1.4e-7 from itself in
120 steps in float32 and to 3.2e-4 in 60 steps in bfloat16; fastpeft to 1.9e-7 and 2.1e-4 from PEFT. Rounding grows with
the model and as training goes on, so the tolerance leaves a factor of ten and more in 16 bits, some hundreds in 32.
"""


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
        return self.relative <= self.tolerance


def compare(plain: Sequence[float], fast: Sequence[float], dtype: str) -> Agreement:
    """Compare the finite losses of two runs, step by step.

    Raises:
        ValueError: not equally many, or none.
    """
    if len(plain) != len(fast) or not plain:
        raise ValueError(f"fast: expected {len(plain)} losses and more than none, got {len(fast)}")
    differences = [abs(a - b) for a, b in zip(plain, fast, strict=True)]
    largest = max(differences)
    relative = max(d / abs(a) for d, a in zip(differences, plain, strict=True))
    return Agreement(largest, differences.index(largest) + 1, relative, TOLERANCE[dtype])


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
    allowed = [agreement.tolerance * abs(loss) for loss in plain]
    below.plot(steps, differences, color="#555555", linewidth=1, marker=".", markersize=3)
    below.plot(steps, allowed, color="#b03030", linewidth=1, linestyle="--", label="allowed")
    # Logarithmic, but with a place for 0: many steps are equal to the last bit.
    below.set_yscale("symlog", linthresh=1e-7)
    below.set_ylim(bottom=-2e-8, top=5 * max(*allowed, *differences))
    below.set_ylabel("|difference| (nats)")
    below.set_xlabel("training step")
    below.legend(loc="center right")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path)
