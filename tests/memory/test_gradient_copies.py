"""With gradient accumulation a backward makes gradients beside those that are there: how many are alive at a time."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastpeft
from fastpeft.bench.steps import StepCase, build, make_batch


class Lives(TorchDispatchMode):
    """Notes when the storages come and go that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        """(number of the storage, bytes), negative where it goes."""
        self._known: dict[int, tuple[int, Any]] = {}
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return result

    def note(self, tensor: Tensor) -> int:
        """The number of a tensor's storage."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._count += 1
            number = self._count

            def gone(_: object) -> None:
                self.events.append((number, -size))
                del self._known[key]

            self._known[key] = number, weakref.ref(storage, gone)
            self.events.append((number, size))
        return self._known[key][0]


def most_alive(model: Any, batch: dict[str, Tensor]) -> int:
    """Bytes of gradients on their way, of a backward that adds to earlier ones."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(**batch).loss.backward()
    loss = model(**batch).loss
    lives, arrived = Lives(), set[int]()
    there = {lives.note(tensor) for tensor in (*model.parameters(), *(parameter.grad for parameter in trained))}
    for parameter in trained:
        parameter.register_hook(lambda gradient: arrived.add(lives.note(gradient)))  # type: ignore[no-untyped-call]
    with lives:
        loss.backward()
    assert len(arrived - there) > 1
    alive = most = 0
    for number, size in lives.events:
        if number in arrived - there:
            alive += size
            most = max(most, alive)
    return most


def bytes_of(model: nn.Module, part: str) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if p.requires_grad and part in name)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.full)])
def test_no_more_than_those_of_one_mlp(checkpointing: bool) -> None:
    torch.manual_seed(0)
    case = StepCase("llama", "lora", torch.float32, hidden=64, layers=3, tokens=16, checkpointing=checkpointing)
    peft = build(case, "cpu").train()
    ours = fastpeft.accelerate(copy.deepcopy(peft))
    batch = make_batch(case, "cpu")
    ours(**batch)  # finds the siblings
    assert most_alive(peft, batch) < most_alive(ours, batch) <= bytes_of(peft, "layers.0.mlp") < bytes_of(peft, "") / 5
