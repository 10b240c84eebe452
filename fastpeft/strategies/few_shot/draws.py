"""What each draw of rows gave: kept in the run's folder, so that a resumed run measures none again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastpeft.metrics.findings import Findings, Metric, Section
from fastpeft.metrics.intervals import over_seeds
from fastpeft.paths import write_whole
from fastpeft.structured import build

DRAWS = "few_shot_draws.json"


@dataclass(frozen=True)
class Draw:
    """One draw.

    Attributes:
        seed: of the draw, the adapter's first values and the order of the rows.
        steps: that it was trained.
        figures: accuracy and mean F1 by way: "trained", and the baselines.
    """

    seed: int
    steps: int
    figures: dict[str, dict[str, float]]

    def like(self, other: Draw) -> bool:
        """Whether both have the same figures."""
        return {way: list(one) for way, one in self.figures.items()} == {
            way: list(one) for way, one in other.figures.items()
        }


def read(folder: Path) -> list[Draw]:
    """Empty where there is no such file, or one that cannot be read: those draws are measured again."""
    try:
        return [build(Draw, one) for one in json.loads((folder / DRAWS).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def write(folder: Path, draws: Sequence[Draw]) -> None:
    write_whole(folder / DRAWS, json.dumps([asdict(draw) for draw in draws], indent=1) + "\n")


def findings(draws: Sequence[Draw], trained: str, rows: int) -> Findings:
    """Means over draws with Student's 95 % interval, and the difference to each baseline draw by draw.

    Args:
        draws: of several seeds.
        trained: what to call what was trained.
        rows: that each was measured on.
    """
    ways = list(draws[0].figures)
    lines = [
        "| | accuracy | 95 % interval | F1, mean of the classes | 95 % interval | against it |",
        "|---|---|---|---|---|---|",
    ]
    for way in ways:
        cells = [trained if way == "trained" else way]
        for name in ("accuracy", "f1"):
            mean, low, high = over_seeds([draw.figures[way][name] for draw in draws])
            cells += [f"{mean:.3f}", f"{low:.3f} to {high:.3f}"]
        if way == "trained":
            cells.append("")
        else:
            differences = [draw.figures["trained"]["accuracy"] - draw.figures[way]["accuracy"] for draw in draws]
            mean, low, high = over_seeds(differences)
            cells.append(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    text = [
        f"{len(draws)} draws of training rows (seeds {draws[0].seed} to {draws[-1].seed}), measured on the same {rows} "
        "rows. Intervals are Student's over the draws; the last column is how much better the trained model's accuracy "
        "is, draw by draw.",
        "",
        *lines,
    ]
    found = over_seeds([draw.figures["trained"]["accuracy"] for draw in draws])
    metric = Metric(f"accuracy, mean of {len(draws)} draws", *found)
    return Findings((metric,), (), (Section("Draws", "\n".join(text)),))
