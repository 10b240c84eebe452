"""The table of whole fine-tunings."""

from __future__ import annotations

from pathlib import Path

from fastpeft.bench.records import load
from fastpeft.bench.trainings_table import trainings_table
from tests.bench.fake_peers import FLOPS
from tests.bench.test_finetune import Measured


def test_everyone_who_ran_has_a_row_and_others_a_reason(tmp_path: Path) -> None:
    measured = Measured(tmp_path, ["fastpeft", "trl", "peft + liger"])
    measured()
    table = trainings_table(load(measured.file.path)).splitlines()
    rows = {line.split(" | ")[0]: line for line in table}
    assert rows["| PEFT, Trainer"].startswith("| PEFT, Trainer | 20.0 | 1.00 | 800 | ")
    assert rows["| fastpeft, Trainer"] == f"| fastpeft, Trainer | 10.0 | 0.50 | 1600 | {FLOPS / 1e10 / 2:.2f} | 100 |"
    assert "left out: not of this machine" in rows["| PEFT, TRL's SFTTrainer"]
    assert "left out: " in rows["| PEFT + Liger, Trainer"] and "| fastpeft without" not in "".join(table)
    assert "medians of the last 4 of 6 steps" in table[-1]
