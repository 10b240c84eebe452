"""Few-shot runs: each method learns from a few rows of random models' toy tasks, and what it leaves can be used."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from safetensors.numpy import save
from transformers import AutoModel, AutoTokenizer

from fastpeft.cli import app
from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.generation import Prompt
from fastpeft.strategies import run
from fastpeft.strategies.few_shot import draws
from fastpeft.strategies.few_shot.contrastive import Contrastive, pairs
from fastpeft.strategies.few_shot.demonstrations import with_demonstrations
from fastpeft.strategies.few_shot.drawing import Pool, held_back
from fastpeft.strategies.few_shot.draws import Draw
from fastpeft.strategies.few_shot.heads import LinearHead, centroids, logistic_regression
from fastpeft.strategies.few_shot.pattern import Pattern
from fastpeft.strategies.few_shot.t_few import t_few_loss
from fastpeft.strategies.few_shot.using import saved_by
from fastpeft.strategies.few_shot.worded import answer_log_probabilities
from fastpeft.strategies.registry import strategy_of
from tests.checkpoints import SHIPPED, Checkpoints, write_rows
from tests.training.runs import Run, adapter, interrupted, train

QUICK = shlex.split("--batch-size 8 --logging-steps 4 --lora.r 8 --report-to none --data.eval-fraction 0.4")
SLOT = "{text} {answer}"
LEARNS = {
    "contrastive": ("bert", "1e-2", 6, {}),
    "classifier": ("bert", "1e-2", 10, {}),
    "pattern": ("bert", "1e-2", 16, {"pattern": SLOT, "verbaliser": {"no": "n", "yes": "y"}, "calibrate": True}),
    "pattern-t5": (
        *("t5", "3e-2", 40),
        {"method": "pattern", "pattern": SLOT, "verbaliser": {"no": "n", "yes": "y"}, "shots": 8},
    ),
    "t-few": ("t5", "1e-1", 40, {"pattern": SLOT, "shots": 8}),
    "t-few-decoder": (SHIPPED, "5e-2", 24, {"method": "t-few", "pattern": SLOT, "demonstrations": 2}),
    "reptile": ("bert", "1e-2", 2, {"novel": ["no", "yes"], "inner_rate": 0.1, "queries": 2, "inner_steps": 2}),
    "fomaml": ("bert", "1e-2", 2, {"novel": ["no", "yes"], "inner_rate": 0.1, "queries": 2, "inner_steps": 2}),
}
"""Model, rate, steps and options with which each learns `letters`."""
EACH = [pytest.param(name, marks=() if name == "contrastive" else pytest.mark.full) for name in LEARNS]


def letters(classes: int = 2) -> list[dict[str, Any]]:
    """A text begins with four of its class's letter; all texts differ."""
    names = ["no", "yes", "so", "if"][:classes]
    return [{"text": f"{'zaqk'[n % classes] * 4} {n}", "label": names[n % classes]} for n in range(20 * classes)]


def settings(name: str, checkpoints: Checkpoints, data: Path, *more: str, **options: Any) -> list[str]:
    model, rate, steps, own = LEARNS[name]
    classes = 4 if "novel" in own else 2
    path = write_rows(data / f"rows{classes}.jsonl", *letters(classes))
    given = {"method": name, "shots": 4 if classes == 2 else 2} | own | options
    return [
        *("--model", model if model == SHIPPED else checkpoints[model], "--data", path, *QUICK),
        *("--learning-rate", rate, "--max-steps", str(steps), "--strategy.name", "few-shot"),
        *("--strategy.options", json.dumps(given), *more),
    ]


