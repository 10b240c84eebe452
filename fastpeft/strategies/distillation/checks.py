"""What rows and model must have for what the options ask."""

from __future__ import annotations

from dataclasses import replace

from fastpeft.config import FastpeftConfig
from fastpeft.data.labels import SINGLE
from fastpeft.errors import UserError
from fastpeft.training.evaluating import exchange
from fastpeft.training.preparing import Prepared

from .options import DistillationOptions


def check_rows(prepared: Prepared, options: DistillationOptions) -> None:
    """Raise UserError for rows that a teacher's logits cannot be stored for, or that have no prompts where wanted."""
    config, rows = prepared.config, prepared.rows.rows
    task, packing = config.model.task, config.data.packing
    if config.data.problem_type not in (None, SINGLE):
        expected = "distillation expected one class a text"
        raise UserError(f"strategy.name: {expected}, got data.problem_type {config.data.problem_type}")
    if options.top_k and "labels" not in rows.column_names:
        raise UserError(
            f"strategy.options.top_k: expected 0 for texts under task {task}, whose masks or spans are others in each "
            f"epoch, got {options.top_k}"
        )
    if options.top_k and packing:
        raise UserError("data.packing: expected false with strategy.options.top_k, got true")
    if not options.on_policy:
        return
    if task != "causal-lm" or packing:
        got = "data.packing true" if packing else f"task {task}"
        raise UserError(f"strategy.options.on_policy: expected 0 but for decoders without packing, got it with {got}")
    if any(exchange(row, task) is None for row in rows):
        raise UserError(
            "strategy.options.on_policy: expected rows with a prompt and an answer to it (prompt + completion, or "
            "chats), got some without"
        )


def seeing_attentions(config: FastpeftConfig, options: DistillationOptions) -> FastpeftConfig:
    """With the implementation that gives attention probabilities, where these are matched.

    Raises:
        UserError: another one was asked for, or a model whose inner states are not matched.
    """
    if options.matches and config.model.task == "seq2seq-lm":
        name = "hidden_weight" if options.hidden_weight else "attention_weight"
        raise UserError(f"strategy.options.{name}: expected 0 for task seq2seq-lm, got {getattr(options, name)}")
    if not options.attention_weight:
        return config
    if config.model.attention not in (None, "eager"):
        raise UserError(
            "model.attention: expected eager or null with strategy.options.attention_weight, because no other one "
            f"gives probabilities, got {config.model.attention!r}"
        )
    return replace(config, model=replace(config.model, attention="eager"))
