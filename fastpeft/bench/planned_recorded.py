"""Peaks that `make gpu` measured under memory policies, beside those that `fastpeft plan` predicts for these."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .planned import Compared
from .records import load


def recorded(path: Path) -> tuple[list[Compared], str]:
    """Predictions for the steps of part "memory", and what they were measured on.

    Args:
        path: its records.
    """
    from .gpu_parts.memory import cases

    records = [record for record in load(path) if record.metric == "peak memory"]
    measured = {(record.case, record.peer): int(record.median * 2**20) for record in records}
    found = [one for case in cases(small=False) for one in _compared(case, measured)]
    where = records[0].environment
    return found, f"{where.device}, torch {where.versions['torch']}, transformers {where.versions['transformers']}"


def _compared(case: Any, measured: dict[tuple[str, str], int]) -> Iterator[Compared]:
    from fastpeft.config import LoraSection
    from fastpeft.memory.plan.predicting import Model, Setting
    from fastpeft.memory.policy import ACTIVATIONS, LayerPolicy

    from .steps import base_model, targets

    policies = [how for how in ACTIVATIONS if (case.name, f"fastpeft, {how}") in measured]
    if not policies:
        return
    import torch

    with torch.device("meta"):
        base: Any = base_model(case)
    section = LoraSection(r=case.rank, dropout=case.dropout, target_modules=targets(base))
    model = Model(
        Setting(
            base.config, "causal-lm", case.tokens, case.rows, case.method == "qlora", case.dtype, section,
            accumulated=False,
        )
    )  # fmt: skip
    for how in policies:
        predicted = model.peak((LayerPolicy(how),) * case.layers, case.rows, case.tokens).size
        if case.method == "qlora":
            predicted -= _decoded(case, base)
        yield Compared(f"{case.name}, {how}", predicted, measured[case.name, f"fastpeft, {how}"])


def _decoded(case: Any, base: Any) -> int:
    """Bytes of the largest decoded weight, whose buffer stays from step to step: beside the model before a step."""
    largest = max(module.weight.numel() for path, module in base.named_modules() if path.endswith("_proj"))
    return int(largest) * case.dtype.itemsize


def table(found: list[Compared], where: str) -> str:
    rows = ["| step on a GPU | predicted, MiB | measured, MiB | ratio |", "|---|---:|---:|---:|"]
    rows += [
        f"| {one.name} | {one.predicted / 2**20:.0f} | {one.measured / 2**20:.0f} | {one.ratio:.3f} |" for one in found
    ]
    worst = max(abs(one.ratio - 1) for one in found)
    return "\n".join(
        [*rows, "", f"Beside the model itself, {where}; `make gpu`, part memory. Farthest off: {worst:.1%}."]
    )
