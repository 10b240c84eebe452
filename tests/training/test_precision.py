"""16 bits: what is computed in them, what is kept in float32, and that no loss becomes NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fastpeft
from fastpeft.config import FastpeftConfig
from fastpeft.training.arguments import training_arguments
from fastpeft.training.loading import load_model
from fastpeft.training.preparing import Prepared, prepare
from tests.checkpoints import Checkpoints, write_rows

from .runs import chats, train

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def prepared(checkpoints: Checkpoints, tmp_path: Path) -> Prepared:
    rows = write_rows(tmp_path / "rows.jsonl", *chats(4))
    config = FastpeftConfig().override([f"model.name={checkpoints['llama']}", f"data.path={rows}", "lora.r=4"])
    return prepare(config, Console(quiet=True))


@pytest.mark.parametrize(
    ("device", "dtype", "wanted"),
    [
        (GPU, torch.float16, (True, False, False)),
        (GPU, torch.float32, (False, False, False)),
        (CPU, torch.bfloat16, (False, True, True)),
        (CPU, torch.float32, (False, False, True)),
    ],
    ids=str,
)
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_the_trainer_is_told(
    task: str, device: torch.device, dtype: torch.dtype, wanted: tuple[bool, bool, bool], tmp_path: Path
) -> None:
    config = FastpeftConfig().override([f"training.output_dir={tmp_path}", "data.max_length=32"])
    found = training_arguments(config, task, device, dtype, evaluates=False)
    assert (found.fp16, found.bf16, found.use_cpu) == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_trained_is_float32_over_a_base_in_any(dtype: torch.dtype, prepared: Prepared) -> None:
    model = load_model(prepared, CPU, dtype)
    found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for parameter in model.parameters():
        found[parameter.requires_grad].add(parameter.dtype)
    assert found == {True: {torch.float32}, False: {dtype}}


def losses_of(model: Any, prepared: Prepared, scaled: bool, steps: int = 25) -> list[float]:
    """As Trainer trains with `fp16`: autocast, and gradients scaled before they are rounded; or in float32."""
    rows = prepared.rows.rows.to_list()
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    ids, labels = padded("input_ids", 2), padded("labels", -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": (ids != 2).long()}
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.float16, enabled=scaled):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert all(parameter.isfinite().all() for parameter in trained)
    return losses


@pytest.mark.parametrize("accelerated", [True, pytest.param(False, marks=pytest.mark.full)])
def test_float16_with_scaled_gradients_follows_float32(accelerated: bool, prepared: Prepared) -> None:
    half, single = load_model(prepared, CPU, torch.float16), load_model(prepared, CPU, torch.float32)
    if not accelerated:
        fastpeft.restore(half)
    found, wanted = losses_of(half.train(), prepared, scaled=True), losses_of(single.train(), prepared, scaled=False)
    assert torch.tensor(found).isfinite().all()
    fall = wanted[0] - wanted[-1]
    assert fall > 0.7
    assert found[0] == pytest.approx(wanted[0], rel=1e-3)
    # Each step that finds an overflow is left out while the scale settles, so the end is compared, with some room.
    assert found[-1] == pytest.approx(wanted[-1], abs=0.3 * fall)


@pytest.mark.parametrize(
    "more",
    [
        "--packing --max-length 64",
        pytest.param("", marks=pytest.mark.full),
        pytest.param("--method qlora", marks=pytest.mark.full),
    ],
)
def test_bfloat16_follows_float32(more: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", *chats())
    settings = ["--model", checkpoints["llama"], "--data", rows, "--report-to", "none", "--lora.r", "4"]
    settings += ["--learning-rate", "5e-3", "--logging-steps", "1", "--max-steps", "10", *more.split()]
    found = train(tmp_path / "half", *settings, "--dtype", "bfloat16").losses
    wanted = train(tmp_path / "single", *settings, "--dtype", "float32").losses
    assert wanted[-1] < wanted[0] - 0.2
    assert found == pytest.approx(wanted, rel=0.05)
