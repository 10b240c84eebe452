"""The MLP under torch.compile and under dispatch modes: the same numbers, nothing computed twice."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastpeft_kernels.lora import Dtypes, LoraProjection
from fastpeft_kernels.lora.layout import flatten_group
from fastpeft_kernels.lora.projection import Group
from fastpeft_kernels.mlp import Mlp, lora_mlp
from fastpeft_kernels.mlp.custom_op import lora_mlp_backward_op, lora_mlp_down_op, lora_mlp_up_to_down_op
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.weights import FourBitWeight
from tests.kernels.compiling import (
    BF16,
    F32,
    F32_ON_BF16,
    check_changing_sizes,
    check_one_graph,
    check_selective_checkpointing,
)
from tests.kernels.lora.groups import parameters, seeds_for
from tests.kernels.lora.test_counts import products
from tests.kernels.mlp.mlps import LAYOUTS, check_mlp, mixed, mlp, seeds_of

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")


def frozen() -> Mlp:
    return mlp("gate and up", 64, 96, ranks=((), (), ()))


def four_bit() -> Mlp:
    def quantised(p: LoraProjection) -> LoraProjection:
        return LoraProjection(FourBitWeight(encode_4bit(p.weight.decode(), nested=True)), p.bias, p.adapters)

    m = mlp("gate and up", 64, 96)
    return Mlp(tuple(quantised(p) for p in m.inner), quantised(m.down), m.activation)


def many_kinds() -> Mlp:
    """Biases, two adapters, a tensor for scaling, dropout, a member that is not trained."""
    m = mlp("gate and up", 64, 96, ranks=((4,), (3, 2), (5, 2)), bias=True, with_bias=True, dropout=0.25, between=0.4)
    m.inner[0].adapters[0].a.requires_grad_(False)
    m.down.bias.requires_grad_(True)  # type: ignore[union-attr]
    return m


KINDS = {layout: functools.partial(mlp, layout, 64, 96) for layout in LAYOUTS[1:]} | {
    "frozen": frozen,
    "4 bits": four_bit,
    "many kinds": many_kinds,
    "mixed": lambda: mixed(mlp("gate and up", 64, 96, ranks=((4, 2), (3,), (5, 2))), (0, 1, 2)),
}
FULL = pytest.mark.full
REGULAR = ("both in one", "4 bits", "many kinds")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=FULL)])
@pytest.mark.parametrize(
    ("kind", "keep"),
    [
        *[pytest.param(kind, "preactivations", marks=() if kind in REGULAR else FULL) for kind in KINDS],
        ("many kinds", "input"),
        *[pytest.param(kind, "input", marks=FULL) for kind in KINDS if kind != "many kinds"],
    ],
)
def test_one_graph_same_numbers(kind: str, keep: str, backend: str) -> None:
    m = KINDS[kind]()
    seeds = seeds_of(m)
    x = torch.randn(3, 5, 64, requires_grad=True)
    check_one_graph(
        lambda x: (lora_mlp(x.relu(), m, keep=keep, seeds=seeds),), x, parameters(list(m.projections)), backend
    )


@pytest.mark.parametrize("dtypes", [*(pytest.param(same, marks=FULL) for same in (F32, BF16)), F32_ON_BF16])
def test_within_the_budget(dtypes: Dtypes, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(lora_mlp, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr("tests.kernels.mlp.mlps.lora_mlp", compiled)
    m = mlp("gate and up", 32, 48, dtype=dtypes.compute, lora_dtype=dtypes.lora, bias=True)
    check_mlp(torch.randn(7, 32).to(dtypes.compute).requires_grad_(), m, dtypes)


@FULL
def test_sizes_may_change() -> None:
    m = mlp("gate and up", 64, 96)
    check_changing_sizes(lambda x: lora_mlp(x, m))


@pytest.mark.parametrize("make", [many_kinds, frozen])
def test_what_torch_asks_of_an_op(make: Any) -> None:
    m = make()
    seeds = seeds_for(list(m.projections))
    whole = (*flatten_group(Group(m.projections, F32, seeds)), m.activation)
    between = (m.dropout, torch.tensor([7]) if m.dropout else None)
    x = torch.randn(2, 5, 64, requires_grad=True)
    torch.library.opcheck(lora_mlp_up_to_down_op, (x, *whole, True, *between))
    result, h, s_down, pre, s = (t.detach() for t in lora_mlp_up_to_down_op(x, *whole, True, *between))
    down = flatten_group(Group([m.down], F32, seeds[-1:]))
    torch.library.opcheck(lora_mlp_down_op, (result.requires_grad_(), h, s_down, *down))
    wanted = [tensor.requires_grad for tensor in whole[0]]
    backward = (torch.randn(2, 5, 64), x.detach(), s, pre, s_down, *whole, torch.float32, wanted, 0, *between)
    with torch.no_grad():
        torch.library.opcheck(lora_mlp_backward_op, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("recomputed", [False, True])
def test_products_of_a_compiled_step(recomputed: bool) -> None:
    """As many as without compiling; with the region recomputed gate and up once more, with their S, and S of down."""
    m = mlp("gate and up", 64, 96)
    x = torch.randn(5, 64, requires_grad=True)

    def run(x: Tensor) -> Any:
        return checkpoint(lora_mlp, x, m, use_reentrant=False) if recomputed else lora_mlp(x, m)

    eager, _ = products(lambda: lora_mlp(x, m).sum().backward())
    step = torch.compile(run, fullgraph=True, backend="aot_eager_decomp_partition")
    step(x).sum().backward()
    compiled, _ = products(lambda: step(x).sum().backward())
    assert compiled == eager + (1 + 2 * 2 + 1 if recomputed else 0)


@pytest.mark.parametrize("saved", ["mm.default", "everything"])
def test_selective_checkpointing(saved: str) -> None:
    m = mlp("gate and up", 64, 96)
    x = torch.randn(3, 64, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return lora_mlp(x.relu(), m).relu()

    check_selective_checkpointing(block, x, parameters(list(m.projections)), saved)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 5, 64, requires_grad=True)
        y = lora_mlp(x, mlp("gate and up", 64, 96))
        y.sum().backward()
    assert y.shape == x.grad.shape == (2, 5, 64)  # type: ignore[union-attr]
