"""Checkpoints that mean harm: a run does not go on from them, and nothing of them runs."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
import transformers

from fastpeft.errors import UserError
from fastpeft.training import folder
from fastpeft.training.checkpoints import STATE, checkpoint_of, seal

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
