"""Small runs of `fastpeft train`, made once, for whatever uses what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastpeft.cli import app
from tests.fresh import ROOT

SHIPPED = ROOT / "fastpeft/quickstart/assets/model"


def train(folder: Path, *arguments: object) -> Path:
    words = ["train", *map(str, arguments), "--output-dir", str(folder), "--report-to", "none", "--quiet"]
    assert app.run(words) == 0
    return folder


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    turns = [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "yes yes yes"}]
    return write_rows(tmp_path_factory.mktemp("chats") / "chats.jsonl", [{"messages": turns}] * 8)


def shipped(chats: Path, *others: object) -> tuple[object, ...]:
    """Its answer is learned. All rows are the same, so one a step will do."""
    learns = ("--lr", 1e-2, "--max-steps", 40, "--batch-size", 1)
    return ("--model", SHIPPED, "--data", chats, *learns, "--max-length", 64, *others)


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "chat", *shipped(chats, "--save-steps", 20))


@pytest.fixture(scope="session")
def qlora_run(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "qlora", *shipped(chats, "--method", "qlora"))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "encoder"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "it", "is"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier_run(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    rows: list[dict[str, object]] = [{"text": f"it is {word}", "label": word} for word in ("good", "bad")] * 16
    data = write_rows(folder / "rows.jsonl", rows)
    return train(folder / "labels", "--model", encoder, "--data", data, "--lr", 1e-2, "--max-steps", 30)
