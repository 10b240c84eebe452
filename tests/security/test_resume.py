"""Checkpoints that mean harm: a run does not go on from them, and nothing of them runs."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastpeft.cli import app
from fastpeft.errors import UserError
from fastpeft.training import folder
from fastpeft.training.checkpoints import STATE, checkpoint_of, seal
from tests.checkpoints import SHIPPED, write_rows
from tests.commands import Answer, run

from . import hostile
from .hostile import Payload


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Whole, as far as its seal says."""
    made = checkpoint_of(tmp_path, 3)
    made.mkdir()
    (made / STATE).write_text('{"global_step": 3}')
    torch.save({"step": torch.zeros(9)}, made / "optimizer.pt")
    torch.save({"python": (3, (1, 2), None)}, made / "rng_state.pth")
    return made


def resume(checkpoint: Path) -> Path | None:
    seal(checkpoint)
    return folder.prepare(checkpoint.parent, resume=True, overwrite=False)


def test_torch_s_own_files_are_taken(checkpoint: Path) -> None:
    assert resume(checkpoint) == checkpoint


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "first/adapter_model.bin"])
def test_weights_in_a_pickle(checkpoint: Path, name: str) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    torch.save({"evil": Payload(checkpoint / "mark")}, checkpoint / name)
    with pytest.raises(UserError, match=r"--resume: expected weights in safetensors, got .*; pickles are never read"):
        resume(checkpoint)
    assert not (checkpoint / "mark").exists()


def test_state_that_is_compressed(checkpoint: Path) -> None:
    with zipfile.ZipFile(checkpoint / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", bytes(10 << 20))
    assert (checkpoint / "optimizer.pt").stat().st_size < 20_000
    with pytest.raises(UserError, match=r"optimizer.pt cannot be read: expected nothing compressed"):
        resume(checkpoint)


@pytest.mark.parametrize("content", [b"", b"\x80\x02]q\x00.", b"PK\x05\x06"])
def test_state_that_is_no_file_of_torch(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "scheduler.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"scheduler.pt cannot be read: expected a file as torch.save writes it"):
        resume(checkpoint)


def test_transformers_reads_state_without_running_it() -> None:
    """Each `torch.load` of the trainer says `weights_only=True`."""
    trainer = Path(transformers.__file__).with_name("trainer.py")
    calls = trainer.read_text(encoding="utf-8").split("torch.load(")[1:]
    assert calls and all("weights_only=True" in call[:300] for call in calls)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"global_step": -1}, "global_step: expected at least 0, got -1"),
        ({"log_history": [{"loss": "low"}]}, r"log_history\[0\].loss: expected float, got 'low'"),
        ({"logging_steps": 0}, "logging_steps: expected more than 0, got 0"),
        ({"train_batch_size": "large"}, "train_batch_size: expected int or null, got 'large'"),
        ({"best_model_checkpoint": "/"}, "expected the best checkpoint beside it, got /"),
    ],
)
def test_a_state_that_is_none(checkpoint: Path, values: dict[str, Any], words: str) -> None:
    (checkpoint / STATE).write_text(json.dumps({"global_step": 3, **values}))
    with pytest.raises(UserError, match=rf"--resume: .*{STATE}: {words}"):
        resume(checkpoint)


@pytest.mark.parametrize("name", ["report.md", ".unfinished", "checkpoint-4", "checkpoint-3/optimizer.pt"])
@pytest.mark.parametrize("there", [True, False])
def test_links_that_lead_elsewhere(checkpoint: Path, name: str, there: bool, tmp_path: Path) -> None:
    """What a run writes would be written there."""
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
    if there:
        elsewhere.mkdir()
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"training.output_dir: expected no link that leads out of .*, got "):
        resume(checkpoint)


def test_links_that_stay_are_fine(checkpoint: Path) -> None:
    (checkpoint.parent / "latest").symlink_to(checkpoint)
    assert resume(checkpoint) == checkpoint


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, saved after the first."""
    folder = tmp_path_factory.mktemp("begun")
    rows = write_rows(folder / "rows.jsonl", *({"text": f"some words {number}"} for number in range(4)))
    given = ["train", "--model", SHIPPED, "--data", rows, "--max-steps", "2", "--save-steps", "1", "--quiet"]
    assert app.run([*given, "--output-dir", str(folder / "run")]) == 0
    shutil.rmtree(folder / "run" / "checkpoint-2")
    return folder


def go_on(capsys: pytest.CaptureFixture[str], begun: Path) -> Answer:
    seal(begun / "run" / "checkpoint-1")
    given = ("--max-steps", "2", "--save-steps", "1", "--quiet", "--output-dir", str(begun / "run"), "--resume")
    return run(capsys, "train", "--model", SHIPPED, "--data", str(begun / "rows.jsonl"), *given)


def extra_adapter(checkpoint: Path) -> None:
    shutil.copytree(hostile.lora(checkpoint.parent.parent / "good"), checkpoint / "extra")
    hostile.changed(checkpoint / "extra" / "adapter_config.json", r=10**9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (extra_adapter, "expected adapters that the run has, default, got "),
        (lambda there: shutil.copy(Path(SHIPPED) / "model.safetensors", there), "expected weights of an adapter alone"),
        (lambda there: torch.save([1], there / "optimizer.pt"), "cannot be gone on from: TypeError: list indices"),
        (lambda there: torch.save(Payload(there / "mark"), there / "optimizer.pt"), "it holds more than values"),
        (lambda there: torch.save({"python": 1}, there / "rng_state.pth"), "cannot be gone on from: TypeError: "),
        (lambda there: (there / "adapter_model.safetensors").write_bytes(b"few"), "cannot be gone on from: Safe"),
        (lambda there: hostile.changed(there / STATE, evil=1), "unexpected keyword argument 'evil'"),
    ],
    ids=["adapter", "whole", "optimizer", "pickle", "random", "weights", "state"],
)
def test_what_the_trainer_reads(
    change: Any, words: str, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, and nothing of it runs."""
    shutil.copytree(begun, tmp_path / "begun")
    place = tmp_path / "begun" / "run" / "config.yaml"
    place.write_text(place.read_text().replace(str(begun), str(tmp_path / "begun")))
    change(tmp_path / "begun" / "run" / "checkpoint-1")
    answer = go_on(capsys, tmp_path / "begun")
    assert (answer.code, answer.err.count("\n")) == (2, 1) and words in answer.err, answer
    assert not (tmp_path / "begun" / "run" / "checkpoint-1" / "mark").exists()
