"""What a run leaves beside its adapter: report, loss curve, model card, figures for programs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastpeft.metrics.findings import Findings
from fastpeft.requirements import require

from .folder import LOSS, REPORT, RUN

SHORTLY = ("accuracy", "f1", "f1_micro", "f1_macro", "pearson")
"""Metrics of the last evaluation that one line has room for."""


@dataclass(frozen=True)
class Outcome:
    """One finished run.

    Attributes:
        base, task, method: what was trained, and how.
        rows, evaluation_rows, cut, dropped, tokens: of the data; see Encoded.
        fingerprint: of the encoded training rows.
        losses, evaluation: (step, value) of what was logged; evaluation holds losses.
        metrics: of the last evaluation, by name.
        findings: the strategy's.
        steps: trained in all, resumed ones included.
        tokens_per_second: median of this process's steps but the first; None if there were too few.
        peak_mib, peak_method: see PeakMemory.
        notes: what should be looked at.
        memory: what was decided of it, and predicted; empty where nothing was.
        predicted_mib: peak of GPU memory, CUDA context and fragments included; None where nothing was predicted.
        accelerated: fastpeft.report as text; empty for plain PEFT.
        chat_template: what it is called; empty without chats.
        environment: of bench.records.
    """

    base: str
    task: str
    method: str
    rows: int
    evaluation_rows: int
    cut: int
    dropped: int
    tokens: int
    fingerprint: str
    losses: list[tuple[int, float]]
    evaluation: list[tuple[int, float]]
    metrics: dict[str, float]
    findings: Findings
    steps: int
    tokens_per_second: float | None
    peak_mib: float
    peak_method: str
    notes: list[str]
    memory: str
    predicted_mib: float | None
    accelerated: str
    chat_template: str
    environment: dict[str, Any]

    @property
    def summary(self) -> str:
        """One line."""
        parts = [f"{self.steps} steps"]
        if self.losses:
            parts.append(f"loss {self.losses[0][1]:.3f} to {self.losses[-1][1]:.3f}")
        if self.evaluation:
            parts.append(f"evaluation loss {self.evaluation[-1][1]:.3f}")
        parts += [f"{name} {value:.3f}" for name, value in self.metrics.items() if name in SHORTLY]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        return ", ".join(parts)

    def write(self, folder: Path) -> None:
        """report.md, loss.png, run.json, and a section in the model card that PEFT wrote."""
        (folder / RUN).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        (folder / REPORT).write_text(self.report(folder.resolve().name), encoding="utf-8")
        plot(self.losses, self.evaluation, folder / LOSS)
        add_to_model_card(folder, self)

    def report(self, title: str) -> str:
        """Markdown."""
        peak = "peak GPU memory" if self.peak_method.startswith("torch.cuda") else "peak memory above the loaded model"
        rate = "not measured: too few steps" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}"
        lines = [
            f"# {title}",
            "",
            f"{self.method} of `{self.base}` for {self.task}.",
            "",
            "| | |",
            "|---|---|",
            f"| steps | {self.steps} |",
            f"| training rows | {self.rows} ({self.tokens:,} tokens; {self.cut} cut, {self.dropped} left out) |",
            f"| evaluation rows | {self.evaluation_rows} |",
            f"| tokens/s | {rate} |",
            f"| {peak} | {self.peak_mib:,.0f} MiB ({self.peak_method}) |",
        ]
        if self.predicted_mib is not None:
            lines += [f"| predicted peak, with CUDA's own | {self.predicted_mib:,.0f} MiB |"]
        lines += [f"| chat template | {Path(self.chat_template).name} |"] if self.chat_template else []
        lines += [f"| evaluation: {name} | {value:.4f} |" for name, value in self.metrics.items()]
        lines += [line for note in self.notes for line in ("", f"Note: {note}.")]
        lines += self.findings.lines()
        lines += ["", "## Loss", "", f"![loss]({LOSS})", "", "| step | training | evaluation |", "|---|---|---|"]
        lines += _loss_rows(self.losses, self.evaluation)
        lines += ["", "## Memory", "", "```", self.memory, "```"] if self.memory else []
        lines += ["", "## What was accelerated", "", "```", self.accelerated or "nothing: plain PEFT", "```"]
        lines += ["", "## Environment", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_as_text(value)} |" for name, value in self.environment.items() if value]
        return "\n".join(lines) + "\n"


def _loss_rows(losses: list[tuple[int, float]], evaluation: list[tuple[int, float]], most: int = 40) -> list[str]:
    """At most about `most` training losses; the first, the last and all evaluations among them."""
    trained, evaluated = dict(losses), dict(evaluation)
    every = max(1, math.ceil(len(losses) / most))
    kept = {step for i, (step, _) in enumerate(losses) if i % every == 0 or i == len(losses) - 1}

    def cell(found: dict[int, float], step: int) -> str:
        return f"{found[step]:.4f}" if step in found else ""

    return [f"| {s} | {cell(trained, s)} | {cell(evaluated, s)} |" for s in sorted(kept | set(evaluated))]


def plot(losses: list[tuple[int, float]], evaluation: list[tuple[int, float]], path: Path) -> None:
    """Loss over steps."""
    figure_module = require("train", "matplotlib.figure", "the loss curve")
    figure = figure_module.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for points, label, style in ((losses, "training", {"linewidth": 1.4}), (evaluation, "evaluation", {"marker": "o"})):
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if losses or evaluation:
        axes.legend()
    figure.savefig(path)


def add_to_model_card(folder: Path, outcome: Outcome) -> None:
    """What was trained, on PEFT's README.md; the hub shows it."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    kind, tag = ("An (IA)³", "ia3") if outcome.method == "ia3" else ("A LoRA", "lora")
    tags = set(card.data.tags or ()) | {"fastpeft", tag}
    card.data.tags = sorted(tags)
    text = (
        f"# {folder.resolve().name}\n\n{kind} adapter of `{outcome.base}` for {outcome.task}, trained with "
        f"fastpeft and PEFT: {outcome.summary}.\n\n"
        "What came of it is in `report.md`. "
        "What it was not tested for, nobody knows: try it on your own data first.\n"
    )
    card.text = text
    card.save(folder / "README.md")


def _as_text(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
