"""`fastpeft tune` as a new user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastpeft_kernels.tuning import choosing
from tests.checkpoints import Checkpoints
from tests.commands import run


def test_it_measures_once(checkpoints: Checkpoints, measured_choices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", checkpoints["llama"], "--tokens", "16", "--rank", "4"]
    first = run(capsys, *words)
    (path,) = measured_choices.glob("*.json")
    assert first.code == 0 and first.out.splitlines()[-1] == f"kept in {path}"
    assert first.err == "loading the model\nmeasuring\n"
    assert "gated_activation" in first.out and ", 0 of them measured earlier" in first.out
    second = run(capsys, *words, "--json", "--quiet")
    found = json.loads(second.out)
    assert second.err == "" and found["file"] == str(path)
    assert found["outcomes"] and all(one["reused"] and one["choice"] in one["us"] for one in found["outcomes"])


def test_a_model_with_nothing_to_choose(
    checkpoints: Checkpoints, measured_choices: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = run(capsys, "tune", checkpoints["bert"], "--tokens", "16")
    assert answer.code == 0 and answer.out.startswith("nothing to choose on ") and not list(measured_choices.glob("*"))


def test_a_corrupt_file_is_replaced_with_one_warning(
    checkpoints: Checkpoints,
    measured_choices: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ["tune", checkpoints["llama"], "--tokens", "16", "--quiet", "--json"]
    whole = json.loads(run(capsys, *words).out)
    Path(whole["file"]).write_text("{")
    choosing.forget()
    caplog.clear()
    answer = run(capsys, *words[:-2], "--json")
    assert answer.code == 0 and not any(one["reused"] for one in json.loads(answer.out)["outcomes"])
    assert len([record for record in caplog.records if "are not used: not JSON" in record.message]) == 1
    assert json.loads(Path(whole["file"]).read_text())["winners"]


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "tuning"
    monkeypatch.setattr("fastpeft_kernels.tuning.files.user_folder", lambda: folder)
    answer = run(capsys, "tune", checkpoints["bert"])
    expected = f"fastpeft: {folder}: expected a folder that can be written, for the winners\n"
    assert (answer.code, answer.out, answer.err) == (2, "", expected)


@pytest.mark.parametrize(
    "words, message",
    [
        (["no/such/folder"], "MODEL: expected a model's folder or its ID on the hub"),
        (["bert@", "--tokens", "0"], "--tokens"),
        (["bert@", "--target-modules", "nothing"], "lora.target_modules: no module has the name 'nothing'"),
    ],
)
def test_wrong_command_lines(
    words: list[str], message: str, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [checkpoints[word[:-1]] if word.endswith("@") else word for word in words]
    answer = run(capsys, "tune", *words, "--quiet")
    assert answer.code == 2 and answer.out == "" and answer.err.count("\n") == 1 and message in answer.err
