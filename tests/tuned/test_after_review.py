"""Mistakes that were made once: each would have lost someone's work, or trained something else than was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpeft.cli import app
from fastpeft.models import tuned

from .conftest import SHIPPED, train, write_rows

IM_END = "<|im_end|>"


@pytest.fixture(scope="session")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped base with a ChatML template of its own, whose end of turn is not its end-of-sequence token."""
    folder = tmp_path_factory.mktemp("models") / "chatml"
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", IM_END]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_merging_replaces_merged_models_only(
    chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.docx").touch()
    monkeypatch.chdir(tmp_path)
    for target in (".", str(chat_run), str(chat_run.parent)):
        assert app.run(["merge", str(chat_run), target, "--overwrite", "--quiet"]) == 2
        assert "OUTPUT: expected a merged model to replace" in capsys.readouterr().err
    assert (tmp_path / "thesis.docx").exists() and (chat_run / "adapter_model.safetensors").exists()


def test_a_loss_that_is_no_number_ends_the_run(chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", SHIPPED, "--data", chats, "--lr", 1e30, "--max-grad-norm", 0, "--max-steps", 30]
    words += ["--logging-steps", 1, "--output-dir", tmp_path / "run", "--report-to", "none", "--quiet"]
    assert app.run(["train", *map(str, words)]) == 1
    shown = capsys.readouterr().err
    assert (
        "no adapter was saved: the gradients of step 2 are no numbers, nor is what they trained: try a lower" in shown
    )
    assert not (tmp_path / "run/adapter_model.safetensors").exists()


def test_a_run_without_chats_is_not_asked_in_chats(
    chatml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [{"prompt": "Say yes:", "completion": " yes yes"}] * 8
    data = write_rows(tmp_path / "rows.jsonl", rows)
    words = ("--model", chatml, "--data", data, "--lr", 1e-2, "--max-steps", 40, "--batch-size", 1)
    run = train(tmp_path / "run", *words)
    capsys.readouterr()
    assert app.run(["generate", str(run), "-p", "Say yes:", "--max-new-tokens", "8", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == "yes yes"


@pytest.mark.full
def test_the_token_that_ends_answers_ends_them(
    chatml: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", chatml, "--data", chats, "--lr", 1e-2, "--max-steps", 40, "--batch-size", 1)
    run = train(tmp_path / "run", *words, "--lora.modules_to_save", "[lm_head, embed_tokens]")
    capsys.readouterr()
    assert AutoTokenizer.from_pretrained(run).eos_token == IM_END
    assert app.run(["generate", str(run), "-p", "Say yes.", "--max-new-tokens", "40", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == "yes yes yes"


def test_an_adapter_on_tied_embeddings_merges_into_the_same_model(chats: Path, tmp_path: Path) -> None:
    words = ("--model", SHIPPED, "--data", chats, "--lr", 1e-2, "--max-steps", 5, "--batch-size", 1)
    run = train(tmp_path / "run", *words, "--lora.target_modules", "[q_proj, embed_tokens]")
    assert app.run(["merge", str(run), str(tmp_path / "merged"), "--dtype", "float32", "--quiet"]) == 0
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        wanted = tuned.load(tuned.find(str(run)), torch.device("cpu"), torch.float32)(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    assert (merged - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_run_s_folder_cannot_ask_for_code_to_be_run(chat_run: Path, tmp_path: Path) -> None:
    for path in chat_run.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = (chat_run / "config.yaml").read_text()
    assert "trust_remote_code: false" in config
    (tmp_path / "config.yaml").write_text(config.replace("trust_remote_code: false", "trust_remote_code: true"))
    assert tuned.find(str(tmp_path)).model.trust_remote_code is False
    assert tuned.find(str(tmp_path), trust_remote_code=True).model.trust_remote_code is True


def test_a_run_that_died_at_once_is_not_in_the_way(chats: Path, tmp_path: Path) -> None:
    words = ("--model", SHIPPED, "--data", chats, "--max-steps", 1, "--batch-size", 1)
    run = train(tmp_path / "run", *words)
    for path in run.iterdir():
        if path.name not in ("config.yaml", "data.sha256"):
            path.unlink() if path.is_file() else [file.unlink() for file in path.iterdir()] and path.rmdir()
    train(run, *words)
