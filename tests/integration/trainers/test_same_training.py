"""Losses and trained adapters of every trainer, accelerated and not, within the budget of one step."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.integration.models import make, make_base, with_lora
from tests.integration.quantised import decoded, make_quantised
from tests.integration.trainers import loops
from tests.integration.trainers.cases import CASES, MIXED, Case
from tests.integration.trainers.runs import check_same_training


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=pytest.mark.full if case.full else ()) for case in CASES]
)
def test_same_training(case: Case, tmp_path: Path) -> None:
    if case.train is loops.lightning:
        pytest.importorskip("lightning")
    options = dict(case.options)
    if case.trainer in ("TRL's DistillationTrainer", "TRL's GKDTrainer"):
        options["teacher"] = make_base()
    model = prepared(case)
    wide = decoded(model) if case.nf4 else copy.deepcopy(model).double()
    exact = {name: value for name, value in options.items() if name not in MIXED} | dict(case.exactly)
    train, true = partial(case.train, **options), exact_of(case, exact)
    check_same_training(model, train, tmp_path, exact=true, wide=wide, together=case.mode != "compiled")


def exact_of(case: Case, options: dict[str, Any]) -> Any:
    """In fp64, without mixed precision and without a compiler, with the noise of fp32."""
    kind = loops.plain_loop if case.train in (loops.fp16_loop, loops.compiled_loop) else case.train
    given = {name: value for name, value in options.items() if not name.startswith("torch_compile")}

    def train(model: Any, folder: Path) -> list[float]:
        with DrawnInSinglePrecision():
            return kind(model, folder, **given)

    return train


class DrawnInSinglePrecision(TorchFunctionMode):
    """Another dtype draws other numbers: NEFTune's training in fp64 would be another training."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.uniform_ and args[0].dtype == torch.float64:
            return args[0].copy_(torch.empty(args[0].shape).uniform_(*args[1:], **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def prepared(case: Case) -> Any:
    if case.nf4:
        model = make_quantised(case.model)
        for parameter in model.parameters():
            if parameter.requires_grad:  # TRL turns adapters over 4 bits into bf16: the exact training begins there too
                parameter.data = parameter.data.bfloat16().float()
        return model
    if case.train is loops.reward:
        return loops.scored(make_base())
    if case.mode == "compiled":  # tracing takes seconds a layer
        return with_lora(make_base(case.model, num_hidden_layers=1)).train()
    return make(case.model)
