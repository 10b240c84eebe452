"""`fastpeft plan` as a new user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoints import Checkpoints
from tests.commands import run

SMALL = ("--seq", "32", "--rank", "4", "--method", "lora", "--no-largest")


def test_it_fits_or_not(checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", checkpoints["llama"], *SMALL, "--gpu-memory", "8GiB", "--gpu-memory", "64MiB", "--json"]
    answer = run(capsys, *words)
    found = json.loads(answer.out)["plans"]
    assert answer.code == 1 and [each["fits"] for each in found] == [True, False]
    assert found[1]["changes"] and answer.err == ""


def test_a_table_says_what_is_beyond_the_last_position(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((Path(checkpoints["llama"]) / "config.json").read_text())
    last = config["max_position_embeddings"]
    words = [
        "plan",
        checkpoints["llama"],
        *SMALL,
        "--gpu-memory",
        "8GiB",
        "--gpu-memory",
        "16GiB",
        "--seq",
        f"{last + 1}",
    ]
    answer = run(capsys, *words)
    assert answer.code == 0 and answer.out.endswith(
        f"note: beyond the model's last position, {last}: extend its rope first\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere/such-model", "--gpu-memory", "8GiB"], "MODEL: "),
        (["llama-3.1-8b", "--gpu-memory", "8G"], "--gpu-memory: expected a size such as 24GiB or 24GB, got '8G'"),
        (["llama-3.1-8b", "--gpu-memory", "8GiB", "--host-memory", "x"], "--host-memory: expected a size"),
        (["llama-3.1-8b", "--gpu-memory", "8GiB", "--optimizer", "adam"], "optimizer: expected one of"),
    ],
)
def test_wrong_input(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "plan", *words, *SMALL)
    assert answer.code == 2 and said in answer.err and answer.err.count("\n") == 1 and not answer.out
