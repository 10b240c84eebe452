"""The two checks of responsible use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from fastpeft.cli import app
from fastpeft.errors import UserError
from fastpeft.responsible.groups import by_group, wilson
from fastpeft.responsible.memorization import passages

from .conftest import write_rows

NO_TEXT = "expected text, got null"
NO_RUN = "RUN: expected an output folder of fastpeft train, got"
NO_CLASSIFIER = "RUN: expected the run of a classifier, got task"


def memorization(run: Path, *arguments: object) -> int:
    return app.run(["memorization", str(run), *map(str, arguments), "--quiet"])


def test_a_run_that_learned_one_answer_by_heart_repeats_it(chat_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert memorization(chat_run, "--prefix", 4, "--tokens", 3, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passages"] == 8 and found["tokens"] == 3
    assert (found["verbatim"], found["verbatim_base"]) == (1.0, 0.0)
    assert memorization(chat_run, "--prefix", 4, "--tokens", 3, "--fail-above", 0.5) == 1
    assert "repeated word for word               100.0%     0.0%" in capsys.readouterr().out


def changed(run: Path, to: Path, old: str, new: str) -> Path:
    """A copy of a run with other words in its configuration."""
    to.mkdir()
    for path in run.iterdir():
        if path.is_file():
            (to / path.name).write_bytes(path.read_bytes())
    config = (run / "config.yaml").read_text()
    assert old in config
    (to / "config.yaml").write_text(config.replace(old, new))
    return to


def test_a_run_of_another_machine_s_dtype(chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = changed(chat_run, tmp_path / "run", "dtype: float32", "dtype: float16")
    assert memorization(run, "--prefix", 4, "--tokens", 3) == 0


def test_other_rows_than_those_of_the_training_are_told(
    chat_run: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chats.jsonl").write_text(chats.read_text().replace("yes yes yes", "no no no no"))
    run = changed(chat_run, tmp_path / "run", str(chats), str(tmp_path / "chats.jsonl"))
    capsys.readouterr()
    assert memorization(run, "--prefix", 4, "--tokens", 3) == 2
    wanted = f"RUN: expected the rows that it was trained on in {tmp_path}/chats.jsonl, got others"
    assert capsys.readouterr().err == f"fastpeft: {wanted}\n"


def test_passages_begin_where_something_is_learned() -> None:
    ids = list(range(10, 20))
    rows = Dataset.from_list([{"input_ids": ids, "labels": [-100] * 4 + ids[4:]}, {"input_ids": ids, "labels": ids}])
    found = {(len(p.given), tuple(p.following)) for p in passages(rows, prefix=2, tokens=3, most=9, seed=0)}
    assert found == {(4, (14, 15, 16)), (2, (12, 13, 14))}
    with pytest.raises(UserError, match="--tokens: expected at most what a training row has"):
        passages(rows, prefix=8, tokens=3, most=9, seed=0)


def test_groups_of_a_classifier(classifier_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, object]] = [{"text": "it is good", "label": "good", "of": "a"}] * 3
    rows += [{"text": "it is good", "label": "bad", "of": "b"}, {"text": "it is bad", "label": "bad", "of": "b"}]
    data = write_rows(tmp_path / "test.jsonl", rows)
    assert app.run(["groups", str(classifier_run), "--data", str(data), "--by", "of", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(g["name"], g["rows"], g["accuracy"]) for g in found["groups"]] == [("b", 2, 0.5), ("a", 3, 1.0)]
    assert found["groups"][0]["predicted"] == {"bad": 0.5, "good": 0.5} and found["gap"] == 0.5
    assert app.run(["groups", str(classifier_run), "--data", str(data), "--by", "of", "--quiet"]) == 0
    assert "(fewer than 30 rows)" in capsys.readouterr().out


def test_figures_of_a_group() -> None:
    found = by_group(["x"] * 4, ["p", "p", "n", "n"], ["p", "n", "n", "n"], "who").groups[0]
    assert (found.rows, found.accuracy) == (4, 0.75)
    assert found.f1_macro == pytest.approx((2 / 3 + 4 / 5) / 2)
    with pytest.raises(ValueError, match="guessed: expected 1 labels and more than none, got 0"):
        by_group(["x"], ["p"], [], "who")


def test_the_interval_is_wilson_s() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memorization", "{tmp}"], f"{NO_RUN} {{tmp}}, which has no config.yaml"),
        (["memorization", "{labels}"], "RUN: expected the run of a decoder, got task sequence-classification"),
        (["groups", "{chat}", "--data", "x.csv", "--by", "of"], f"{NO_CLASSIFIER} causal-lm"),
        (["groups", "{labels}", "--data", "{rows}", "--by", "of"], "--by: expected the column of, got text, label"),
        (["groups", "{labels}", "--data", "{null}", "--by", "of"], f"--data: row 2, column text: {NO_TEXT}"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    chat_run: Path,
    classifier_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "it", "label": "good"}])
    nulls: list[dict[str, object]] = [{"text": text, "label": "good", "of": "a"} for text in ("it", None)]
    names = {"null": write_rows(tmp_path / "null.jsonl", nulls)}
    names |= {"tmp": tmp_path, "chat": chat_run, "labels": classifier_run, "rows": rows}
    assert app.run([word.format(**names) for word in arguments]) == 2
    assert capsys.readouterr().err == f"fastpeft: {message.format(**names)}\n"
