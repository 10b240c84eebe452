"""Each task's data, read and encoded by itself, and what of it must be alike."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from fastpeft.config import DataSection, FastpeftConfig
from fastpeft.data.checks import leak_notes
from fastpeft.data.labels import SINGLE
from fastpeft.errors import UserError
from fastpeft.training.preparing import Prepared, prepare

from .rows import together

SERVED = ("sequence-classification", "causal-lm", "seq2seq-lm")
ALIKE = ("chat_template", "eos_token", "source_language", "target_language")
"""What is set on a tokenizer, of which there is one."""


def prepare_tasks(config: FastpeftConfig, sections: dict[str, DataSection], console: Console) -> dict[str, Prepared]:
    """Each task as a run of its own would have it.

    Raises:
        UserError: as `prepare`, with the task's name before; or tasks that cannot be trained by one model.
    """
    found = {}
    for name, section in sections.items():
        if section.packing:
            raise UserError(f"strategy.options.tasks.{name}.packing: expected false, got true")
        try:
            found[name] = prepare(replace(config, data=section), console)
        except UserError as error:
            raise UserError(f"strategy.options.tasks.{name}: {error}") from error
    kinds = {name: prepared.config.model.task for name, prepared in found.items()}
    if len(set(kinds.values())) > 1:
        got = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise UserError(f"strategy.options.tasks: expected tasks for one kind of head (model.task), got {got}")
    for name, prepared in found.items():
        _check(name, prepared)
    for key in ALIKE:
        values = {name: value for name, p in found.items() if (value := getattr(p.config.data, key)) is not None}
        if len(set(values.values())) > 1:
            got = ", ".join(f"{name} {value!r}" for name, value in values.items())
            raise UserError(f"strategy.options.tasks: expected one {key} for all tasks, got {got}")
    return found


def _check(name: str, prepared: Prepared) -> None:
    kind, data = prepared.config.model.task, prepared.config.data
    where = f"strategy.options.tasks.{name}"
    if kind not in SERVED:
        raise UserError(f"strategy.name: multi-task expected task {' or '.join(SERVED)}, got {kind}")
    if kind == "sequence-classification" and data.problem_type != SINGLE:
        raise UserError(f"{where}.problem_type: expected {SINGLE}, got {data.problem_type}")
    if "labels" not in prepared.rows.rows.column_names:
        raise UserError(f"{where}: expected prompts and completions for {kind} under multi-task, got texts alone")


def check_one_head(tasks: dict[str, Prepared]) -> None:
    """Raise UserError unless all tasks have the same classes, as a head for all of them needs."""
    labels = {name: prepared.config.data.labels for name, prepared in tasks.items()}
    (first, wanted), *others = labels.items()
    if wanted is None:
        kind = next(iter(tasks.values())).config.model.task
        raise UserError(
            f"strategy.options.head: expected per-task for task {kind}, whose head no task trains, got shared"
        )
    for name, found in others:
        if found != wanted:
            raise UserError(
                f"strategy.options.head: shared expected the same labels in the same order, got {_joined(wanted)} for "
                f"{first}, {_joined(found)} for {name}; data.labels gives them"
            )


def one_of(config: FastpeftConfig, tasks: dict[str, Prepared]) -> Prepared:
    """All tasks as one run: their rows, one tokenizer, and a configuration that names everything."""
    first = next(iter(tasks.values()))
    speaks = next((prepared for prepared in tasks.values() if prepared.chat_template), first)
    numbered = list(enumerate(tasks.values()))
    rows = together([prepared.rows for _, prepared in numbered], [number for number, _ in numbered])
    held = [(number, prepared.evaluation) for number, prepared in numbered if prepared.evaluation is not None]
    evaluation = together([part for _, part in held], [number for number, _ in held]) if held else None
    data = replace(
        config.data,
        labels=first.config.data.labels,
        problem_type=first.config.data.problem_type,
        max_length=max(prepared.config.data.max_length or 0 for prepared in tasks.values()),
        eos_token=speaks.config.data.eos_token,
        chat_template=speaks.config.data.chat_template,
    )
    given = {name: asdict(prepared.config.data) for name, prepared in tasks.items()}
    options: dict[str, Any] = config.strategy.options | {"tasks": given}
    resolved = replace(first.config, data=data, strategy=replace(config.strategy, options=options))
    notes = [f"{name}: {note}" for name, prepared in tasks.items() for note in (*prepared.notes, *_leaks(prepared))]
    return Prepared(resolved, speaks.tokenizer, rows, evaluation, speaks.chat_template, notes)


def _leaks(prepared: Prepared) -> list[str]:
    return leak_notes(prepared.rows, prepared.evaluation, prepared.config.model.task)


def _joined(labels: list[str] | None) -> str:
    return ", ".join(labels or [])
