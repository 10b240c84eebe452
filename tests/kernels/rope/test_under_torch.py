"""Under torch.compile, selective checkpointing and fake tensors: the definition, traced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft_kernels.rope import rotary
from tests.kernels.compiling import check_selective_checkpointing

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")


def block(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[2], device=x.device)[None, :, None] * torch.ones(8, device=x.device)
    q, k = rotary(x, x[:, :1], angles.cos(), angles.sin())
    return q * k


def test_one_graph() -> None:
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(x), block(x))


def test_selective_checkpointing() -> None:
    check_selective_checkpointing(block, torch.randn(2, 3, 5, 8, requires_grad=True), [], "mul.Tensor")


def test_fake_and_meta_tensors() -> None:
    with FakeTensorMode():
        assert block(torch.empty(2, 3, 5, 8)).shape == (2, 3, 5, 8)
    assert block(torch.empty(2, 3, 5, 8, device="meta")).shape == (2, 3, 5, 8)
