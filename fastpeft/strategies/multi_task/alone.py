"""Each task trained by itself, on as many rows, to tell whether the others helped or hurt it."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from fastpeft.config import LoraSection
from fastpeft.metrics.findings import Findings, Metric, Section
from fastpeft.structured import build
from fastpeft.training.folder import ALONE
from fastpeft.training.loading import trained_in_float32
from fastpeft.training.optimizers import chosen_optimizer, set_optimizer
from fastpeft.training.preparing import Prepared

from .adapters import activate, add, only, size_head
from .balance import Memory, Weights
from .gradients import Shared
from .measured import Measured, difference, figure, measure, value, verdict
from .rows import TaskSampler, together
from .trainer import MultiTaskTrainer, Plan

NAME = "alone"
"""Of the adapter, while it is there."""


@dataclass(frozen=True)
class Alone:
    """One task by itself.

    Attributes:
        wanted: rows that it was to be trained on.
        steps, rows: that it was trained for, and on.
        measured: of `measured.measure`.
    """

    wanted: int
    steps: int
    rows: int
    measured: Measured


def train_alone(trainer: MultiTaskTrainer, prepared: Prepared, section: LoraSection, rows: int) -> Alone:
    """Train a fresh adapter on the same base, and measure it; the base's other adapters stay as they are.

    Args:
        trainer: of the run, whose other settings this one has; its learning rate falls over fewer steps.
        prepared: the task.
        section: `lora` of the adapter.
        rows: how many to train on; rounded to whole steps.
    """
    model, args = trainer.model, trainer.args
    task, name, seed = prepared.config.model.task, prepared.config.training.optim, args.seed
    labels = prepared.config.data.labels or []
    step_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    arguments = copy.copy(args)
    arguments.max_steps = max(1, round(rows / step_rows))
    arguments.save_strategy, arguments.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    arguments.load_best_model_at_end, arguments.report_to, arguments.push_to_hub = False, [], False
    add(model, NAME, section, task, seed)
    size_head(model, NAME, task, labels, seed)
    activate(model, [NAME])
    try:
        trained_in_float32(model)
        plan = Plan(
            adapters=[NAME],
            labels=[len(labels)],
            weights=Weights([1.0], "equal"),
            shared=Shared([]),
            memory=Memory.of(1),
            sampler=TaskSampler([len(prepared.rows)], seed, None),
        )
        optimizer = chosen_optimizer(name, arguments, model)
        single = MultiTaskTrainer(
            plan,
            task=task,
            accelerated=prepared.config.acceleration.enabled,
            model=model,
            args=arguments,
            train_dataset=together([prepared.rows], [0]).rows,
            processing_class=trainer.processing_class,
            callbacks=[],
        )
        single.remove_callback(PrinterCallback)
        set_optimizer(single, name, optimizer)
        single.train()
        with only(model, NAME):
            return Alone(rows, single.state.global_step, plan.memory.rows[0], measure(prepared, trainer))
    finally:
        model.delete_adapter(NAME)
        activate(model, trainer.plan.adapters)


def read(folder: Path) -> dict[str, Alone]:
    """What a run that is resumed had finished, by task; nothing where the file was not written to its end."""
    try:
        found = json.loads((folder / ALONE).read_text(encoding="utf-8"))
        return {task: build(Alone, given, task) for task, given in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def write(found: dict[str, Alone], folder: Path) -> None:
    """For `read`."""
    text = json.dumps({task: asdict(one) for task, one in found.items()})
    (folder / ALONE).write_text(text, encoding="utf-8")


def transfer(
    tasks: dict[str, Prepared], joint: dict[str, Measured], alone: dict[str, Alone], rows: dict[str, int]
) -> Findings:
    """What the tasks gained or lost by being trained together.

    Args:
        tasks: those that were measured, and
        joint: what was measured of them after training together, and
        alone: by themselves.
        rows: of each task, trained on together.
    """
    metrics: list[Metric] = []
    lines = [
        "| task | rows together | alone | figure | together | alone | difference (95 % interval) | together is |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, prepared in tasks.items():
        single = alone[name]
        metric = difference(name, prepared, single.measured, joint[name], "trained alone")
        metrics.append(metric)
        lines.append(
            f"| {name} | {rows[name]:,} | {single.rows:,} in {single.steps} steps | {figure(prepared)[0]} | "
            f"{value(prepared, joint[name]):.4f} | {value(prepared, single.measured):.4f} | "
            f"{metric.value:+.4f} ({metric.low:+.4f} to {metric.high:+.4f}) | {verdict(metric)} |"
        )
    worse = [metric.name.split(": ")[0] for metric in metrics if verdict(metric) == "worse"]
    lines += [
        "",
        "Each task alone had a fresh adapter of the same rank, the same seed and rate, batches as large, and as many "
        "rows. A row is compared with itself; the interval is over rows, of one training each: another seed may say "
        "otherwise.",
    ]
    notes = [f"negative transfer: {name} is worse than trained alone, on the same rows" for name in worse]
    return Findings(tuple(metrics), tuple(notes), (Section("Together and alone", "\n".join(lines)),))
