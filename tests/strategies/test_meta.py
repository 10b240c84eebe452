"""Reptile and first-order MAML learn a start from which classes that they never saw are adapted to better."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, TrainingArguments

from fastpeft.strategies.few_shot.meta import Adaptation, MetaTrainer, head_loss
from tests.checkpoints import Checkpoints

NOISE, SIGNS = range(5, 15), range(15, 31)
"""Tokens of every class, and the classes' own: one each."""
KNOWN, NOVEL = SIGNS[:10], SIGNS[10:]
WAYS, SHOTS, QUERIES = 3, 4, 2
ADAPTATION = Adaptation(steps=3, rate=0.1)


def episode(signs: range, seed: int) -> dict[str, torch.Tensor]:
    """Texts of eight tokens, of which two are their class's sign and the others say nothing."""
    draw = random.Random(seed)
    rows, labels, asked = [], [], []
    for label, sign in enumerate(draw.sample(signs, WAYS)):
        for place in range(SHOTS + QUERIES):
            tokens = [sign] * 2 + draw.choices(NOISE, k=6)
            draw.shuffle(tokens)
            rows.append(tokens)
            labels.append(label)
            asked.append(place >= SHOTS)
    ids = torch.tensor(rows)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.tensor([labels]),
        "asked": torch.tensor([asked]),
    }


def adapted_loss(model: Any) -> float:
    """Of the queries of ten episodes of novel classes, after the adaptation to their support; the model stays."""
    model.eval()
    begun = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for seed in range(1000, 1010):
        given = episode(NOVEL, seed)
        labels, asked = given.pop("labels")[0], given.pop("asked")[0]
        support, queries = ({name: value[part] for name, value in given.items()} for part in (~asked, asked))
        head = ADAPTATION(model, support, labels[~asked])
        with torch.no_grad():
            losses.append(head_loss(model, queries, labels[asked], *head).item())
        model.load_state_dict(begun)
    return fmean(losses)


@pytest.mark.parametrize(
    "reptile", [pytest.param(True, id="reptile"), pytest.param(False, id="fomaml", marks=pytest.mark.full)]
)
def test_the_learnt_start_beats_the_untrained_one(reptile: bool, tmp_path: Path, checkpoints: Checkpoints) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["query", "key", "value", "dense"])
    model = get_peft_model(AutoModel.from_pretrained(checkpoints["bert"]), config)
    before = adapted_loss(model)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = MetaTrainer(
        ADAPTATION,
        reptile,
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"number": range(100)}),
        data_collator=lambda batch: episode(KNOWN, batch[0]["number"]),
    )
    trainer.train()
    assert adapted_loss(model) < 0.7 * before
