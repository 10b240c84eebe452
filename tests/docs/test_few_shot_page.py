"""The table of docs/strategies/few-shot.md is made of the draws that lie beside it."""

from __future__ import annotations

import json

import pytest

from fastpeft.metrics.intervals import over_seeds
from tests.fresh import ROOT

DRAWS = ROOT / "docs" / "assets" / "strategies" / "few-shot.json"
"""Of each run: data, shots, method, and what `few_shot_draws.json` of its folder has."""
WAYS = {
    "trained": {"contrastive": "`contrastive`", "classifier": "`classifier`"},
    "prototypes": {"contrastive": "prototypes, no training"},
    "logistic regression alone": {"contrastive": "logistic regression, no training of the encoder"},
}


def table() -> list[str]:
    """A row for each way, a column for each data set and number of shots."""
    runs = json.loads(DRAWS.read_text(encoding="utf-8"))
    columns = sorted({(run["data"], run["shots"]) for run in runs})
    lines = [f"| | {' | '.join(f'{data}, {shots} a class' for data, shots in columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for way, methods in WAYS.items():
        for method, name in methods.items():
            found = {(r["data"], r["shots"]): r["draws"] for r in runs if r["method"] == method}
            cells = [said([d["figures"][way]["accuracy"] for d in found[c]]) if c in found else "-" for c in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = []
    for data, shots in columns:
        ours, theirs = (
            next((r["draws"] for r in runs if (r["data"], r["shots"], r["method"]) == (data, shots, method)), None)
            for method in ("contrastive", "classifier")
        )
        accuracies = [[d["figures"]["trained"]["accuracy"] for d in draws or ()] for draws in (ours, theirs)]
        both = ours and theirs
        cells.append(said([a - b for a, b in zip(*accuracies, strict=True)], "+") if both else "-")
    lines.append(f"| `contrastive` - `classifier`, draw by draw | {' | '.join(cells)} |")
    return lines


def said(values: list[float], sign: str = "") -> str:
    """In percent."""
    mean, low, high = (100 * value for value in over_seeds(values))
    return f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


@pytest.mark.parametrize("line", table())
def test_the_page_has(line: str) -> None:
    assert line in (ROOT / "docs" / "strategies" / "few-shot.md").read_text(encoding="utf-8").splitlines()
