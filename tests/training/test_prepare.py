"""What is settled before a model is loaded: rows, evaluation, the resolved configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.training.preparing import Prepared, prepare
from tests.checkpoints import SHIPPED, Checkpoints, write_rows

from .runs import chats, classes, texts


def prepared(*settings: str) -> Prepared:
    return prepare(FastpeftConfig().override([f"model.name={SHIPPED}", *settings]), Console(quiet=True))


def ids(encoded: Any) -> list[list[int]]:
    found: list[list[int]] = encoded.rows["input_ids"][:]
    return found


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of twenty texts, each another."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{row['text']} {number}"} for number, row in enumerate(texts(20))]
    return write_rows("rows.jsonl", *rows)


def test_a_limit_takes_the_first(path: str) -> None:
    whole, limited = prepared(f"data.path={path}"), prepared(f"data.path={path}", "data.limit=5")
    assert len(whole.rows) == 20 and ids(limited.rows) == ids(whole.rows)[:5]
    assert len(prepared(f"data.path={path}", "data.limit=50").rows) == 20


def test_the_held_back_rows_are_drawn_by_the_seed(path: str) -> None:
    found = [prepared(f"data.path={path}", "data.eval_fraction=0.2", f"training.seed={seed}") for seed in (0, 0, 1)]
    held = [ids(one.evaluation) for one in found]
    assert held[0] == held[1] != held[2]
    for one in found:
        trained, evaluated = ids(one.rows), ids(one.evaluation)
        assert (len(trained), len(evaluated)) == (16, 4)
        assert sorted(trained + evaluated) == sorted(ids(prepared(f"data.path={path}").rows))
        assert one.rows.tokens == sum(map(len, trained))


def test_what_was_cut_is_counted_where_it_lies(tmp_path: Path) -> None:
    rows = [{"prompt": "b", "completion": "c" * (90 if number % 2 else 2)} for number in range(19)]
    path = write_rows(tmp_path / "rows.jsonl", *rows, {"prompt": "b" * 90, "completion": "c"})
    found = prepared(f"data.path={path}", "data.max_length=16", "data.eval_fraction=0.3")
    parts = (found.rows, found.evaluation)
    for part in parts:
        assert part is not None
        assert sum(len(row) == 16 for row in ids(part)) == sum(part.were_cut)
    trained, evaluated = parts
    assert evaluated is not None and 0 < evaluated.cut == sum(evaluated.were_cut) < 9
    assert (trained.cut + evaluated.cut, trained.dropped, evaluated.dropped) == (10, 1, 0)


def test_evaluation_rows_of_another_kind_of_file(path: str) -> None:
    datasets.Dataset.from_list(texts(3)).to_csv("held.csv")
    found = prepared(f"data.path={path}", "data.eval_path=held.csv")
    assert found.evaluation is not None and len(found.evaluation) == 3


def test_splits_of_a_saved_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = datasets.ClassLabel(names=["low", "high"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    parts = {
        name: datasets.Dataset.from_dict({"text": ["a"] * len(labels), "label": labels}, features=features)
        for name, labels in {"train": [1, 0, 1], "test": [0, 1]}.items()
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    found = prepared(f"data.path={tmp_path / 'saved'}", "data.eval_split=test")
    assert found.config.data.labels == ["low", "high"]
    assert found.evaluation is not None
    assert (found.rows.rows["labels"][:], found.evaluation.rows["labels"][:]) == ([1, 0, 1], [0, 1])


class TestWhatIsTrainedOnIsNotEvaluatedOn:
    @pytest.fixture(autouse=True)
    def folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two files together, and three of a split each."""
        monkeypatch.chdir(tmp_path)
        for name in ("all/a", "all/b", "split/train", "split/test", "split/validation"):
            Path(name).parent.mkdir(exist_ok=True)
            write_rows(f"{name}.jsonl", *[{"text": f"{name} {number}"} for number in range(3)])
        datasets.DatasetDict(train=datasets.Dataset.from_list(texts(2))).save_to_disk("saved")

    @pytest.mark.parametrize(
        ("path", "held", "key"),
        [
            ("all/a.jsonl", "data.eval_path=all/../all/a.jsonl", "eval_path"),
            ("all", "data.eval_path=all/b.jsonl", "eval_path"),
            ("all/b.jsonl", "data.eval_path=all", "eval_path"),
            ("split", "data.eval_path=split/train.jsonl", "eval_path"),
            ("split", "data.eval_path=split", "eval_path"),
            ("split", "data.eval_split=train", "eval_split"),
            ("saved", "data.eval_path=saved", "eval_path"),
        ],
    )
    def test_the_same_rows(self, path: str, held: str, key: str) -> None:
        with pytest.raises(UserError, match=rf"^data\.{key}: expected rows that are not trained on, got "):
            prepared(f"data.path={path}", held)

    @pytest.mark.parametrize(
        "held", ["data.eval_path=split/test.jsonl", "data.eval_split=test", "data.eval_path=all/a.jsonl"]
    )
    def test_others(self, held: str) -> None:
        found = prepared("data.path=split", held)
        assert found.evaluation is not None
        trained = {found.tokenizer.decode(row) for row in ids(found.rows)}
        assert all("split/train" in text for text in trained) and len(trained) == len(found.evaluation) == 3


