"""A Marian with its own tokenizer, whose files are not those of most others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastpeft.cli import app
from fastpeft.config import FastpeftConfig, ModelSection
from fastpeft.errors import UserError
from fastpeft.models import bases
from fastpeft.training.uploading import published

from .conftest import train, write_rows

PAIRS = {"the sky is blue": "der himmel ist blau", "grass is green": "gras ist gruen"}
FILES = {"source.spm", "target.spm", "vocab.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece
    from transformers import MarianConfig, MarianMTModel, MarianTokenizer

    folder = tmp_path_factory.mktemp("marian")
    pieces: dict[str, None] = {"</s>": None, "<unk>": None}
    for name, texts in (("source", PAIRS), ("target", PAIRS.values())):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*texts] * 20),
            model_prefix=str(folder / name),
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        model = (folder / f"{name}.model").rename(folder / f"{name}.spm")
        (folder / f"{name}.vocab").unlink()
        made = sentencepiece.SentencePieceProcessor(model_file=str(model))
        pieces |= {made.id_to_piece(i): None for i in range(3, made.get_piece_size())}
    pieces["<pad>"] = None
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    files = {"source_spm": "source.spm", "target_spm": "target.spm", "vocab": "vocab.json"}
    MarianTokenizer(**{key: str(folder / name) for key, name in files.items()}).save_pretrained(folder)
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
    pad = len(pieces) - 1
    tokens = {"pad_token_id": pad, "eos_token_id": 0, "decoder_start_token_id": pad, "forced_eos_token_id": 0}
    torch.manual_seed(0)
    MarianMTModel(MarianConfig(vocab_size=len(pieces), **sizes, **widths, **tokens)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(marian: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    rows: list[dict[str, object]] = [{"prompt": one, "completion": other} for one, other in PAIRS.items()]
    data = write_rows(folder / "rows.jsonl", rows * 4)
    return train(folder / "run", "--model", marian, "--data", data, "--lr", 1e-2, "--max-steps", 2)


def test_it_answers_alone_and_merged(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["merge", str(run), str(tmp_path / "merged"), "--dtype", "float32", "--quiet"]) == 0
    assert {path.name for path in (tmp_path / "merged").iterdir()} > FILES
    answers = []
    for model in (run, tmp_path / "merged"):
        capsys.readouterr()
        assert app.run(["generate", str(model), "-p", "the sky is blue", "--max-new-tokens", "8", "--quiet"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert app.run(["merge", str(run), str(tmp_path / "merged"), "--overwrite", "--quiet"]) == 0


def test_what_is_uploaded_has_all_of_the_tokenizer(run: Path, tmp_path: Path) -> None:
    tokenizer = bases.load_tokenizer(ModelSection(name=str(run)))
    published(run, FastpeftConfig.from_yaml(run / "config.yaml"), tokenizer, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} > FILES
    again = bases.load_tokenizer(ModelSection(name=str(tmp_path)))
    assert again("the sky", text_target="gras") == tokenizer("the sky", text_target="gras")


def test_files_that_are_missing_are_told(marian: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "source.spm"):
        shutil.copy(marian / name, tmp_path / name)
    with pytest.raises(UserError) as told:
        bases.load_tokenizer(ModelSection(name=str(tmp_path)))
    assert str(told.value) == f"model.name: no tokenizer: {tmp_path} could not be loaded: a file of it is missing"


def test_a_package_that_is_missing_is_told(marian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils.import_utils import SENTENCEPIECE_IMPORT_ERROR

    def fail(*_: object, **__: object) -> None:
        raise ImportError(SENTENCEPIECE_IMPORT_ERROR.format("MarianTokenizer"))

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(UserError, match=r"could not be loaded: it needs SentencePiece: pip install sentencepiece$"):
        bases.load_tokenizer(ModelSection(name=str(marian)))
