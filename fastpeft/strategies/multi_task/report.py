"""What a multi-task run's report says of its tasks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from statistics import mean

from fastpeft.metrics.findings import Findings, Section
from fastpeft.training.preparing import Prepared

from .trainer import Plan


def prefixed(task: str, found: Findings) -> Findings:
    """A task's findings under its name."""
    return Findings(
        tuple(replace(metric, name=f"{task}: {metric.name}") for metric in found.metrics),
        tuple(f"{task}: {note}" for note in found.notes),
        tuple(replace(section, title=f"{task}: {section.title}") for section in found.sections),
    )


def task_section(tasks: dict[str, Prepared], plan: Plan) -> Section:
    """Rows, how often they came, losses and weights."""
    lines = [
        "| task | rows | trained on | first loss | last loss | last weight |",
        "|---|---|---|---|---|---|",
    ]
    weights = plan.weights.now(plan.memory).tolist()
    for number, (name, prepared) in enumerate(tasks.items()):
        losses = [means[number] for means in plan.memory.windows]
        ends = [f"{loss:.4f}" for loss in (losses[0], losses[-1])] if losses else ["-", "-"]
        lines.append(
            f"| {name} | {len(prepared.rows):,} | {plan.memory.rows[number]:,} | {' | '.join(ends)} | "
            f"{weights[number]:.3g} |"
        )
    lines += ["", f"Losses are means over the first and the last {plan.window} steps."]
    return Section("Tasks", "\n".join(lines))


def conflict_section(plan: Plan) -> Section | None:
    """How far the tasks' gradients pulled against each other; None where it was not looked at."""
    if not plan.memory.conflicts:
        return None
    pairs = defaultdict(list)
    for step, one, other, cosine in plan.memory.conflicts:
        pairs[int(one), int(other)].append((int(step), cosine))
    lines = [
        "| tasks | looked at | cosine, mean | least | below 0 | mean of the first half | of the second |",
        "|---|---|---|---|---|---|---|",
    ]
    for (one, other), found in pairs.items():
        values = [cosine for _, cosine in found]
        half = len(values) // 2
        halves = [f"{mean(part):+.3f}" if part else "-" for part in (values[:half], values[half:])]
        below = sum(value < 0 for value in values) / len(values)
        lines.append(
            f"| {plan.adapters[one]}, {plan.adapters[other]} | {len(values)} steps | {mean(values):+.3f} | "
            f"{min(values):+.3f} | {below:.0%} | {' | '.join(halves)} |"
        )
    lines += [
        "",
        f"Cosines of the tasks' gradients on the {plan.shared.count:,} values that they share; below 0 a step that "
        "helps one task hurts the other. A step's gradients are those of its few rows: near 0 is what noise gives.",
    ]
    return Section("Conflicts", "\n".join(lines))
