"""What a controller decided, and why: a log of JSON lines, a plot, a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastpeft.requirements import require


@dataclass(frozen=True)
class Decision:
    """One action.

    Attributes:
        step: how many steps were done by then.
        rule: its place in `strategy.options.rules`, from 0.
        action: of the rule, such as "freeze".
        signal: what was looked at.
        value: of the signal; by layer or alone; None where it is a schedule's.
        does: the change, in words.
        why: the reason, in words.
    """

    step: int
    rule: int
    action: str
    signal: str
    value: float | dict[str, float] | None
    does: str
    why: str


def write(decisions: Sequence[Decision], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(asdict(decision)) + "\n" for decision in decisions), encoding="utf-8")


def table(decisions: Sequence[Decision], most: int = 30) -> str:
    """Markdown: the first and last of them."""
    lines = ["| step | rule | signal | what | why |", "|---|---|---|---|---|"]
    for place, decision in enumerate(decisions):
        if place < most // 2 or place >= len(decisions) - most // 2:
            lines.append(
                f"| {decision.step} | {decision.rule}: {decision.action} | {decision.signal} | {decision.does} | "
                f"{decision.why} |"
            )
        elif place == most // 2:
            lines.append(f"| ... | | | {len(decisions) - 2 * (most // 2)} more | |")
    return "\n".join(lines)


def plot(
    trained: Mapping[int, Sequence[int]], layers: Sequence[int], losses: Sequence[tuple[int, float]], path: Path
) -> None:
    """Which layers were trained from which step on, above the loss.

    Args:
        trained: numbers of the trained layers, by the step that they are trained from.
        layers: numbers of all.
        losses: (step, loss) as logged; the last step ends the plot.
    """
    figure_module = require("train", "matplotlib.figure", "the plot of decisions")
    figure = figure_module.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    last = losses[-1][0] if losses else max(trained, default=0) + 1
    begins = sorted(trained)
    for begin, end in zip(begins, [*begins[1:], last], strict=True):
        for number in trained[begin]:
            above.broken_barh([(begin, end - begin)], (number - 0.4, 0.8))
    above.set_ylabel("trained layers")
    above.set_yticks([number for place, number in enumerate(layers) if place % (1 + len(layers) // 12) == 0])
    above.set_ylim(min(layers) - 0.6, max(layers) + 0.6)
    below.plot(*zip(*losses, strict=True) if losses else ((), ()), linewidth=1.4)
    below.set_xlabel("step")
    below.set_ylabel("training loss")
    below.grid(alpha=0.3)
    below.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path)


def from_state(found: Sequence[dict[str, Any]]) -> list[Decision]:
    """Of `asdict`, as a checkpoint holds them."""
    return [Decision(**one) for one in found]
