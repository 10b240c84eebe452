"""One fine-tuning with transformers' Trainer, and what is measured of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from ..bench.kept import bytes_kept
from ..bench.memory import MIB, PeakMemory
from ..models.devices import autocast
from .loading import Loaded
from .outcome import Run
from .settings import Settings

if TYPE_CHECKING:
    from .channel import Channel
    from .packing import Blocks

UNTIMED_STEPS = 1
"""The first step is not timed: memory is fetched from the system then, and kernels are chosen."""


def fine_tune(loaded: Loaded, settings: Settings, channel: Channel) -> Run:
    """Measure, train, measure again; the model is afterwards a trained one."""
    channel.status("held-out perplexity before")
    before = perplexity(loaded, settings.batch_size)
    clock = StepClock(channel, loaded.device)
    trainer = Trainer(
        model=loaded.model,
        args=training_arguments(settings, loaded.device, loaded.dtype),
        train_dataset=loaded.blocks,  # type: ignore[arg-type]
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    channel.status("training")
    with PeakMemory(loaded.device) as peak:
        trainer.train()
    channel.status("held-out perplexity after")
    after = perplexity(loaded, settings.batch_size)
    return Run(
        losses=clock.losses,
        step_seconds=clock.seconds[UNTIMED_STEPS:],
        peak_mib=peak.mib,
        peak_method=peak.method,
        kept_mib=kept_mib(loaded, settings.batch_size),
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
def perplexity(loaded: Loaded, batch_size: int) -> float:
    """exp of the mean negative log-likelihood of all held-out tokens but each block's first."""
    model, blocks = loaded.model, loaded.held_out
    was_training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(blocks), batch_size):
        batch = _batch(blocks[start : start + batch_size], loaded.device)
        with autocast(loaded.device, loaded.dtype):
            total += model(**batch, use_cache=False).loss.item() * len(batch["input_ids"])
    model.train(was_training)
    return float(torch.tensor(total / len(blocks), dtype=torch.float64).exp())  # infinite rather than an error


def kept_mib(loaded: Loaded, batch_size: int) -> float:
    """See bytes_kept_for_backward; of a training step's forward."""
    batch = _batch((loaded.blocks * batch_size)[:batch_size], loaded.device)
    loaded.model.train()

    def forward() -> Tensor:
        with autocast(loaded.device, loaded.dtype):
            loss: Tensor = loaded.model(**batch, use_cache=False).loss
            return loss

    return bytes_kept(loaded.model, forward) / MIB


def _batch(blocks: Blocks, device: torch.device) -> dict[str, Tensor]:
    return {name: torch.stack([block[name] for block in blocks]).to(device) for name in blocks[0]}
