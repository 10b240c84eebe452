"""The MLP in tiles under torch.compile and under dispatch modes."""

from __future__ import annotations

import pytest
import torch

from fastpeft_kernels.lora.layout import flatten_group
from fastpeft_kernels.lora.projection import Group
from fastpeft_kernels.mlp.custom_op import lora_mlp_backward_op
from fastpeft_kernels.mlp.tiled_op import lora_mlp_tiled_op
from tests.kernels.compiling import F32, check_changing_sizes, check_one_graph, check_selective_checkpointing
from tests.kernels.lora.groups import parameters
from tests.kernels.mlp.mlps import mlp, seeds_of, tiled_by
from tests.kernels.mlp.test_compile import many_kinds

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")
FULL = pytest.mark.full


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=FULL)])
def test_one_graph_same_numbers(backend: str) -> None:
    m = many_kinds()
    seeds, run = seeds_of(m), tiled_by(4)
    x = torch.randn(3, 5, 64, requires_grad=True)
    check_one_graph(lambda x: (run(x.relu(), m, seeds=seeds),), x, parameters(list(m.projections)), backend)


@FULL
def test_sizes_may_change() -> None:
    m, run = mlp("gate and up", 64, 96), tiled_by(4)
    check_changing_sizes(lambda x: run(x, m))


@pytest.mark.parametrize("saved", ["mm.default", "everything"])
def test_selective_checkpointing(saved: str) -> None:
    m, run = mlp("gate and up", 64, 96), tiled_by(4)
    x = torch.randn(9, 64, requires_grad=True)
    check_selective_checkpointing(lambda x: run(x.relu(), m).relu(), x, parameters(list(m.projections)), saved)


def test_what_torch_asks_of_an_op() -> None:
    m = many_kinds()
    *of_projections, seed = seeds_of(m)
    whole = (*flatten_group(Group(m.projections, F32, of_projections)), m.activation)
    x = torch.randn(2, 5, 64, requires_grad=True)
    torch.library.opcheck(lora_mlp_tiled_op, (x, *whole, 4, m.dropout, seed))
    wanted = [tensor.requires_grad for tensor in whole[0]]
    backward = (torch.randn(2, 5, 64), x.detach(), None, None, None, *whole, torch.float32, wanted, 4, m.dropout, seed)
    with torch.no_grad():
        torch.library.opcheck(lora_mlp_backward_op, backward, test_utils=("test_schema", "test_faketensor"))
