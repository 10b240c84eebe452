"""`torch.compile(fullgraph=True)` through the op."""

import pytest
import torch

from fastpeft_kernels.lora import LoraProjection, lora_linear_group
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.weights import FourBitWeight
from tests.kernels.lora.groups import adapter, parameters, projection, seeds_for


@pytest.mark.parametrize("kind", ["dense", "dropout", "four_bit"])
def test_one_graph_same_numbers(kind):
    if kind == "four_bit":
        packed = encode_4bit(torch.randn(8, 64))
        group = [LoraProjection(FourBitWeight(packed), None, (adapter(2, 64, 8, scaling=2.0),)), projection(64, 4, 2)]
    else:
        group = [projection(64, 8, 2, bias=True, dropout=0.5 * (kind == "dropout")), projection(64, 4, 2, 3)]
    seeds = seeds_for(group)
    x = torch.randn(5, 64, requires_grad=True)

    def step(x):
        return lora_linear_group(x, group, seeds=seeds)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted = [x, *parameters(group)]
    eager = step(x)
    traced = compiled(x)
    dys = [torch.randn_like(y) for y in eager]
    torch.testing.assert_close(traced, eager)
    torch.testing.assert_close(torch.autograd.grad(traced, wanted, dys), torch.autograd.grad(eager, wanted, dys))
