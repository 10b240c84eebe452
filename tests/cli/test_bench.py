"""`fastpeft bench` as a new user meets it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastpeft.bench.ops import ceilings, finding
from fastpeft.bench.ops.case import Forward, Inputs, OpCase
from fastpeft.bench.ops.models import Shape
from fastpeft.bench.ops.quant import case
from fastpeft.bench.records import load
from tests.commands import run

SMALL = case(Shape("tiny", 64, 128, 1, 1, 64, 100), torch.float32)


def wrong(inputs: Inputs) -> Forward:
    return lambda: tuple(1.5 * y for y in SMALL.reference(inputs)())


def interrupted(inputs: Inputs) -> Forward:
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def cases(monkeypatch: pytest.MonkeyPatch) -> list[OpCase]:
    """One op of small cases, those of this list."""
    found = [SMALL]

    def some(device: str, depth: str) -> Iterator[OpCase]:
        return iter(found)

    monkeypatch.setattr(ceilings, "_SIZES", {"cpu": (2**12, 32)})
    monkeypatch.setattr(finding, "ops", lambda: {"quant": ("Decoding.", some)})
    return found


def test_a_table_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "ops.jsonl"
    answer = run(capsys, "bench", "--quick", "--rounds", "2", "--out", str(out))
    assert answer.code == 0 and answer.err.startswith("* quant        Decoding.\nquant: decode NF4, tiny up_proj")
    assert "    torch.compile left out: compiling takes longer than a quick run" in answer.err
    assert answer.out.startswith("quant: decode NF4, tiny up_proj 128 x 64, float32, forward") and "copy" in answer.out
    timed = {record.peer: record for record in load(out) if record.metric == "time"}
    assert {"fastpeft", "copy", "torch", "torch again"} <= set(timed)
    assert all(len(record.samples) == 2 and record.suite == "bench" for record in timed.values())


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "bench", "--quick", "--rounds", "1", "--peer", "fastpeft", "--json", "--quiet")
    records = json.loads(answer.out)
    assert (answer.code, answer.err) == (0, "")
    assert [each["peer"] for each in records if each["metric"] == "time"] == ["fastpeft", "fastpeft again"]


def test_wrong_numbers_of_ours_are_exit_code_1(cases: list[OpCase], capsys: pytest.CaptureFixture[str]) -> None:
    cases[:] = [replace(SMALL, peers={"fastpeft": wrong})]
    answer = run(capsys, "bench", "--quick", "--rounds", "1", "--quiet")
    assert answer.code == 1 and answer.err.startswith("fastpeft: quant, decode NF4, tiny") and "torch" in answer.out
    assert "is over its budget" in answer.err


def test_nothing_measured_is_exit_code_1(cases: list[OpCase], capsys: pytest.CaptureFixture[str]) -> None:
    cases[:] = [replace(SMALL, peers={"fastpeft": SMALL.peers["fastpeft"], "liger": wrong})]
    answer = run(capsys, "bench", "--quick", "--rounds", "1", "--peer", "liger", "--quiet")
    assert (answer.code, answer.err) == (1, "fastpeft: nothing could be measured\n")


def test_ctrl_c_keeps_what_was_measured(
    cases: list[OpCase], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases[:] = [SMALL, replace(SMALL, name="second", peers={"fastpeft": interrupted})]
    out = tmp_path / "ops.jsonl"
    answer = run(capsys, "bench", "--quick", "--rounds", "1", "--out", str(out), "--quiet")
    assert (answer.code, answer.err) == (130, "fastpeft: interrupted\n")
    assert "tiny up_proj" in answer.out and "fastpeft" in {r.peer for r in load(out) if r.metric == "time"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--op", "quantt"], "--op: expected one of quant, got 'quantt'"),
        (["--case", "("], "--case: expected a regular expression, got '(': "),
        (["--case", "Llama"], f"--case: expected what is found in a case's name, such as {SMALL.name!r}, got 'Llama'"),
        (["--dtype", "float16"], "--dtype: expected one that these cases have, float32, got 'float16'"),
        (["--peer", "pefft"], "--peer: expected one that these cases have, torch, fastpeft, copy, "),
        (["--quick", "--full"], "--full: expected one of --quick and --full, got both"),
        (["--rounds", "0"], "--rounds"),
        (["--device", "tpu"], "--device"),
        (["--device", "cuda"], "--device: expected 'cpu', got 'cuda', but torch sees no GPU"),
        (["--out", "."], "--out: expected a file that can be written, got '.'"),
    ],
)
def test_wrong_command_lines(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "bench", *words, "--quiet")
    assert answer.code == 2 and answer.out == "" and answer.err.count("\n") == 1 and message in answer.err


def test_the_help_names_the_ways_to_call_it(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "bench", "--help")
    assert answer.code == 0 and "--quick" in answer.out and "fastpeft bench --quick" in answer.out
