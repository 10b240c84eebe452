"""What came of a training run, from its trainer when the last step is done."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastpeft.config import FastpeftConfig
from fastpeft.metrics.findings import Findings
from fastpeft.training.outcome import Outcome
from fastpeft.training.preparing import Prepared

if TYPE_CHECKING:
    import torch

    from fastpeft.bench.memory import PeakMemory


def outcome_of(
    prepared: Prepared,
    model: Any,
    trainer: Any,
    findings: Findings,
    *,
    fingerprint: str,
    tokens_per_second: float | None,
    peak: PeakMemory,
    notes: list[str],
    device: torch.device,
) -> Outcome:
    """The run's outcome.

    Args:
        prepared: what it was trained on.
        model: the trained PEFT model.
        trainer: after its last step.
        findings: the strategy's.
        fingerprint, tokens_per_second: as in `Outcome`.
        peak: of the training.
        notes: of the run; the strategy's come after them.
        device: that the model is on.
    """
    import fastpeft
    from fastpeft.bench.records import environment

    config, rows, memory, log = prepared.config, prepared.rows, prepared.memory, trainer.state.log_history
    return Outcome(
        base=config.model.name,
        task=config.model.task,
        method=_method(model, config),
        rows=len(rows),
        evaluation_rows=0 if prepared.evaluation is None else len(prepared.evaluation),
        cut=rows.cut,
        dropped=rows.dropped,
        tokens=rows.tokens,
        fingerprint=fingerprint,
        losses=[(entry["step"], entry["loss"]) for entry in log if "loss" in entry],
        evaluation=[(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry],
        metrics=_metrics(log),
        findings=findings,
        steps=trainer.state.global_step,
        tokens_per_second=tokens_per_second,
        peak_mib=peak.mib,
        peak_method=peak.method,
        notes=[*notes, *findings.notes],
        memory=memory.report,
        predicted_mib=None if memory.plan is None else memory.plan.need.total / 2**20,
        accelerated=str(fastpeft.report(model)) if config.acceleration.enabled else "",
        chat_template=prepared.chat_template,
        environment=asdict(environment(device.type)),
    )


def _method(model: Any, config: FastpeftConfig) -> str:
    """What was trained: a strategy may have taken another kind of adapter than LoRA."""
    kinds = {str(adapter.peft_type.value) for adapter in model.peft_config.values()}
    return "ia3" if kinds == {"IA3"} else config.method


def _metrics(log: list[dict[str, Any]]) -> dict[str, float]:
    """Of the last evaluation, without times and counts."""
    found: dict[str, Any] = next((entry for entry in reversed(log) if "eval_loss" in entry), {})
    unwanted = ("per_second", "runtime", "num_tokens")
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in found.items()
        if name.startswith("eval_") and isinstance(value, (int, float)) and not any(u in name for u in unwanted)
    }
