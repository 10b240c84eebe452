"""`fastpeft verify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastpeft.cli import app

from .conftest import SHIPPED


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_base_with_a_fresh_adapter(quantization: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["verify", str(SHIPPED), "--quantization", quantization, "--rank", "4", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert "28 of 28 adapter layers accelerated" in shown.out and "fastpeft verify: passed" in shown.out
    assert ("over 4-bit" in shown.out) == (quantization == "nf4") and not shown.err


def test_a_run_s_adapter_as_json(qlora_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["verify", str(qlora_run), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and all(check["passed"] for check in found["checks"])
    assert any(check["what"] == "gradient of a parameter" for check in found["checks"])
    adapted = {"lora_linear over 4-bit", "lora_mlp"}
    others = {"attention", "loss without logits", "rms_norm", "rotary"}
    assert {row["op"] for row in found["report"]["rows"]} == adapted | others


def test_an_encoder_in_bfloat16(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["verify", str(encoder), "--dtype", "bfloat16", "--quiet"]) == 0
    assert "fastpeft verify: passed" in capsys.readouterr().out


def test_a_failed_check_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fastpeft.verification.Check.passed", property(lambda check: False))
    assert app.run(["verify", str(SHIPPED), "--rank", "4", "--quiet"]) == 1
    assert "FAILED" in capsys.readouterr().out
