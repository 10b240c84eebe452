"""Domain-adaptive runs of all three kinds of model: what they measure, take out, replay and save."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoTokenizer

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.models import tuned
from fastpeft.models.tasks import auto_class
from fastpeft.strategies.registry import strategy_of
from tests.checkpoints import Checkpoints, write_rows
from tests.training.runs import Run, adapter, classes, interrupted, train

QUICK = shlex.split("--batch-size 4 --learning-rate 1e-2 --logging-steps 4 --lora.r 4 --report-to none --max-length 64")
DOMAIN = shlex.split("the sky is blue and the grass is green while snow falls over hyperventilation")
GENERAL = shlex.split("a cat may jump far but that dog can run to our house with some bone")
TASKS = {"llama": "causal-lm", "bert": "masked-lm", "t5-for-spans": "seq2seq-lm"}


def texts(words: list[str], count: int) -> list[dict[str, Any]]:
    draw = random.Random(len(words))
    return [{"text": " ".join(draw.choice(words) for _ in range(14))} for _ in range(count)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for texts of which two come twice."""
    folder = tmp_path_factory.mktemp("texts")
    rows = texts(DOMAIN, 30)
    domain = write_rows(folder / "domain.jsonl", *rows, *rows[:2])
    general = write_rows(folder / "general.jsonl", *texts(GENERAL, 40))
    options = ["--strategy.name", "domain", "--strategy.options.general", general, "--strategy.options.replay", "0.2"]
    return ["--data", domain, *options, "--data.eval_fraction", "0.2", *QUICK]


@pytest.fixture(
    scope="module",
    params=["llama", "t5-for-spans", pytest.param("bert", marks=pytest.mark.full)],
    ids=lambda name: name,
)
def done(
    request: pytest.FixtureRequest, given: list[str], checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Run]:
    """A run with a larger vocabulary."""
    name: str = request.param
    more = ["--packing"] if name == "llama" else []
    more += ["--max-steps", "8", "--strategy.options.new_tokens", "6"]
    return name, train(tmp_path_factory.mktemp(name) / "run", "--model", checkpoints[name], *given, *more)


def test_what_is_measured(done: tuple[str, Run]) -> None:
    name, run = done
    domain, general, forgetting = run.record["findings"]["metrics"]
    assert run.record["task"] == TASKS[name] and run.losses[-1] < run.losses[0]
    assert domain["high"] < domain["baseline"] and domain["against"] == "before training"
    assert (domain["rows"], general["rows"], forgetting["rows"]) == (6, 4, 4)
    measure = "perplexity" if name == "llama" else "nats a masked token"
    assert domain["name"] == f"{measure}, domain" and general["low"] <= general["value"] <= general["high"]
    if name == "llama":
        loss = run.record["metrics"]["loss"]
        assert domain["value"] == pytest.approx(float(torch.tensor(loss).exp()), rel=0.05)  # a mean over batches there


def test_the_report_says_what_was_done(done: tuple[str, Run]) -> None:
    _, run = done
    report = (run.folder / "report.md").read_text()
    assert "## Forgetting" in report and "Replayed general text is 2" in report
    assert "- 2 of 32 texts (paragraphs of documents) were taken out that came before." in report
    assert "The vocabulary has 6 new tokens" in report


def test_the_settings_that_were_decided(done: tuple[str, Run]) -> None:
    _, run = done
    assert run.config["training"]["warmup_steps"] == 0.05
    assert Path(run.config["strategy"]["options"]["general"]).is_absolute()


def test_plain_peft_loads_the_larger_vocabulary(done: tuple[str, Run], checkpoints: Checkpoints) -> None:
    name, run = done
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    base = auto_class(TASKS[name]).from_pretrained(checkpoints[name])
    size = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    assert len(tokenizer) == size + 6
    ids = torch.arange(size - 3, size + 6)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5-for-spans" else {})
    loaded = tuned.load(tuned.find(str(run.folder)), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        wanted = run.model.eval()(**inputs).logits
        for model in (PeftModel.from_pretrained(base, str(run.folder)).eval(), loaded):
            torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)
    assert wanted.shape[-1] == size + 6


