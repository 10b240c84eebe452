"""One fine-tuning with transformers' Trainer, and what is measured of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from .loading import autocast
from .memory import MIB, PeakMemory, bytes_kept_for_backward
from .settings import Settings

if TYPE_CHECKING:
    from .channel import Channel

UNTIMED_STEPS = 1
"""The first step is not timed: memory is fetched from the system then, and kernels are chosen."""


@dataclass(frozen=True)
class Training:
    """One fine-tuning.

    Attributes:
        losses: of every step.
        step_seconds: forward, backward and optimizer of every timed step.
        peak_mib, peak_method: see PeakMemory.
        kept_mib: see bytes_kept_for_backward.
        perplexity_before, perplexity_after: on the held-out text.
        threads: of torch.
    """

    losses: list[float]
    step_seconds: list[float]
    peak_mib: float
    peak_method: str
    kept_mib: float
    perplexity_before: float
    perplexity_after: float
    threads: int


def fine_tune(
    model: Any,
    blocks: list[dict[str, Tensor]],
    held_out: list[dict[str, Tensor]],
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    channel: Channel,
) -> Training:
    """Measure, train, measure again; the model is afterwards a trained one."""
    channel.status("held-out perplexity before")
    before = perplexity(model, held_out, settings.batch_size, device, dtype)
    clock = StepClock(channel, device)
    trainer = Trainer(
        model=model,
        args=training_arguments(settings, device, dtype),
        train_dataset=blocks,  # type: ignore[arg-type]
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    channel.status("training")
    with PeakMemory(device) as peak:
        trainer.train()
    channel.status("held-out perplexity after")
    after = perplexity(model, held_out, settings.batch_size, device, dtype)
    return Training(
        losses=clock.losses,
        step_seconds=clock.seconds[UNTIMED_STEPS:],
        peak_mib=peak.mib,
        peak_method=peak.method,
        kept_mib=_kept_mib(model, blocks, settings, device, dtype),
        perplexity_before=before,
        perplexity_after=after,
        threads=torch.get_num_threads(),
    )


def training_arguments(settings: Settings, device: torch.device, dtype: torch.dtype) -> TrainingArguments:
    """Trainer's usual arguments; each step is logged, nothing is saved on the way."""
    return TrainingArguments(
        output_dir=settings.output,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=min(10, settings.steps // 10),
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )


class StepClock(TrainerCallback):
    """Time and loss of each step."""

    def __init__(self, channel: Channel, device: torch.device) -> None:
        self.channel, self.device = channel, device
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._wait()
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._wait()
        self.seconds.append(time.perf_counter() - self._start)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.channel.step(state.global_step, state.max_steps, self.losses[-1])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.no_grad()
def perplexity(
    model: Any, blocks: list[dict[str, Tensor]], batch_size: int, device: torch.device, dtype: torch.dtype
) -> float:
    """exp of the mean negative log-likelihood of all tokens but each block's first."""
    was_training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(blocks), batch_size):
        batch = _batch(blocks[start : start + batch_size], device)
        with autocast(device, dtype):
            total += model(**batch, use_cache=False).loss.item() * len(batch["input_ids"])
    model.train(was_training)
    return math.exp(total / len(blocks))


def _kept_mib(
    model: Any, blocks: list[dict[str, Tensor]], settings: Settings, device: torch.device, dtype: torch.dtype
) -> float:
    batch = _batch((blocks * settings.batch_size)[: settings.batch_size], device)
    model.train()

    def forward() -> Tensor:
        with autocast(device, dtype):
            loss: Tensor = model(**batch, use_cache=False).loss
            return loss

    return bytes_kept_for_backward(model, forward) / MIB


def _batch(blocks: list[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.stack([block[name] for block in blocks]).to(device) for name in blocks[0]}
