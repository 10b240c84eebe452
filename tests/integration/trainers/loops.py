"""One function a trainer: trains the model for a few steps, as its users do, and gives the losses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.integration.models import VOCABULARY, batch, with_lora
from tests.integration.test_trainers import plain_arguments, tokenizer
from tests.integration.trainers.runs import losses_of

STEPS = 3
TEMPLATE = "{% for m in messages %}{{ 'w4 ' + m['content'] + ' w5 ' }}{% endfor %}"
WORDS = [f"w{i}" for i in range(4, VOCABULARY)]


def rows(model: Any, count: int = 12) -> list[dict[str, Tensor]]:
    """The same for every copy of a model."""
    torch.manual_seed(7)
    whole = batch(model, rows=count)
    return [{name: value[i] for name, value in whole.items()} for i in range(count)]


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    """Adam without its division by next to nothing, which enlarges single roundings until no budget holds."""
    return plain_arguments(folder, max_steps=STEPS, logging_steps=1, adam_epsilon=1e-3, **options)


def texts(count: int, words: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(WORDS), (count, words), generator=generator)
    return [" ".join(WORDS[i] for i in row) for row in drawn.tolist()]


# transformers


def transformers_trainer(model: Any, folder: Path, **options: Any) -> list[float]:
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(model, TrainingArguments(**settings(folder, **options)), train_dataset=rows(model))
    trainer.train()
    return losses_of(trainer)


def seq2seq_trainer(model: Any, folder: Path, **options: Any) -> list[float]:
    """Evaluates by generating, after each step."""
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    given = settings(folder, eval_strategy="steps", eval_steps=1, predict_with_generate=True, **options)
    data = rows(model)
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(**given, generation_max_length=5),
        train_dataset=data,
        eval_dataset=data[:2],
        data_collator=DataCollatorForSeq2Seq(tokenizer(), model=model),
    )
    trainer.train()
    return losses_of(trainer)


# TRL


def sft(model: Any, folder: Path, **options: Any) -> list[float]:
    from trl import SFTConfig, SFTTrainer

    return _trl(SFTTrainer, SFTConfig, model, {"text": texts(12, 9, 0)}, folder, max_length=12, **options)


def dpo(model: Any, folder: Path, **options: Any) -> list[float]:
    from trl import DPOConfig, DPOTrainer

    return _trl(DPOTrainer, DPOConfig, model, _preferences(), folder, **options)


def kto(model: Any, folder: Path, **options: Any) -> list[float]:
    from trl import KTOConfig, KTOTrainer

    data = {"prompt": texts(12, 4, 0), "completion": texts(12, 5, 1), "label": [True, False, False] * 4}
    return _trl(KTOTrainer, KTOConfig, model, data, folder, **options)


def grpo(model: Any, folder: Path, **options: Any) -> list[float]:
    from trl import GRPOConfig, GRPOTrainer

    given = {"num_generations": 2, "max_completion_length": 6, "reward_funcs": _reward, "beta": 0.1, **options}
    return _trl(GRPOTrainer, GRPOConfig, model, {"prompt": texts(12, 4, 0)}, folder, **given)


def rloo(model: Any, folder: Path, **options: Any) -> list[float]:
    from trl import RLOOConfig, RLOOTrainer

    given = {"num_generations": 2, "max_completion_length": 6, "reward_funcs": _reward, "num_iterations": 2, **options}
    return _trl(RLOOTrainer, RLOOConfig, model, {"prompt": texts(12, 4, 0)}, folder, **given)


def scored(base: Any) -> Any:
    """For `reward`: the decoder with a head of one number, trained beside LoRA."""
    from transformers import LlamaForSequenceClassification

    config = copy.deepcopy(base.config)
    config.num_labels = 1
    classifier = LlamaForSequenceClassification(config)
    classifier.model.load_state_dict(base.model.state_dict())
    return with_lora(classifier, "SEQ_CLS").train()


def reward(model: Any, folder: Path, **options: Any) -> list[float]:
    from trl import RewardConfig, RewardTrainer

    return _trl(RewardTrainer, RewardConfig, model, _preferences(), folder, **options)


def distillation(model: Any, folder: Path, *, teacher: Any, **options: Any) -> list[float]:
    from trl import DistillationConfig, DistillationTrainer

    given = {"max_completion_length": 6, "beta": 0.5, "teacher_model": teacher, **options}
    return _trl(DistillationTrainer, DistillationConfig, model, {"prompt": texts(12, 4, 0)}, folder, **given)


def gkd(model: Any, folder: Path, *, teacher: Any, **options: Any) -> list[float]:
    """From TRL's experimental part: on a given answer or one of the student's own, by its own draw."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    pairs = zip(texts(12, 4, 0), texts(12, 5, 1), strict=True)
    talk = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    given = {"max_new_tokens": 6, "lmbda": 0.5, "teacher_model": teacher, **options}
    return _trl(GKDTrainer, GKDConfig, model, {"messages": talk}, folder, **given)


def _preferences() -> dict[str, list[str]]:
    return {"prompt": texts(12, 4, 0), "chosen": texts(12, 5, 1), "rejected": texts(12, 4, 2)}


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split())) + sum(map(ord, text)) % 7) for text in completions]


def _trl(kind: Any, config: Any, model: Any, data: dict[str, list[Any]], folder: Path, **options: Any) -> list[float]:
    from datasets import Dataset

    words = tokenizer()
    words.chat_template = TEMPLATE
    named = {name: options.pop(name) for name in ("reward_funcs", "teacher_model") if name in options}
    trainer = kind(
        model,
        args=config(**settings(folder, **options)),
        train_dataset=Dataset.from_dict(data),
        processing_class=words,
        **named,
    )
    trainer.train()
    return losses_of(trainer)


# loops


def plain_loop(model: Any, folder: Path, **options: Any) -> list[float]:
    optimizer = adamw(model)
    losses = []
    for given in DataLoader(rows(model), batch_size=4):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fp16_loop(model: Any, folder: Path) -> list[float]:
    """Autocast in fp16, the loss scaled up and the gradients down again."""
    optimizer, scaler, losses = adamw(model), torch.amp.GradScaler("cpu", init_scale=2.0**10), []
    for given in DataLoader(rows(model), batch_size=4):
        with torch.autocast("cpu", torch.float16):
            loss = model(**given).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 10.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def accelerate_loop(model: Any, folder: Path, *, mixed_precision: str = "no", accumulate: int = 2) -> list[float]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=accumulate)
    loader = DataLoader(rows(model), batch_size=2)
    prepared, optimizer, loader = accelerator.prepare(model, adamw(model), loader)
    losses = []
    for given in loader:
        with accelerator.accumulate(prepared):
            loss = prepared(**given).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.unwrap_model(prepared)
    return losses


def lightning(model: Any, folder: Path, *, precision: str = "32-true", accumulate: int = 1) -> list[float]:
    from lightning import LightningModule, Trainer

    losses = []

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, given: dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(**given).loss
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.model)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", precision=precision, accumulate_grad_batches=accumulate,
        default_root_dir=folder, enable_model_summary=False, **quiet,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(rows(model), batch_size=4))
    return losses


def compiled_loop(model: Any, folder: Path) -> list[float]:
    torch._dynamo.reset()
    losses = plain_loop(torch.compile(model, backend="aot_eager"), folder)
    torch._dynamo.reset()
    return losses


def adamw(model: Any) -> torch.optim.Optimizer:
    """As in `settings`."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)
