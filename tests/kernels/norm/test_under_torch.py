"""Under torch.compile, selective checkpointing and fake tensors: the definition, traced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft_kernels.norm import rms_norm
from tests.kernels.compiling import check_selective_checkpointing

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")


def block(x: Tensor) -> Tensor:
    return rms_norm(x, torch.full((64,), 2.0), 1e-5) * x


def test_one_graph() -> None:
    x = torch.randn(3, 5, 64, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), block(x))
    grads = [torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, block)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("saved", ("mul.Tensor", "everything"))
def test_selective_checkpointing(saved: str) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    check_selective_checkpointing(block, x, [], saved)


def test_fake_and_meta_tensors() -> None:
    with FakeTensorMode():
        assert rms_norm(torch.empty(3, 64), torch.empty(64), 1e-5).shape == (3, 64)
    x = torch.empty(3, 64, device="meta", requires_grad=True)
    rms_norm(x, torch.empty(64, device="meta"), 1e-5).sum().backward()
    assert x.grad is not None and x.grad.shape == (3, 64)
