"""transformers' Trainer for batches of several tasks, each row through its own task's adapter."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer, TrainerCallback

import fastpeft
from fastpeft.data.chat import IGNORED
from fastpeft.errors import UserError
from fastpeft.structured import build, convert

from .adapters import activate
from .balance import Memory, Weights
from .gradients import Shared, cosines
from .rows import TASK, TaskSampler

STATE = "tasks.json"
"""Beside a checkpoint's optimizer."""


@dataclass(frozen=True)
class Plan:
    """How several tasks are trained together.

    Attributes:
        adapters: the name of each task's.
        labels: number of each task's classes; empty for language models.
        weights: of the losses.
        shared: what the adapters share.
        memory: of the run.
        sampler: of the rows.
        window: steps over which losses are averaged.
        conflict_steps: steps between two entries of the conflict log; 0 for none.
        weight_rate: learning rate of learned weights.
    """

    adapters: list[str]
    labels: list[int]
    weights: Weights
    shared: Shared
    memory: Memory
    sampler: TaskSampler
    window: int = 20
    conflict_steps: int = 0
    weight_rate: float = 0.01


class MultiTaskTrainer(Trainer):
    """One forward and one backward a batch, whichever tasks its rows are of.

    The loss is the mean over rows of their weighted losses: of a language model's row, the mean over its tokens.

    Attributes:
        plan: how the tasks are trained.
    """

    def __init__(self, plan: Plan, *, task: str, accelerated: bool, **given: Any) -> None:
        """`task` is what the model is trained to do, `accelerated` whether by our ops; the rest as Trainer's."""
        self.plan, self._task, self._accelerated = plan, task, accelerated
        self._step: dict[int, list[float]] = {}
        self._logged = Memory.of(len(plan.adapters))
        given["callbacks"] = [_Epochs(plan.sampler), _Steps(self), *given["callbacks"]]
        super().__init__(**given, data_collator=collator(task, given["processing_class"], given["model"]))
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: Any = None) -> Any:
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        weights = self.plan.weights
        if made and weights.log_variances.requires_grad:
            weights.to(self.args.device)
            group = {"params": [weights.log_variances], "lr": self.plan.weight_rate, "weight_decay": 0.0}
            optimizer.add_param_group(group)
        return optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        with self._mixed(inputs):  # backward too: checkpointed layers run again in it
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._combine()
        return loss

    def prediction_step(self, model: Any, inputs: Any, *others: Any, **options: Any) -> Any:
        with self._mixed(inputs):
            return super().prediction_step(model, inputs, *others, **options)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        tasks, labels = inputs.pop(TASK), inputs.pop("labels")
        if self._task == "sequence-classification":
            outputs = model(**inputs)
            losses = self._class_losses(outputs.logits, labels, tasks)
        else:
            if model.training and self._accelerated:
                inputs["labels"] = torch.full_like(labels, IGNORED)  # a head with labels makes no logits
            outputs = model(**inputs)
            losses = token_losses(outputs.logits, labels, shifted=self._task == "causal-lm")
        if model.training:
            self._note(losses.detach(), tasks)
        loss = self.plan.weights(losses, tasks, self.plan.memory)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With each task's mean loss since the last time."""
        if "loss" in logs:
            logged = self._logged
            for name, total, count in zip(self.plan.adapters, logged.sums, logged.counts, strict=True):
                if count:
                    logs[f"loss_{name}"] = round(total / count, 6)
            self._logged = Memory.of(len(self.plan.adapters))
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.plan.sampler

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = {"memory": self.plan.memory.to_dict(), "log_variances": self.plan.weights.log_variances.tolist()}
        (Path(output_dir) / STATE).write_text(json.dumps(state), encoding="utf-8")

    def recall(self, checkpoint: Path) -> None:
        """Go on from what was remembered. Raises UserError for what does not fit the run's tasks."""
        path, values = checkpoint / STATE, self.plan.weights.log_variances
        try:
            state = convert(dict[str, Any], json.loads(path.read_text(encoding="utf-8")), "state")
            memory = build(Memory, state.get("memory"), "memory")
            log_variances = convert(list[float], state.get("log_variances"), "log_variances")
            by_task = (memory.rows, memory.sums, memory.counts, *memory.windows, log_variances)
            if {len(figures) for figures in by_task} != {len(values)}:
                raise ValueError(f"expected figures of {len(values)} tasks, got others")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"--resume: {path} cannot be read: {error}") from error
        vars(self.plan.memory).update(state["memory"])
        with torch.no_grad():
            values.copy_(torch.tensor(log_variances))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """All adapters, where Trainer's own has the first one trained alone, and what was remembered."""
        self._load_adapters(self.model if model is None else model, Path(resume_from_checkpoint))
        self.recall(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """All adapters, where Trainer's own looks for the first one in another place."""
        self._load_adapters(self.model, Path(self.state.best_model_checkpoint or ""))

    def _load_adapters(self, model: Any, checkpoint: Path) -> None:
        for name in self.plan.adapters:
            model.load_adapter(str(checkpoint / name), name, is_trainable=True)
        activate(model, self.plan.adapters)

    def _mixed(self, inputs: Any) -> Any:
        return fastpeft.mixed_batch(self.model, [self.plan.adapters[task] for task in inputs[TASK].tolist()])

    def _class_losses(self, logits: Tensor, labels: Tensor, tasks: Tensor) -> Tensor:
        losses = torch.zeros(len(labels), device=logits.device)
        for task in tasks.unique().tolist():
            rows = (tasks == task).nonzero().flatten()
            found = functional.cross_entropy(
                logits[rows, : self.plan.labels[task]].float(), labels[rows], reduction="none"
            )
            losses = losses.index_put((rows,), found)
        return losses

    def _note(self, losses: Tensor, tasks: Tensor) -> None:
        for task, loss in zip(tasks.tolist(), losses.tolist(), strict=True):
            self._step.setdefault(task, []).append(loss)

    def _scale(self) -> float:
        """What fp16's gradients are still multiplied by; Nash-MTL's weights depend on their length."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _combine(self) -> None:
        """What becomes of the step's gradients, and what is remembered of its losses."""
        plan, memory = self.plan, self.plan.memory
        means = {task: (sum(found) / len(found), len(found)) for task, found in sorted(self._step.items())}
        self._step = {}
        step = self.state.global_step + 1
        logs = plan.conflict_steps > 0 and (step == 1 or step % plan.conflict_steps == 0)
        present = list(means)
        gramian = None
        if plan.shared.count and len(present) > 1 and (logs or plan.shared.surgery != "sum"):
            gramian = plan.shared.gramian(present) / self._scale() ** 2
        plan.shared.combine(present, gramian)
        if logs:
            memory.weights.append([step, *plan.weights.now(memory).tolist()])
        if logs and gramian is not None:
            found = cosines(gramian).tolist()
            memory.conflicts += [
                [step, one, other, found[i][j]]
                for i, one in enumerate(present)
                for j, other in enumerate(present)
                if i < j and found[i][j] == found[i][j]
            ]
        memory.note(means)
        self._logged.note(means)
        if step % plan.window == 0:
            memory.close_window()


def token_losses(logits: Tensor, labels: Tensor, *, shifted: bool) -> Tensor:
    """Each row's mean loss over the tokens that it learns.

    Args:
        logits: (rows, tokens, words).
        labels: (rows, tokens), IGNORED where nothing is learned.
        shifted: whether a place's label is the token before it, as a decoder's is.
    """
    if shifted:
        labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    found = functional.cross_entropy(
        logits.view(-1, logits.shape[-1]).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return found.view(labels.shape).sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def collator(task: str, tokenizer: Any, model: Any) -> Any:
    """Pads the rows of a batch; rows that say so keep their task."""
    inner: Any
    if task == "sequence-classification":
        inner = DataCollatorWithPadding(tokenizer)
    elif task == "seq2seq-lm":
        inner = DataCollatorForSeq2Seq(tokenizer, model=model.get_base_model())
    else:
        tokenizer = copy.copy(tokenizer)
        tokenizer.padding_side = "right"
        inner = DataCollatorForSeq2Seq(tokenizer)  # pads labels too

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        tasks = [row[TASK] for row in rows if TASK in row]
        batch = dict(inner([{name: value for name, value in row.items() if name != TASK} for row in rows]))
        return batch | ({TASK: torch.tensor(tasks)} if tasks else {})

    return collate


class _Epochs(TrainerCallback):
    def __init__(self, sampler: TaskSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._sampler.epoch = int(state.epoch or 0)


class _Steps(TrainerCallback):
    """What is done after each step of the optimizer."""

    def __init__(self, trainer: MultiTaskTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.plan.shared.follow()
        self._trainer.plan.weights.zero_grad()  # Trainer clears the model's gradients alone
