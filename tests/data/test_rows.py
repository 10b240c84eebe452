"""Rows from every kind of file and folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from datasets.arrow_writer import ArrowWriter

from fastpeft.data.rows import is_document, load_rows
from fastpeft.errors import UserError
from tests.checkpoints import write_rows

ROWS = [{"text": "some, words", "label": 1}, {"text": "“others”\tand more", "label": 0}]
TABLE = datasets.Dataset.from_list(ROWS)


def write_csv(path: Path) -> None:
    TABLE.to_csv(path)


def write_tsv(path: Path) -> None:
    TABLE.to_csv(path, sep="\t")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda path: write_rows(path, *ROWS),
    "rows.ndjson": lambda path: write_rows(path, *ROWS),
    "ROWS.JSONL": lambda path: write_rows(path, *ROWS),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "lines.json": lambda path: write_rows(path, *ROWS),
    "rows.csv": write_csv,
    "rows.tsv": write_tsv,
    "rows.parquet": lambda path: TABLE.to_parquet(path),
    "saved": lambda path: TABLE.save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_come_back(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert load_rows(str(tmp_path / name), split="train").to_list() == ROWS


def test_a_tables_cells_are_text_but_for_whole_numbers_as_classes(tmp_path: Path) -> None:
    long = "a" * 200_000
    (tmp_path / "some.csv").write_text(f'\ufefftext,label,stars\n\n007,None,2\n"{long}\n""b"",",NA,10\n')
    wanted = [
        {"text": "007", "label": "None", "stars": "2"},
        {"text": f'{long}\n"b",', "label": "NA", "stars": "10"},
    ]
    assert load_rows(str(tmp_path / "some.csv"), split=None).to_list() == wanted
    numbers = load_rows(str(tmp_path / "some.csv"), split=None, label="stars")
    assert numbers.to_list() == [row | {"stars": int(row["stars"])} for row in wanted]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv", "rows.parquet"])
def test_a_folder_of_files_is_read_in_the_order_of_their_names(name: str, tmp_path: Path) -> None:
    for first in "ba":
        WRITERS[name](tmp_path / f"{first}-{name}")
    (tmp_path / "README.md").write_text("What this is.")
    (tmp_path / "notes.log").write_text("not data")
    (tmp_path / "sub.csv").mkdir()
    assert load_rows(str(tmp_path), split="train").to_list() == ROWS * 2


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    text = "Title\n\n  a line\r\nanother – line\n\n\n"
    (tmp_path / "one.txt").write_text(text, newline="")
    (tmp_path / "two.MD").write_text("second")
    [row] = load_rows(str(tmp_path / "one.txt"), split="train")
    assert row == {"text": text.replace("\r\n", "\n")}
    assert load_rows(str(tmp_path), split="train")["text"][:] == [row["text"], "second"]


def test_a_long_text_file_is_one_row_too(tmp_path: Path) -> None:
    text = "many words " * 2_000_000  # more than is read at once
    (tmp_path / "long.txt").write_text(text)
    assert load_rows(str(tmp_path / "long.txt"), split="train")["text"][:] == [text]


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"text": "before"})
    assert load_rows(path, split="train")["text"][:] == ["before"]
    write_rows(path, {"text": "after!"})
    assert load_rows(path, split="train")["text"][:] == ["after!"]


def test_splits_of_a_saved_dictionary(tmp_path: Path) -> None:
    datasets.DatasetDict(train=TABLE, test=TABLE.select([0])).save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    assert load_rows(path, split=None).to_list() == ROWS
    assert load_rows(path, split="test").to_list() == ROWS[:1]
    with pytest.raises(
        UserError, match=r"^data.split: expected one of train, test, got 'tset', did you mean 'test'\?$"
    ):
        load_rows(path, split="tset")


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (("train", "test", "validation"), "train", ["train"]),
        (("train", "test", "validation"), None, ["train"]),
        (("train", "test", "validation"), "test", ["test"]),
        (("train-00000", "train-00001", "dev"), "train", ["train-00000", "train-00001"]),
        (("train", "my_valid"), "validation", ["my_valid"]),
        (("Train.en", "squad2-TEST"), "test", ["squad2-TEST"]),
        (("eval",), None, ["eval"]),
        (("train", "more"), "train", ["more", "train"]),
        (("trainer", "tests"), "train", ["tests", "trainer"]),
    ],
)
def test_files_named_after_splits(names: tuple[str, ...], split: str | None, found: list[str], tmp_path: Path) -> None:
    for name in names:
        write_rows(tmp_path / f"{name}.jsonl", {"text": name})
    assert load_rows(str(tmp_path), split=split)["text"][:] == found


def test_a_split_that_no_file_is_named_after(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.csv", {"text": "a"})
    write_rows(tmp_path / "test.csv", {"other": "b"})
    with pytest.raises(UserError, match=r"^data.split: expected one of test, train, got 'tset', did you mean 'test'"):
        load_rows(str(tmp_path), split="tset")


def test_a_file_of_no_split_beside_one_that_is_held_back(tmp_path: Path) -> None:
    for name in ("train", "test", "more"):
        write_rows(tmp_path / f"{name}.jsonl", {"text": name})
    message = "^data.path: expected files that are all named after a split, or none, got more.jsonl beside test.jsonl"
    with pytest.raises(UserError, match=message):
        load_rows(str(tmp_path), split="train")


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "rows.jsonl", *ROWS)
    assert load_rows("~/rows.jsonl", split="train").to_list() == ROWS


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a.txt"], True),
        (["a.txt", "b.md"], True),
        (["a.txt", "README.md"], True),
        (["README.md", "a.jsonl"], False),
        (["a.csv"], False),
        ([], False),
    ],
)
def test_which_folders_hold_documents(names: list[str], wanted: bool, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert is_document(str(tmp_path)) is wanted


def test_which_files_are_documents() -> None:
    found = [name for name in ("a.txt", "a.MD", "a.jsonl", "some/rows", "a.txt.csv") if is_document(name)]
    assert found == ["a.txt", "a.MD"]


class TestHub:
    """With `datasets` answering in its place."""

    @pytest.fixture(autouse=True)
    def reachable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastpeft.data.rows.unreachable", lambda: None)

    def test_id_configuration_and_split(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(path: str, name: str | None) -> datasets.DatasetDict:
            assert (path, name) == ("some/rows", "de")
            return datasets.DatasetDict(train=TABLE, validation=TABLE.select([1]))

        monkeypatch.setattr(datasets, "load_dataset", load)
        assert load_rows("some/rows", split="validation", name="de").to_list() == ROWS[1:]

    def test_what_the_hub_says_is_handed_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(path: str, name: str | None) -> None:
            try:
                raise OSError("404 Client Error for url https://...")
            except OSError as error:
                raise datasets.exceptions.DatasetNotFoundError("Dataset 'some/rows' doesn't exist") from error

        monkeypatch.setattr(datasets, "load_dataset", load)
        message = (
            "^data.path: some/rows is no local file, and could not be had from the hub: Dataset 'some/rows' doesn't"
        )
        with pytest.raises(UserError, match=message):
            load_rows("some/rows", split="train")

    def test_a_setting_of_datasets_is_put_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastpeft.data.rows.unreachable", lambda: "it is far away")
        with pytest.raises(UserError, match=r"^data.path: some/rows is no local file, and it is far away$"):
            load_rows("some/rows", split="train")
        assert not datasets.config.HF_HUB_OFFLINE


def test_text_files_are_in_memory_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, held = 100_000, []
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"{number}" * (size // len(str(number))))
    written = ArrowWriter.write_row

    def watched(*given: Any, **named: Any) -> None:
        written(*given, **named)
        held.append(pyarrow.total_allocated_bytes())

    monkeypatch.setattr(ArrowWriter, "write_row", watched)
    before = pyarrow.total_allocated_bytes()
    assert len(load_rows(str(tmp_path), split=None)) == len(held) == 20
    assert max(held) - before < 5 * size
