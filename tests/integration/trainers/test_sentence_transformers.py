"""Trainings by sentence-transformers, where it is installed: the models hold transformers' own, with `add_adapter`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import fastpeft
from tests.integration.models import make_base
from tests.integration.test_trainers import tokenizer
from tests.integration.trainers.loops import settings, texts
from tests.integration.trainers.runs import check_same_training, losses_of

pytest.importorskip("sentence_transformers")

LOSSES = {
    "in-batch negatives": lambda losses, model: losses.MultipleNegativesRankingLoss(model),
    "cached": lambda losses, model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    "Matryoshka": lambda losses, model: losses.MatryoshkaLoss(
        model, losses.MultipleNegativesRankingLoss(model), matryoshka_dims=[64, 16]
    ),
    "layers": lambda losses, model: losses.AdaptiveLayerLoss(model, losses.MultipleNegativesRankingLoss(model)),
}


def folder_of(kind: str, folder: Path, **config: Any) -> str:
    """A tiny encoder with random weights, without dropout, and its tokenizer."""
    base = make_base(kind, **config)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        setattr(base.config, name, 0.0)
    base.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    return str(folder / "base")


def adapted(model: Any, **config: Any) -> Any:
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def train_with(trainer: Any, arguments: Any, loss_of: Callable[[Any], Any], **columns: list[Any]) -> Any:
    from datasets import Dataset

    def train(model: Any, folder: Path) -> list[float]:
        given = arguments(**settings(folder))
        made = trainer(model, given, train_dataset=Dataset.from_dict(columns), loss=loss_of(model))
        made.train()
        return losses_of(made)

    return train


@pytest.mark.parametrize(
    "kind", [kind if kind == "layers" else pytest.param(kind, marks=pytest.mark.full) for kind in LOSSES]
)
def test_sentence_embeddings(kind: str, tmp_path: Path) -> None:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses

    unread = r"pooler\..*"  # embeddings are means
    model = adapted(SentenceTransformer(folder_of("bert", tmp_path), device="cpu"), exclude_modules=unread)
    train = train_with(
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        lambda model: LOSSES[kind](losses, model),
        anchor=texts(12, 5, 0),
        positive=texts(12, 8, 1),
    )
    ours = check_same_training(model, train, tmp_path).model
    ours.save_pretrained(str(tmp_path / "saved"))
    assert "fastpeft" not in (tmp_path / "saved" / "adapter_config.json").read_text().replace(str(tmp_path), "")
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    fastpeft.restore(ours)
    torch.testing.assert_close(*(each.encode(texts(3, 6, 2), convert_to_tensor=True) for each in (again, ours)))


@pytest.mark.full
def test_pairs_that_are_scored(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    model = adapted(CrossEncoder(folder_of("bert", tmp_path, num_labels=1), device="cpu"))
    train = train_with(
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        BinaryCrossEntropyLoss,
        query=texts(12, 5, 0),
        answer=texts(12, 8, 1),
        label=[0.0, 1.0, 1.0] * 4,
    )
    check_same_training(model, train, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("few", ["few tokens are left to PEFT", "nothing is"])
def test_what_is_dropped_is_the_same_when_embeddings_are_made_again(
    few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached loss makes them without gradients first, and a second time with, from the same random state."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    from fastpeft.layers import few_tokens

    if few == "nothing is":
        monkeypatch.setattr(few_tokens, "FEW", 0)
        monkeypatch.setattr(few_tokens, "FEW_ELEMENTS", 0)
    model = SentenceTransformer(folder_of("bert", tmp_path), device="cpu")
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False))
    fastpeft.accelerate(model.train())
    made: dict[bool, list[Any]] = {False: [], True: []}
    model.register_forward_hook(lambda _, args, y: made[torch.is_grad_enabled()].append(y["sentence_embedding"]))
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    loss([model.preprocess(texts(4, 5, seed)) for seed in (0, 1)], None).backward()
    assert len(made[False]) == len(made[True]) == 4
    assert all(any(torch.equal(first, again) for first in made[False]) for again in made[True])