@pytest.fixture(scope="module")
def two_draws(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A contrastive run of two draws, which others are compared with."""
    folder = tmp_path_factory.mktemp("two")
    return train(folder / "run", *settings("contrastive", checkpoints, folder, "--save-steps", "100", seeds=2))


def figures(found: Run) -> dict[str, dict[str, Any]]:
    return {metric["name"]: metric for metric in found.record["findings"]["metrics"]}


@pytest.mark.parametrize("name", EACH)
def test_each_method_learns_from_few_rows(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    checkpoints: Checkpoints,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Better than one class for all, whose share is a half; a random model's baselines may be right too."""
    if name == "contrastive":
        found: Run = request.getfixturevalue("two_draws")
    else:
        found = train(tmp_path / "run", *settings(name, checkpoints, tmp_path))
    assert name in ("reptile", "fomaml") or found.losses[-1] < 0.7 * found.losses[0]
    accuracy = figures(found)["accuracy"]
    assert accuracy["rows"] == 16 and accuracy["low"] > 0.5
    assert name == "classifier" or accuracy["against"]
    assert app.run(["generate", str(found.folder), "--quiet", "--prompt", "aaaa 99"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].startswith("yes\t"), "likeliest first"


def test_the_adapter_and_its_head_are_those_of_plain_peft(two_draws: Run, checkpoints: Checkpoints) -> None:
    found = two_draws
    base = AutoModel.from_pretrained(checkpoints["bert"])
    model = PeftModel.from_pretrained(base, str(found.folder)).eval()
    held = letters()
    batch = AutoTokenizer.from_pretrained(found.folder)([r["text"] for r in held], return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    guessed = LinearHead.load(found.folder).scores(vectors).argmax(-1)
    right = np.mean(guessed == [int(row["label"] == "yes") for row in held])
    assert right == 1 == figures(found)["accuracy"]["value"]
    assert not list(found.folder.glob("*.pkl")) and not list(found.folder.glob("*.joblib"))


@pytest.mark.full
@pytest.mark.parametrize("name", ["contrastive", "pattern", "t-few", "reptile"])
def test_acceleration_changes_nothing(name: str, tmp_path: Path, checkpoints: Checkpoints) -> None:
    slow = ["--learning-rate", "1e-3", "--max-steps", "4"]
    found = train(tmp_path / "run", *settings(name, checkpoints, tmp_path, *slow))
    plain = train(tmp_path / "plain", *settings(name, checkpoints, tmp_path, *slow, "--acceleration.enabled", "false"))
    assert found.losses == pytest.approx(plain.losses, rel=1e-3)
    assert figures(found)["accuracy"]["value"] == pytest.approx(figures(plain)["accuracy"]["value"], abs=0.07)


def check_resumed(name: str, whole: Run, data: Path, checkpoints: Checkpoints, *more: str) -> None:
    """Against a run of the same settings without a break."""
    given = settings(name, checkpoints, data, *more, "--save-steps", "100", seeds=2)
    interrupted(data / "broken", *given, at=2)
    resumed = train(data / "broken", *given, "--resume")
    ours, theirs = adapter(resumed.folder), adapter(whole.folder)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert resumed.record["findings"] == whole.record["findings"]
    assert "accuracy, mean of 2 draws" in figures(whole)


@pytest.mark.full
def test_a_resumed_run_has_the_numbers_of_one_without_a_break(
    two_draws: Run, tmp_path: Path, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    check_resumed("contrastive", two_draws, tmp_path, checkpoints)
    other = settings("contrastive", checkpoints, tmp_path, seeds=2, shots=3)
    train(tmp_path / "broken", *other, "--resume", code=2)
    assert "strategy.options.shots: expected" in capsys.readouterr().err


@pytest.mark.full
def test_a_resumed_run_of_episodes(tmp_path: Path, checkpoints: Checkpoints) -> None:
    more = ["--max-steps", "4", "--save-steps", "100"]
    whole = train(tmp_path / "whole", *settings("reptile", checkpoints, tmp_path, *more, seeds=2))
    check_resumed("reptile", whole, tmp_path, checkpoints, *more)


@pytest.mark.full
def test_another_draw_whose_loss_is_no_number_ends_the_run(
    tmp_path: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, trainer = [], Contrastive.trainer

    def second(self: Any, prepared: Any, model: Any, *given: Any) -> Any:
        made.append(trainer(self, prepared, model, *given))
        if len(made) == 2:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return made[-1]

    monkeypatch.setattr(Contrastive, "trainer", second)
    given = settings("contrastive", checkpoints, tmp_path, "--max-steps", "1", seeds=2, baselines=False)
    train(tmp_path / "run", *given, code=1)
    assert "is no number, so no adapter was saved" in capsys.readouterr().err
    assert len(made) == 2


@pytest.mark.full
def test_the_report_calls_ia3_by_its_name(tmp_path: Path, checkpoints: Checkpoints) -> None:
    steps = ["--max-steps", "1", "--data.max-length", "48"]
    found = train(tmp_path / "run", *settings("t-few", checkpoints, tmp_path, *steps, measured_rows=4))
    assert "\nia3 of `" in (found.folder / "report.md").read_text()
    card = (found.folder / "README.md").read_text()
    assert "An (IA)³ adapter of `" in card and "- ia3" in card and "LoRA" not in card


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("contrastive", {"shots": 30}, "strategy.options.shots: expected at most 12, the different rows of class 'no'"),
        ("contrastive", {"novel": ["no"]}, "strategy.options.novel: expected null for method contrastive"),
        ("contrastive", {"shots": 0}, "strategy.options.shots: expected at least 1, got 0"),
        ("pattern", {"pattern": "{text} It was."}, "strategy.options.pattern: expected the slot {answer} once"),
        ("pattern", {"pattern": "{text} {answer} {x}"}, "slots {text}, {text_pair} and {answer}, got {x}"),
        ("pattern", {"verbaliser": None}, "expected words of one token in the pattern, got 'no' of 2"),
        ("pattern", {"verbaliser": {"no": "y", "yes": "y"}}, "got the same tokens for 'no' and 'yes': 'y'"),
        ("pattern", {"verbaliser": {"no": "n"}}, "expected a word for each class, got none for 'yes'"),
        ("pattern-t5", {"pattern": "{answer} {text}"}, "expected {answer} as the last slot for task seq2seq-lm"),
        ("t-few", {"model": "bert"}, "model.name: expected an encoder-decoder or a decoder"),
        ("reptile", {"novel": ["no"]}, "strategy.options.novel: expected at least two classes"),
        ("reptile", {"ways": 3}, "strategy.options.novel: expected at least 3 other classes to learn from, got 2"),
        ("reptile", {"queries": 30}, "strategy.options.shots: expected at most"),
    ],
)
def test_what_cannot_be(
    name: str,
    given: dict[str, Any],
    said: str,
    tmp_path: Path,
    checkpoints: Checkpoints,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--model", checkpoints[given.pop("model")]] if "model" in given else []
    train(tmp_path / "run", *settings(name, checkpoints, tmp_path, *more, **given), code=2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_models_and_rows_of_another_kind(
    tmp_path: Path, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    masked = settings("pattern", checkpoints, tmp_path, "--model", SHIPPED, "--model.task", "masked-lm")
    train(tmp_path / "run", *masked, code=2)
    assert "expected an encoder with a masked-language head" in capsys.readouterr().err
    one = write_rows(tmp_path / "one.jsonl", *({"text": f"a {n}", "label": "a"} for n in range(9)))
    train(tmp_path / "run", *settings("contrastive", checkpoints, tmp_path, "--data", one), code=2)
    assert "expected 2 to 1000 classes in column label, got one: 'a'" in capsys.readouterr().err
    train(tmp_path / "run", *settings("contrastive", checkpoints, tmp_path, "--eval-steps", "1"), code=2)
    assert "training.eval_steps: expected null for strategy few-shot" in capsys.readouterr().err
    train(tmp_path / "run", "--model", checkpoints["bert"], "--data", one, "--model.task", "feature-extraction", code=2)
    assert "model.task: feature-extraction is for strategy.name few-shot" in capsys.readouterr().err


def test_rows_are_drawn_by_the_seed_and_never_measured() -> None:
    rows = Dataset.from_list([*letters(), {"text": "ZZZZ, 0", "label": "no"}])
    rest, held = held_back(rows, 10, 0, "key")
    assert len(rest) == 30 and len(held) == 10, "the repeated row is not counted"
    pool = Pool(rows, rows.select(held), 0.8)
    first, again, other = (pool.draw(["no", "yes"], 5, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert not {*first} & {*held} and [rows[place]["label"] for place in first] == ["no"] * 5 + ["yes"] * 5
    near = Pool(rows, Dataset.from_list([{"text": "one two three four five", "label": "no"}]), 0.4)
    twin = Dataset.from_list([{"text": "one two three four six", "label": "no"}])
    with pytest.raises(UserError, match="expected at most 0"):
        Pool(twin, Dataset.from_list([{"text": "one two three four five", "label": "no"}]), 0.4).draw(["no"], 1, 0)
    assert near.labels == ["no", "yes"]


def prepared_of(name: str, checkpoints: Checkpoints, data: Path, rows: list[dict[str, Any]], *more: str) -> Any:
    """(strategy, what it prepares) of the rows."""
    model, _, _, own = LEARNS[name]
    options = {"method": name, "shots": 4} | own
    settings = {
        "model": {"name": model if model == SHIPPED else checkpoints[model]},
        "data": {"path": write_rows(data / "mine.jsonl", *rows)},
        "strategy": {"name": "few-shot", "options": options},
    }
    strategy = strategy_of(FastpeftConfig.from_dict(settings).override(list(more)))
    return strategy, strategy.prepare(Console(quiet=True))


@pytest.mark.parametrize(
    ("place", "row", "said"),
    [
        (6, {"text": " ", "label": "no"}, "data: row 7, column text: expected text, got an empty one"),
        (39, {"text": "a text", "label": "so"}, "data: row 40, column label: expected one of no, yes, got 'so'"),
    ],
)
def test_a_row_is_refused_by_its_number_whether_it_is_drawn_or_not(
    place: int, row: dict[str, Any], said: str, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    rows = letters()
    rows[place] = row
    with pytest.raises(UserError, match=said):
        prepared_of("contrastive", checkpoints, tmp_path, rows, "data.labels=['no', 'yes']")


def test_rows_that_come_twice_are_measured_once(tmp_path: Path, checkpoints: Checkpoints) -> None:
    twice = write_rows(tmp_path / "twice.jsonl", *(letters()[:10] * 3), {"text": "?!", "label": "no"})
    more = [f"data.eval_path={twice}", "strategy.options.measured_rows=20"]
    _, prepared = prepared_of("contrastive", checkpoints, tmp_path, letters(), *more)
    assert len(prepared.evaluation) == 11, "texts of signs alone count too"


def test_examples_in_a_prompt_leave_it_within_its_length(tmp_path: Path, checkpoints: Checkpoints) -> None:
    rows = [row | {"text": row["text"] * 9, "text_pair": "second " * 9} for row in letters()]
    more = ["data.eval_fraction=0.2", "data.max_length=60", "strategy.options.pattern='{text} / {text_pair} {answer}'"]
    strategy, prepared = prepared_of("t-few-decoder", checkpoints, tmp_path, rows, *more)
    for nearest in (False, True):
        found = with_demonstrations(prepared, strategy._method.classifier, 4, nearest=nearest)
        assert len(found) == 8 and all(len(row["input_ids"]) <= 60 for row in found)
    assert not any("text_pair" in note for note in prepared.notes)
    _, unread = prepared_of("t-few-decoder", checkpoints, tmp_path, rows, *more[:2])
    assert any("rows have a text_pair" in note for note in unread.notes)


@pytest.mark.parametrize("generates", [False, True])
def test_a_decoder_that_ranks_answers_need_not_stop(
    generates: bool, tmp_path: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "why_it_cannot_stop", lambda *_: "it cannot stop")
    _, prepared = prepared_of("t-few-decoder", checkpoints, tmp_path, letters())
    notes = run._notes(None, prepared, torch.float32, Console(quiet=True), generates=generates)
    assert ("it cannot stop" in notes) == generates


@pytest.mark.parametrize(
    ("name", "said"), [("pattern-t5", "pattern of an encoder-decoder"), ("reptile", "reptile expected one process")]
)
def test_methods_that_train_in_one_process(name: str, said: str, tmp_path: Path, checkpoints: Checkpoints) -> None:
    more = ["strategy.options.shots=2"]
    strategy, prepared = prepared_of(name, checkpoints, tmp_path, letters(4 if name == "reptile" else 2), *more)
    with pytest.raises(UserError, match=rf"strategy\.options\.method: {said}.*, got 2"):
        strategy.trainer(prepared, None, SimpleNamespace(world_size=2), [])


def test_the_longer_of_two_texts_is_cut_and_neither_has_the_mask(checkpoints: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["bert"])
    pattern = Pattern("{text} {text_pair} {answer} .", "masked-lm")
    prompt = pattern.fit("ab cd", f"x {tokenizer.mask_token} " * 30, tokenizer, 20)
    ids = tokenizer(prompt)["input_ids"]
    assert len(ids) <= 20 and ids.count(tokenizer.mask_token_id) == 1
    assert prompt.startswith("ab cd x"), "the short text is whole"
    with pytest.raises(UserError, match=r"data\.max_length: expected more than the pattern's own tokens, got 3"):
        pattern.fit("ab cd", "x", tokenizer, 3)


class TestForeignFiles:
    @pytest.mark.parametrize(
        ("settings", "task", "said"),
        [
            ("[]", "feature-extraction", "expected kind as a str"),
            ('{"kind": "pickle", "labels": ["a", "b"]}', "feature-extraction", "expected kind embedded or worded"),
            ('{"kind": "embedded", "labels": [1, 2]}', "feature-extraction", "expected labels as a list of names"),
            ('{"kind": "embedded", "labels": ["a"]}', "feature-extraction", "expected two classes or more"),
            ('{"kind": "embedded", "labels": ["a", "b"]}', "causal-lm", "expected an adapter for task feature-extr"),
            ('{"kind": "worded", "labels": ["a", "b"], "words": ["a"]}', "causal-lm", "expected pattern as a str"),
        ],
    )
    def test_settings(self, settings: str, task: str, said: str, tmp_path: Path) -> None:
        (tmp_path / "few_shot.json").write_text(settings)
        with pytest.raises(UserError, match=f"MODEL: .*few_shot.json.*{said}"):
            saved_by(SimpleNamespace(adapter=str(tmp_path), task=task))  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"weight": np.zeros((2, 4)), "bias": np.zeros(3)}, "expected weight"),
            ({"weight": np.zeros((2, 4)), "bias": np.zeros(2), "more": np.zeros(1)}, "expected weight"),
            ({"weight": np.zeros((3, 4)), "bias": np.zeros(3)}, "expected weight of shape"),
            (None, "cannot be read"),
        ],
    )
    def test_heads(self, given: dict[str, Any] | None, said: str, tmp_path: Path) -> None:
        (tmp_path / "few_shot.json").write_text('{"kind": "embedded", "labels": ["a", "b"]}')
        (tmp_path / "few_shot.safetensors").write_bytes(b"no tensors" if given is None else save(given))
        config = SimpleNamespace(hidden_size=4)
        source: Any = SimpleNamespace(adapter=str(tmp_path), task="feature-extraction", max_length=8, config=config)
        saved = saved_by(source)
        assert saved is not None
        with pytest.raises(UserError, match=f"MODEL: .*few_shot.safetensors.*{said}"):
            next(saved.predictions(source, None, None, [Prompt("a", "a")], 1))

    def test_draws_are_measured_again(self, tmp_path: Path) -> None:
        draw = Draw(1, 4, {"trained": {"accuracy": 0.5, "f1": 0.5}})
        draws.write(tmp_path, [draw])
        assert draws.read(tmp_path) == [draw] and draw.like(draw)
        assert not draw.like(Draw(1, 4, {"trained": {"accuracy": 0.5}}))
        (tmp_path / draws.DRAWS).write_text('[{"seed": 1, "what": 2}]')
        assert draws.read(tmp_path) == []


def test_pairs_are_alike_or_not() -> None:
    labels = [0, 0, 1, 1, 2]
    drawn = pairs(labels, 3, seed=0)
    assert len(drawn) == 5 * 3 + 4 * 3, "a class of one text has no pairs alike"
    for row in drawn:
        assert row["first"] != row["second"]
        assert row["labels"] == float(labels[row["first"]] == labels[row["second"]])


def test_heads() -> None:
    generator = np.random.default_rng(0)
    vectors, labels = generator.normal(size=(30, 4)).astype(np.float32), np.arange(30) % 3
    vectors[:, 0] += 4 * labels
    distances = ((vectors[:, None] - np.stack([vectors[labels == n].mean(0) for n in range(3)])) ** 2).sum(-1)
    assert (centroids(vectors, labels).scores(vectors).argmax(-1) == distances.argmin(-1)).all()
    from sklearn.linear_model import LogisticRegression

    for kept in (slice(None), labels < 2):
        head, fitted = logistic_regression(vectors[kept], labels[kept]), LogisticRegression(max_iter=1000)
        wanted = fitted.fit(vectors[kept], labels[kept]).predict_proba(vectors[kept])
        scores = np.exp(head.scores(vectors[kept]))
        assert scores / scores.sum(-1, keepdims=True) == pytest.approx(wanted, abs=1e-4)


def test_the_losses_of_t_few() -> None:
    probabilities = torch.tensor([[[0.5, 0.25], [0.1, 1.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    right, wrong = 0.5 * np.log(0.5 * 0.25), np.log(0.1)
    normalised = -right + np.log(np.exp(right) + np.exp(wrong))
    wanted = -right - np.log(1 - 0.1) + normalised
    assert t_few_loss(probabilities.log(), mask, torch.tensor([0])).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("name", "task"), [("t5", "seq2seq-lm"), ("llama", "causal-lm")])
def test_answers_are_as_likely_as_one_by_one(name: str, task: str, checkpoints: Checkpoints) -> None:
    """Against the model's own loss, a prompt and an answer at a time."""
    import transformers

    kind = "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModelForCausalLM"
    model = getattr(transformers, kind).from_pretrained(checkpoints[name]).eval()
    model.get_base_model = lambda: model
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[name])
    prompts, answers = [[40, 41, 42], [50, 51]], [[30, 31], [33]]
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        found, mask = answer_log_probabilities(model, tokenizer, dict(batch), answers, task)
        for row, prompt in enumerate(prompts):
            for column, answer in enumerate(answers):
                ids = torch.tensor([prompt if name == "t5" else prompt + answer])
                labels = torch.tensor([answer if name == "t5" else [-100] * len(prompt) + answer])
                mean = -model(input_ids=ids, labels=labels).loss
                assert found[row, column][mask[column]].mean().item() == pytest.approx(mean.item(), abs=1e-4)
