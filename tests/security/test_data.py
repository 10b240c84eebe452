"""Data that means harm: archives under other names, files that grow, rows that name other files and addresses."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import resource
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpeft.config import FastpeftConfig
from fastpeft.data import untrusted
from fastpeft.data.rows import load_rows
from fastpeft.errors import UserError
from fastpeft.yaml_loading import LARGEST, parse_yaml
from tests.fresh import run_fresh

ROW = b'{"text": "some words"}\n'


def tar(path: Path) -> None:
    (path.parent / "row").write_bytes(ROW)
    with tarfile.open(path, "w") as file:
        file.add(path.parent / "row", "../../row")


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("row.jsonl", ROW)


def behind_text(path: Path) -> None:
    path.write_bytes(ROW)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("row.jsonl", ROW)


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("gzip", lambda path: path.write_bytes(gzip.compress(ROW))),
        ("bz2", lambda path: path.write_bytes(bz2.compress(ROW))),
        ("xz", lambda path: path.write_bytes(lzma.compress(ROW))),
        ("zip", zipped),
        ("zip", behind_text),
        ("tar", tar),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt"])
def test_archives_are_not_unpacked(kind: str, write: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    """`datasets` would, by what is in a file and whatever its name is: to any size."""
    write(tmp_path / name)
    with pytest.raises(UserError, match=f"got {kind} in .*{name}; unpack it first"):
        load_rows(str(tmp_path / name), split=None)


def test_a_table_that_grows_out_of_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One long value, named again and again: neither the file's size nor what it says of itself tells."""
    monkeypatch.setattr(untrusted, "FREE", 1 << 20)
    word = pa.array(["x" * (1 << 16)])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), word)
    pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "rows.parquet").stat().st_size < 10_000
    with pytest.raises(UserError, match=r"expected at most 1 MiB in .*: it grows out of proportion"):
        load_rows(str(tmp_path / "rows.parquet"), split=None)
    pq.write_table(pa.table({"text": ["some words", "and others"]}), tmp_path / "rows.parquet")
    assert len(load_rows(str(tmp_path / "rows.parquet"), split=None)) == 2


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (pa.array(["x" * (16 << 20)]), r"expected at most 1 MiB in .*b.parquet, got more"),
        (None, r"b.parquet cannot be read as parquet: "),
    ],
)
def test_of_several_tables_the_one_that_is_wrong_is_named(
    second: pa.Array | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted, "FREE", 1 << 20)
    for name in "abc":
        pq.write_table(pa.table({"text": ["some words", "and others"]}), tmp_path / f"{name}.parquet")
    assert len(load_rows(str(tmp_path), split=None)) == 6
    if second is None:
        (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    else:
        column = pa.DictionaryArray.from_arrays(pa.array([0] * 1024, pa.int32()), second)
        pq.write_table(pa.table({"text": column}), tmp_path / "b.parquet", compression="zstd", store_schema=False)
    with pytest.raises(UserError, match=said):
        load_rows(str(tmp_path), split=None)


@pytest.mark.parametrize(("depth", "end", "line"), [(200_000, "", 1), (257, "", 1), (30_000, "\n", 256)])
def test_brackets_that_would_end_the_process(depth: int, end: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": ' + f"[{end}" * depth + f"]{end}" * depth + "}\n")
    with pytest.raises(UserError, match=rf"rows.jsonl, line {line}: expected at most 256 brackets in one another"):
        load_rows(str(tmp_path / "rows.jsonl"), split=None)


def test_brackets_within_texts_are_text(tmp_path: Path) -> None:
    texts = ['\\"' + "[{" * 500, "\\", '["', "[{" * 500]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert load_rows(str(tmp_path / "rows.jsonl"), split=None)["text"] == texts


@pytest.mark.full
@pytest.mark.parametrize("rows", ["one text a thousand times", "a list of nothing"])
def test_a_table_that_grows_in_a_single_step(rows: str, tmp_path: Path) -> None:
    """Less than a kilobyte, of which Arrow makes ten gigabytes before there is anything to count."""
    if rows == "one text a thousand times":
        text = pa.array(["x" * (16 << 20)])
        column = pa.DictionaryArray.from_arrays(pa.array([0] * 1024, pa.int32()), text)
    else:
        column = pa.ListArray.from_arrays(pa.array([0, 200_000_000], pa.int32()), pa.nulls(200_000_000, pa.int64()))
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": column}), file, compression="zstd", store_schema=False)
    assert file.stat().st_size < 1000
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with pytest.raises(UserError, match=r"expected at most 1024 MiB in .*: it grows out of proportion"):
        load_rows(str(file), split=None)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < max(before, 6 << 20)  # KiB


def test_saved_rows_that_are_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads what it saves in place; what is compressed it would make room for."""
    monkeypatch.setattr(untrusted, "FREE", 1 << 20)
    datasets.Dataset.from_dict({"text": ["words" * 1000] * 1000}).save_to_disk(tmp_path / "saved")
    assert len(load_rows(str(tmp_path / "saved"), split=None)) == 1000
    file = tmp_path / "saved" / "data-00000-of-00001.arrow"
    schema = pa.ipc.open_stream(file.read_bytes()).schema
    with pa.ipc.new_stream(str(file), schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_batch(pa.record_batch([pa.array(["x" * (10 << 20)])], schema=schema))
    assert file.stat().st_size < 10_000
    with pytest.raises(UserError, match=r"expected at most 1 MiB in .*: it grows out of proportion"):
        load_rows(str(tmp_path / "saved"), split=None)


def test_pictures_are_left_out_unopened(tmp_path: Path) -> None:
    """A row with a picture is a file or an address, which whoever reads the row would open."""
    rows = datasets.Dataset.from_dict({"text": ["words"], "image": [{"path": "http://127.0.0.1:9/x", "bytes": None}]})
    kinds = {"text": datasets.Value("string"), "image": datasets.Image()}
    pq.write_table(rows.cast(datasets.Features(kinds)).data.table, tmp_path / "rows.parquet")
    assert load_rows(str(tmp_path / "rows.parquet"), split=None)[0] == {"text": "words"}
    nested = datasets.Features({"deep": datasets.List({"one": datasets.Image()}), "text": datasets.Value("string")})
    empty = datasets.Dataset.from_dict({"deep": [[]], "text": ["words"]}, features=nested)
    empty.save_to_disk(tmp_path / "saved")
    assert load_rows(str(tmp_path / "saved"), split=None).column_names == ["text"]


@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "/etc/passwd", "..", 3])
def test_saved_rows_are_in_their_folder(name: object, tmp_path: Path) -> None:
    for folder in ("saved", "other"):
        datasets.Dataset.from_dict({"text": ["words"]}).save_to_disk(tmp_path / folder)
    state = tmp_path / "saved" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match=r"expected names of files in .*saved, got"):
        load_rows(str(tmp_path / "saved"), split=None)


def test_splits_are_in_their_folder(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["words"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["../../elsewhere"]}))
    with pytest.raises(UserError, match=r"expected names of files in .*saved, got '../../elsewhere'"):
        load_rows(str(tmp_path / "saved"), split=None)


@pytest.mark.parametrize(
    "link", ["[*a{0},*a{0},*a{0},*a{0},*a{0},*a{0},*a{0},*a{0},*a{0},*a{0}]", "{{<<: [*a{0},*a{0}]}}"]
)
def test_few_lines_that_stand_for_many(link: str) -> None:
    """Billion laughs: in lists, and in merged mappings, which PyYAML copies."""
    laughs = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {link.format(i - 1)}\n" for i in range(1, 25))
    with pytest.raises(ValueError, match=r"its aliases stand for \de\+\d+ values, at most 1048576 are allowed"):
        parse_yaml(laughs, "run.yaml")


def test_an_alias_is_fine_and_a_long_file_is_not(tmp_path: Path) -> None:
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]", "x") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    assert parse_yaml("", "x") is None
    (tmp_path / "run.yaml").write_text("x" * (LARGEST + 1))
    with pytest.raises(ValueError, match=r"run.yaml: expected at most 1048576 characters, got more"):
        FastpeftConfig.from_yaml(tmp_path / "run.yaml")


def test_a_number_beyond_floats() -> None:
    """In sixties, as YAML 1.1 has them."""
    with pytest.raises(ValueError, match="not valid YAML: int too large to convert to float"):
        parse_yaml("a: " + ":".join(["1", *["59"] * 300]) + ".5", "run.yaml")


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    for text in ("!!python/object/apply:os.system ['true']", "!!python/name:os.system ''"):
        with pytest.raises(ValueError, match="not valid YAML"):
            parse_yaml(text, "run.yaml")


@pytest.mark.full
def test_what_the_depth_is_checked_for() -> None:
    """Arrow's own reader; once this passes without our check, json_files.DEEPEST can go."""
    code = """
import pyarrow.json, io
pyarrow.json.read_json(io.BytesIO(b'{"a": ' + b'[' * 1000000 + b']' * 1000000 + b'}'))
"""
    with pytest.raises(AssertionError, match="exit code -11"):
        run_fresh(code)
