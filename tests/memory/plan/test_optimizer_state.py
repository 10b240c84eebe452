"""The bytes that optimizers keep are those that are predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpeft.memory.plan.optimizer_state import OPTIMIZERS, state_sizes
from fastpeft.optim import AdamW


def made(name: str, parameters: list[Any]) -> Any:
    if name == "fastpeft_adamw":
        return AdamW(parameters)
    if name == "sgd":
        return torch.optim.SGD(parameters)
    if name.startswith("adamw_torch"):
        return torch.optim.AdamW(parameters, fused=name.endswith("fused"))
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW(parameters, optim_bits=8 if "8bit" in name else 32, is_paged="paged" in name)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_of_state(name: str) -> None:
    for elements in (1, 4095, 4096, 4097, 100_000):
        parameter = torch.nn.Parameter(torch.ones(elements))
        parameter.grad = torch.ones_like(parameter)
        optimizer = made(name, [parameter])
        optimizer.step()
        state = optimizer.state[parameter]
        found = [
            value.nbytes
            for key, value in state.items()
            if key != "step" and not key.startswith("qmap") and value is not None
        ]
        assert sorted(found) == sorted(state_sizes(name, elements, "cpu"))


def test_only_large_matrices_are_paged() -> None:
    """bitsandbytes does not page A of an adapter of rank 16 over 4096 features."""
    assert state_sizes("paged_adamw_32bit", 16 * 4096) == [16 * 4096 * 4] * 2
    assert state_sizes("paged_adamw_32bit", 16 * 14336) == []
    assert state_sizes("paged_adamw_8bit", 16 * 14336) == [16 * 14336 // 256 * 4] * 2
