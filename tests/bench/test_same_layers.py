"""In TRL's SFTTrainer an accelerated QLoRA makes of its layers what it makes in transformers' Trainer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft.bench.finetune.case import FinetuneCase
from fastpeft.bench.finetune.loading import Source, find_source, load
from fastpeft.bench.finetune.loop import make_trainer
from fastpeft.bench.finetune.peers import all_peers

CASE = FinetuneCase("llama-3.1-8b", "qlora", device="cpu", rows=2, tokens=16, steps=3, warmup=1, scale="tiny")


class Operations(TorchDispatchMode):
    """Operations by name and dtypes, while `counting`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Any] = Counter()
        self.counting = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.counting:
            dtypes = tuple([arg.dtype for arg in args if isinstance(arg, torch.Tensor)])
            self.found[str(function), dtypes] += 1
        return function(*args, **(kwargs or {}))


def operations_of_layers(source: Source, peer: str, folder: Path) -> tuple[Counter[Any], Counter[Any]]:
    """Of the layers' forward and backward in the last of three steps."""
    model = load(CASE, source, all_peers()[peer])
    trainer, _ = make_trainer(CASE, source, all_peers()[peer], model, CASE.steps, str(folder), None)
    layers, counts = model.get_base_model().model.layers, (Operations(), Operations())
    forward, backward = counts
    step = trainer.training_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        forward.found.clear(), backward.found.clear()
        with forward, backward:
            loss = step(*args, **kwargs)
        backward.counting = False
        return loss

    def begin(*_: Any) -> None:
        forward.counting = True

    def end(layer: Any, args: Any, y: torch.Tensor) -> None:
        forward.counting = False
        y.register_hook(lambda _: setattr(backward, "counting", True))

    layers[0].register_forward_pre_hook(begin)
    layers[-1].register_forward_hook(end)
    trainer.training_step = counted
    trainer.train()
    return forward.found, backward.found


@pytest.mark.full
def test_layers_cost_the_same_in_both_trainers(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    AcceleratorState._reset_state(True)
    source = find_source(CASE, tmp_path / "model")
    peers = ("fastpeft", "fastpeft + trl", "fastpeft + trl without metrics")
    plain, *sft = [operations_of_layers(source, peer, tmp_path / peer) for peer in peers]
    assert sft == [plain, plain]
    assert all(sum(found.values()) > 100 for found in plain)
    AcceleratorState._reset_state(True)
