"""The coverage matrix: a few cells beside the committed record, what counts as lost, what a crash costs, the page."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpeft.bench.combinations import Served
from fastpeft.bench.matrix import running
from fastpeft.bench.matrix.__main__ import main
from fastpeft.bench.matrix.cells import Cell, Outcome, cells, run
from fastpeft.bench.matrix.families import FAMILIES
from fastpeft.bench.matrix.kept import cell_of, equal, keep, lost
from fastpeft.bench.matrix.page import matrix_table
from fastpeft.bench.matrix.parity import Parity, compare
from fastpeft.bench.records import Record, RecordFile, load
from fastpeft.bench.tables import insert
from fastpeft.integrations.transformers import sample_batch

ROOT = Path(__file__).resolve().parents[2]
RECORD, PAGE = ROOT / "benchmarks" / "results" / "cpu" / "matrix.jsonl", ROOT / "docs" / "reference" / "coverage.md"
SUBSET = [
    Cell("llama", "NF4", "DoRA", "checkpointing"),
    Cell("qwen2", "dense", "LoRA, two active adapters", "eager"),
    Cell("bert", "dense", "LoRA", "autocast"),
    Cell("t5", "dense", "LoRA", "eager"),
    Cell("mixtral", "dense", "LoRA, stacked experts too", "eager"),
    Cell("vit", "NF4", "LoRA", "eager"),
]
CELL = SUBSET[0]
SERVED, CLOSE = Served(14, 14, (), 2, 2), Parity("loss", 1e-7, 1e-6)
KEPT = Outcome("compared", "", SERVED, CLOSE)


def record(tmp_path: Path, outcome: Outcome, name: str = "a") -> Record:
    return keep(RecordFile(tmp_path / f"{name}.jsonl", running.here()), CELL, outcome)


@pytest.mark.parametrize("cell", SUBSET, ids=str)
def test_what_the_record_says_still_holds(cell: Cell, tmp_path: Path) -> None:
    before = [each for each in load(RECORD) if cell_of(each) == cell]
    ((_, outcome),) = run(FAMILIES[cell.family], [cell])
    now = keep(RecordFile(tmp_path / "now.jsonl", running.here()), cell, outcome)
    assert before and equal(before[0])
    assert not lost(before, [now])


def test_nothing_is_lost_where_all_is_as_before_or_better(tmp_path: Path) -> None:
    kept = record(tmp_path, KEPT)
    assert not lost([kept], [kept])
    assert not lost([], [kept])
    assert not lost([record(tmp_path, Outcome("none", "PEFT: no"))], [kept])
    assert not lost([record(tmp_path, replace(KEPT, served=Served(14, 2, ("why",), 2, 0)))], [kept])


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (
            replace(KEPT, served=Served(14, 12, ("no op",), 2, 2)),
            "12 of 14 adapter layers served, 14 of 14 before: no op",
        ),
        (replace(KEPT, served=Served(14, 14, (), 2, 0)), "0 of 2 MLPs served, 2 of 2 before"),
        (replace(KEPT, parity=Parity("loss", 1e-2, 1e-6)), "loss is off by 1.0e-02, budget 1.0e-06"),
        (Outcome("failed", "fastpeft: ValueError: x"), "failed: fastpeft: ValueError: x"),
        (Outcome("broken", "the process ended with code -11"), "broken: the process ended with code -11"),
        (Outcome("none", "PEFT: refused"), "refused: PEFT: refused"),
    ],
)
def test_what_is_lost_is_named(now: Outcome, words: str, tmp_path: Path) -> None:
    (line,) = lost([record(tmp_path, KEPT)], [record(tmp_path, now)])
    assert line.startswith(f"{CELL}: {words}")


def step(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([1.0, value]) for name, value in values.items()}


def test_a_wrong_gradient_is_beyond_its_budget() -> None:
    exact = step(loss=1.0, a=1.0, b=1.0)
    peft = step(loss=1.0 + 1e-6, a=1.0 + 1e-6, b=1.0 + 1e-6)
    assert compare(step(loss=1.0 + 1e-6, a=1.0 + 2e-6, b=1.0), peft, exact).kept
    worst = compare(step(loss=1.0 + 1e-6, a=1.0, b=1.1), peft, exact)
    assert worst.what == "b" and not worst.kept
    assert compare(step(loss=1.1, a=1.1, b=1.0 + 5e-6), peft, exact).what != "b"
    assert not compare(step(loss=1.0, a=1.0), peft, exact).kept  # a gradient that is missing
    assert not compare(step(loss=1.0, a=1.0, b=float("nan")), peft, exact).kept


def test_errors_without_fp64_have_some_roundings_of_budget() -> None:
    peft = step(loss=1.0, a=1.0)
    near = step(loss=1.0, a=1.0 + 1e-6)
    assert compare(near, peft, peft, wide=False).kept
    assert not compare(step(loss=1.0, a=1.0 + 1e-4), peft, peft, wide=False).kept


def _dies(*_: Any) -> None:
    os._exit(3)


def _sleeps(*_: Any) -> None:
    time.sleep(60)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are forked")
@pytest.mark.parametrize(("does", "words"), [(_dies, "ended with code 3"), (_sleeps, "killed after 1 s")])
def test_a_crash_costs_its_own_cells(does: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_warm", lambda: None)
    monkeypatch.setattr(running, "_child", does)
    out = tmp_path / "out.jsonl"
    mine = [CELL, replace(CELL, mode="eager")]
    assert running.run_all(mine, out, limit_s=1.0) == 0
    assert [(each.metric, cell_of(each)) for each in load(out)] == [("broken", cell) for cell in mine]
    assert all(words in each.settings["reason"] for each in load(out))


def test_a_run_names_what_it_lost_and_leaves_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, KEPT, "record")
    before = (tmp_path / "record.jsonl").read_bytes()
    page = tmp_path / "page.md"
    page.write_text("<!-- measured matrix: begin -->\n<!-- measured matrix: end -->\n")
    worse = Outcome("compared", "", Served(14, 0, ("no op",), 2, 2), CLOSE)

    def instead(chosen: list[Cell], out: Path, *_: float) -> int:
        keep(RecordFile(out, running.here()), CELL, worse)
        return 0

    monkeypatch.setattr("fastpeft.bench.matrix.__main__.run_all", instead)
    arguments = ["--out", str(tmp_path / "out.jsonl"), "--record", str(tmp_path / "record.jsonl"), "--page", str(page)]
    assert main(arguments) == 1
    assert f"lost: {CELL}: 0 of 14 adapter layers served" in capsys.readouterr().out
    assert (tmp_path / "record.jsonl").read_bytes() == before
    assert main([*arguments, "--accept"]) == 0
    assert "0/14" in page.read_text()


def test_what_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path, KEPT, "record")
    page = tmp_path / "page.md"
    page.write_text("<!-- measured matrix: begin -->\n<!-- measured matrix: end -->\n")
    asked: list[list[Cell]] = []
    monkeypatch.setattr("fastpeft.bench.matrix.__main__.run_all", lambda chosen, *_: asked.append(chosen) or 0)
    files = ["--out", str(tmp_path / "out.jsonl"), "--record", str(tmp_path / "record.jsonl"), "--page", str(page)]
    every = ["--only", "llama: DoRA over NF4"]
    assert main([*files, *every]) == 0 and main([*files, *every, "--missing"]) == 0
    record(tmp_path, KEPT, "out")
    assert main([*files, *every, "--resume"]) == 0
    assert [len(each) for each in asked] == [3, 2, 2] and CELL not in asked[1] + asked[2]


def test_the_page_is_that_of_the_record() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert insert(text, matrix_table(load(RECORD)), "matrix") == text


def test_families_are_as_many_as_promised() -> None:
    kinds = [family.kind for family in FAMILIES.values()]
    assert sum(kind != "picture, sound" for kind in kinds) >= 40
    assert {"vit", "whisper", "llava"} <= FAMILIES.keys()
    assert len(set(cells("llama"))) == 27


def test_a_batch_for_a_model_of_any_length() -> None:
    assert sample_batch(FAMILIES["xlnet"].build(), tokens=12)["input_ids"].shape == (2, 12)