def test_the_order_of_given_labels_is_kept(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *classes(4))
    found = prepared(f"data.path={path}", "data.labels=[b, a, c]")
    assert found.config.data.labels == ["b", "a", "c"] and found.rows.rows["labels"][:] == [1, 0, 1, 0]


def test_columns_that_nobody_asked_for_do_no_harm(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    path = write_rows(tmp_path / "rows.jsonl", *[row | {"tools": tools, "id": 3} for row in chats(4)])
    plain = write_rows(tmp_path / "plain.jsonl", *chats(4))
    assert ids(prepared(f"data.path={path}").rows) == ids(prepared(f"data.path={plain}").rows)


def test_answers_that_were_all_cut_are_not_the_templates_fault(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "many words " * 50}]
    path = write_rows(tmp_path / "rows.jsonl", *[{"messages": turns}] * 4)
    note = "the model does not learn to stop: all rows were cut before the end of an answer; raise data.max_length, now"
    assert prepared(f"data.path={path}", "data.max_length=64").notes == [f"{note} 64"]
    assert prepared(f"data.path={path}").notes == []


def test_renamed_columns(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *[{"review": row["text"], "stars": row["label"]} for row in classes()])
    found = prepared(f"data.path={path}", "data.columns={text: review, label: stars}")
    assert found.config.model.task == "sequence-classification" and found.config.data.labels == ["a", "b"]


def test_paths_are_whole_and_names_stay(path: str, tmp_path: Path) -> None:
    write_rows("chats.jsonl", *chats(2))
    write_rows("held.jsonl", *chats(2))
    Path("plain").touch()  # a file of a shipped template's name
    settings = ["data.path=chats.jsonl", f"data.eval_path={tmp_path}/held.jsonl", "data.chat_template=plain"]
    found = prepared(*settings)
    wanted = (str(tmp_path / "chats.jsonl"), str(tmp_path / "held.jsonl"))
    assert (found.config.data.path, found.config.data.eval_path) == wanted
    assert found.config.data.chat_template == "plain"
    assert "### User:" in found.tokenizer.decode(ids(found.rows)[0])


@pytest.mark.parametrize(
    ("model", "rows", "task", "length"),
    [
        ("llama", chats(2), "causal-lm", 128),
        ("bert", texts(2), "masked-lm", 64),
        ("bert", classes(2), "sequence-classification", 64),
        ("llama", classes(2), "sequence-classification", 128),
        ("t5", [{"prompt": "a", "completion": "b"}], "seq2seq-lm", 1024),
        ("marian", [{"prompt": "a", "completion": "b"}], "seq2seq-lm", 64),
        ("llama", [{"prompt": "a", "completion": "b"}], "causal-lm", 128),
    ],
)
def test_the_task_and_the_length_follow_from_model_and_data(
    model: str, rows: list[dict[str, Any]], task: str, length: int, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    found = prepared(f"model.name={checkpoints[model]}", f"data.path={path}").config
    assert (found.model.task, found.data.max_length, found.model.quantization) == (task, length, "none")