def test_new_tokens_begin_as_the_mean_of_their_pieces_and_are_trained(done: tuple[str, Run], given: list[str]) -> None:
    name, run = done
    trained = [
        part for key, part in adapter(run.folder).items() if "modules_to_save" in key or "trainable_tokens" in key
    ]
    assert len(trained) == {"llama": 2, "t5-for-spans": 2}.get(name, len(trained)) > 0  # neither head is tied
    rows = {"bert": len(AutoTokenizer.from_pretrained(run.folder))}.get(name, 6)  # its head has a bias
    assert all(len(part) == rows for part in trained)
    pieces = prepared(run)[1]._pieces
    base = auto_class(TASKS[name]).from_pretrained(run.config["model"]["name"]).get_input_embeddings().weight
    begun = torch.stack([base[old].mean(0) for old in pieces.values()]).detach()
    change = [(part[-6:] - begun).abs() for part in trained]
    assert min(float(found.max()) for found in change) < 0.2  # eight steps of 1e-2 from there
    assert all(float(found.max()) > 1e-3 for found in change)


def prepared(run: Run) -> tuple[Any, Any]:
    strategy = strategy_of(FastpeftConfig.from_dict(run.config))
    return strategy.prepare(Console(quiet=True)), strategy


@pytest.mark.full
@pytest.mark.parametrize("name", TASKS)
def test_a_resumed_run_is_one_without_a_break(
    name: str, given: list[str], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    arguments = ["--model", checkpoints[name], *given, "--epochs", "2", "--lora.dropout", "0.1"]
    arguments += ["--strategy.options.new_tokens", "6", "--logging-steps", "1", "--save-steps", "100"]
    arguments += ["--packing"] if name == "llama" else []
    whole = train(tmp_path / "whole", *arguments)
    interrupted(tmp_path / "cut", *arguments, at=2 if name == "llama" else 9)
    cut = train(tmp_path / "cut", "--resume")
    assert cut.losses == whole.losses and cut.record["findings"] == whole.record["findings"]
    ours, theirs = adapter(cut.folder), adapter(whole.folder)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.full
@pytest.mark.parametrize("name", TASKS)
def test_acceleration_changes_nothing_but_the_rounding(
    name: str, given: list[str], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    arguments = ["--model", checkpoints[name], *given, "--max-steps", "6", "--logging-steps", "1"]
    fast, plain = (train(tmp_path / on, *arguments, "--acceleration.enabled", on) for on in ("true", "false"))
    torch.testing.assert_close(torch.tensor(fast.losses), torch.tensor(plain.losses), rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_lora_on_the_embeddings(given: list[str], checkpoints: Checkpoints, tmp_path: Path) -> None:
    arguments = [*given, "--max-steps", "6", "--lora.target_modules", "[q_proj, embed_tokens]"]
    run = train(tmp_path / "run", "--model", checkpoints["llama"], *arguments)
    trained = {key: part for key, part in adapter(run.folder).items() if "lora_embedding_B" in key}
    assert trained and all(float(part.abs().max()) > 0 for part in trained.values())
    assert "by PEFT" not in (run.folder / "report.md").read_text()
    refused = train(tmp_path / "refused", "--model", checkpoints["llama"], *arguments, *NEW, code=2)
    assert refused.model is None


NEW = ["--strategy.options.new_tokens", "2"]


def config(checkpoints: Checkpoints, path: str, name: str = "llama", **options: Any) -> FastpeftConfig:
    return FastpeftConfig.from_dict(
        {
            "model": {"name": checkpoints[name]},
            "data": {"path": path, "max_length": 32},
            "strategy": {"name": "domain", "options": options},
        }
    )


def test_overlaps_with_the_evaluation_are_taken_out(checkpoints: Checkpoints, tmp_path: Path) -> None:
    rows = texts(DOMAIN, 20)
    path = write_rows(tmp_path / "train.jsonl", *rows, {"text": f"so {rows[0]['text']} then"})
    held = write_rows(tmp_path / "test.jsonl", {"text": f"but {rows[0]['text']} now"})
    settings = config(checkpoints, path).override([f"data.eval_path={held}"])
    found = strategy_of(settings).prepare(Console(quiet=True))
    assert len(found.rows) == 19
    found = strategy_of(settings.override(["strategy.options.decontaminate=false"])).prepare(Console(quiet=True))
    assert len(found.rows) == 21


def test_a_document_is_cleaned_held_back_and_divided(checkpoints: Checkpoints, tmp_path: Path) -> None:
    parts = [row["text"] for row in texts(DOMAIN, 20)]
    path = tmp_path / "novel.txt"
    path.write_text("\n\n".join([*parts[:10], parts[0], *parts[10:]]))
    found = strategy_of(config(checkpoints, str(path)).override(["data.eval_fraction=0.25"])).prepare(
        Console(quiet=True)
    )
    words = "".join(found.tokenizer.decode(ids, skip_special_tokens=True) for ids in found.rows.rows["input_ids"])
    assert words == "\n\n".join(parts[:15])
    assert found.evaluation is not None and len(found.evaluation) > 1
    assert found.notes == ["forgetting is not measured: strategy.options.general names no general text"]


def test_too_little_general_text_is_told(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *texts(DOMAIN, 20))
    general = write_rows(tmp_path / "general.jsonl", *texts(GENERAL, 3))
    [note] = strategy_of(config(checkpoints, path, general=general, replay=0.5)).prepare(Console(quiet=True)).notes
    assert "not strategy.options.replay 50.0%: there is no more of it" in note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay": 1.0}, r"strategy\.options\.replay: expected 0 to 0\.99, got 1\.0"),
        ({"general_held": 0.0}, r"strategy\.options\.general_held: expected 0\.001 to 0\.9"),
        ({"near_threshold": 0.2}, r"strategy\.options\.near_threshold: expected 0\.5 to 1"),
        ({"measured_rows": 0}, r"strategy\.options\.measured_rows: expected at least 1"),
        ({"new_tokens": -1}, r"strategy\.options\.new_tokens: expected at least 0, got -1"),
        (
            {"new_tokens": "nowhere.txt"},
            r"strategy\.options\.new_tokens: expected a number or a file of words, got nowh",
        ),
        ({"general": "nowhere.txt"}, r"strategy\.options\.general: expected a file, a folder or a hub ID"),
        ({"deduplicate": "fuzzy"}, r"strategy\.options\.deduplicate: expected one of 'exact', 'near', 'none'"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any], message: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *texts(DOMAIN, 4))
    with pytest.raises(UserError, match=message):
        strategy_of(config(checkpoints, path, **options)).prepare(Console(quiet=True))


def test_data_that_cannot_be(checkpoints: Checkpoints, tmp_path: Path) -> None:
    labelled = write_rows(tmp_path / "classes.jsonl", *classes(4))
    with pytest.raises(UserError, match=r"strategy\.name: domain expected texts, got columns text \+ label"):
        strategy_of(config(checkpoints, labelled, "bert")).prepare(Console(quiet=True))
    path = write_rows(tmp_path / "rows.jsonl", *texts(DOMAIN, 4))
    other = write_rows(tmp_path / "other.jsonl", {"words": "a"}, {"words": "b"})
    with pytest.raises(UserError, match=r"strategy\.options\.general: expected a column text, got words"):
        strategy_of(config(checkpoints, path, general=other)).prepare(Console(quiet=True))
    overlapping = config(checkpoints, path).override(
        [f"data.eval_path={write_rows(tmp_path / 'e.jsonl', *texts(DOMAIN, 4))}"]
    )
    with pytest.raises(UserError, match="expected texts to be left after cleaning, got none"):
        strategy_of(overlapping).prepare(Console(quiet=True))


def test_the_configuration_is_kept(done: tuple[str, Run]) -> None:
    _, run = done
    again = strategy_of(FastpeftConfig.from_dict(run.config)).prepare(Console(quiet=True))
    assert again.config.to_dict() == json.loads(json.dumps(run.config))
    assert again.rows.fingerprint() == run.record["fingerprint"]
    assert isinstance(again.rows.rows, datasets.Dataset)
