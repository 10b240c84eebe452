"""Trainer's `use_liger_kernel=True` on an accelerated model: Liger's forwards around our LoRA layers.

Liger's kernels run on GPUs only: their operations are written in PyTorch here. How it patches a model is its own.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

import fastpeft
from tests.integration.models import batch, make
from tests.integration.reports import siblings
from tests.integration.trainers.loops import rows, settings
from tests.integration.trainers.runs import check_same_training, losses_of

pytest.importorskip("liger_kernel")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *_: Any) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, reduction: str, **_: Any) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target, reduction=reduction)


@pytest.fixture(autouse=True)
def liger_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernel.transformers import functional, swiglu
    from liger_kernel.transformers import rms_norm as norms
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # Liger writes these for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    product = SimpleNamespace(apply=lambda gate, up, *_: F.silu(gate) * up)
    monkeypatch.setattr(swiglu, "LigerSiLUMulFunction", product)
    monkeypatch.setattr(norms, "LigerRMSNormFunction", SimpleNamespace(apply=rms_norm))
    monkeypatch.setattr(functional, "liger_fused_linear_cross_entropy", linear_cross_entropy)


def train(model: Any, folder: Path) -> list[float]:
    given = settings(folder, use_liger_kernel=True, liger_kernel_config={"rope": False})
    trainer = Trainer(model, TrainingArguments(**given), train_dataset=rows(model))
    trainer.train()
    return losses_of(trainer)


@pytest.mark.full
def test_the_same_training(tmp_path: Path) -> None:
    check_same_training(make(), train, tmp_path)


def test_the_report_says_whose_forward_runs(tmp_path: Path) -> None:
    model = fastpeft.accelerate(make())
    train(model, tmp_path)
    report = fastpeft.report(model)
    left = {(row.path.rpartition(".")[2], row.note) for row in report.left}
    why = "forward was replaced on the instance"
    assert left == {(name, why) for name in ("mlp", "norm", "input_layernorm", "post_attention_layernorm")}
    assert "14 of 14 adapter layers accelerated, 0 of 2 MLPs as one op" in str(report)
    assert {"gate_proj", "up_proj"} in siblings(model)


def test_an_mlp_that_hands_its_calls_on_is_still_ours() -> None:
    model = fastpeft.accelerate(make())
    for path, module in list(model.named_modules()):
        if path.endswith(".mlp"):
            module.forward = lambda x, forward=module.forward: forward(x)
    assert "0 of 2 MLPs" in str(fastpeft.report(model))  # not known yet
    model(**batch(model))
    assert "2 of 2 MLPs" in str(fastpeft.report(model))
