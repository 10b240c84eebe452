"""The trainer of a peer, whose steps are timed and whose losses are kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .case import FinetuneCase
from .loading import Source, tokenizer
from .peers import Peer
from .rows import backwards, make_rows


class Log(NamedTuple):
    """What a training leaves: losses as tensors, milliseconds a step, and when its first step was done."""

    losses: list[Tensor]
    ms: list[float]
    first: list[float]


def make_trainer(
    case: FinetuneCase,
    source: Source,
    peer: Peer,
    model: Any,
    steps: int,
    folder: str,
    gate: Callable[[float], None] | None,
) -> tuple[Any, Log]:
    """transformers' Trainer or TRL's SFTTrainer, and the log that it writes.

    Args:
        steps: how many it may make.
        folder: that the trainer may use.
        gate: waits until the next step may begin; told the milliseconds of the one before, 0 at first.
    """
    columns = make_rows(source.task, source.words, steps * case.rows, case.tokens)
    if peer.backwards:
        columns = backwards(columns, case.rows)
    arguments = _arguments(case, peer, steps, folder)
    if peer.sft:
        trainer = _sft(model, arguments, columns, peer.without_metrics)
    else:
        from transformers import Trainer, default_data_collator

        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer._get_train_sampler = lambda rows=None: torch.utils.data.SequentialSampler(trainer.train_dataset)
    log = Log([], [], [])
    trainer.training_step = _keeping(trainer.training_step, log.losses)
    trainer.add_callback(_clock(case.device, log, gate))
    return trainer, log


def _arguments(case: FinetuneCase, peer: Peer, steps: int, folder: str) -> Any:
    given: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": case.rows,
        "gradient_accumulation_steps": 1,  # this and the next two as transformers has them, where Unsloth does not
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "seed": 0,
        "bf16": case.dtype == "bfloat16" and not peer.exact,
        "fp16": case.dtype == "float16" and not peer.exact,
        "gradient_checkpointing": case.checkpointing,
        "use_cpu": case.device == "cpu",
        "dataloader_pin_memory": case.device == "cuda",
        "torch_compile": peer.compiled,
        "use_liger_kernel": peer.liger,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "label_names": ["labels"],
    }
    if peer.unsloth:  # no row is padded, and its own default compiles no layer then
        given |= {"padding_free": False, "torch_empty_cache_steps": None}
    elif case.checkpointing:
        given["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if peer.sft:
        from trl import SFTConfig

        return SFTConfig(**given, max_length=case.tokens, dataset_kwargs={"skip_prepare_dataset": True})
    from transformers import TrainingArguments

    return TrainingArguments(**given)


def _sft(model: Any, arguments: Any, columns: dict[str, Tensor], without_metrics: bool) -> Any:
    from datasets import Dataset
    from transformers import Trainer
    from trl import SFTTrainer

    from fastpeft.training.trainers import dtypes_kept

    rows = Dataset.from_dict({name: columns[name].tolist() for name in ("input_ids", "labels")})

    class WithoutMetrics(SFTTrainer):  # type: ignore[misc]
        compute_loss = Trainer.compute_loss

    kind = WithoutMetrics if without_metrics else SFTTrainer
    with dtypes_kept(model):
        return kind(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer())


def _keeping(step: Callable[..., Tensor], losses: list[Tensor]) -> Callable[..., Tensor]:
    def kept(*given: Any, **named: Any) -> Tensor:
        loss = step(*given, **named)
        losses.append(loss.detach().clone())
        return loss

    return kept


def _clock(device: str, log: Log, gate: Callable[[float], None] | None) -> Any:
    from transformers import TrainerCallback

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    class Clock(TrainerCallback):  # type: ignore[misc]
        """A step from its batch on the CPU to its optimizer's end; or with a gate no more than that."""

        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if gate:
                gate(log.ms[-1] if log.ms else 0.0)
            if gate or not log.ms:
                wait()
                self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait()
            now = time.perf_counter()
            log.ms.append((now - self.started) * 1e3)
            self.started = now  # the next step's time holds what the trainer does between the two
            if len(log.ms) == 1:
                log.first.append(time.time())

    return Clock()
