"""The op under torch.compile and under dispatch modes: one node forward, one backward, the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastpeft_kernels.common import scratch
from fastpeft_kernels.lora import Dtypes, LoraAdapter, LoraProjection, lora_linear, lora_linear_group
from fastpeft_kernels.lora.custom_op import lora_group_backward_op, lora_group_op
from fastpeft_kernels.lora.layout import flatten_group, unflatten_group
from fastpeft_kernels.lora.projection import Group
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.weights import DenseWeight, FourBitWeight
from tests.kernels.compiling import (
    BF16,
    F32,
    F32_ON_BF16,
    check_changing_sizes,
    check_one_graph,
    check_selective_checkpointing,
)
from tests.kernels.lora.groups import adapter, check_group, parameters, projection, seeds_for

FULL = pytest.mark.full
pytestmark = pytest.mark.usefixtures("nothing_compiled_before")


def four_bit(nested: bool = False) -> list[LoraProjection]:
    packed = encode_4bit(torch.randn(8, 64), nested=nested)
    return [LoraProjection(FourBitWeight(packed), None, (adapter(2, 64, 8, scaling=2.0),)), projection(64, 4, 2)]


def many_kinds() -> list[LoraProjection]:
    """Biases, two adapters, a tensor for scaling, dropout, frozen parts, a member without adapters."""
    group = [
        projection(64, 8, 2, 3, bias=True, with_bias=True, dropout=0.5),
        projection(64, 4, 2, scaling=torch.tensor(0.3)),
        projection(64, 5),
        projection(64, 6, 1, bias=True),
    ]
    group[3].adapters[0].a.requires_grad_(False)
    group[3].bias.requires_grad_(True)  # type: ignore[union-attr]
    return group


def dora() -> list[LoraProjection]:
    """Trained, not trained, with dropout, beside one without."""
    group = [
        projection(64, 8, 2, bias=True, magnitude=True),
        projection(64, 4, 2, magnitude=True, dropout=0.5),
        projection(64, 5, 2, magnitude=True),
        projection(64, 6, 1),
    ]
    group[2].magnitude.requires_grad_(False)  # type: ignore[union-attr]
    return group


GROUPS = {
    "dora": dora,
    "dense": lambda: [projection(64, 8, 2), projection(64, 4, 2, 3)],
    "many kinds": many_kinds,
    "four_bit": four_bit,
    "nested": lambda: four_bit(nested=True),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=FULL if kind in ("dense", "four_bit") else ()) for kind in GROUPS]
)
def test_one_graph_same_numbers(kind: str) -> None:
    group = GROUPS[kind]()
    seeds = seeds_for(group)
    x = torch.randn(3, 5, 64, requires_grad=True)
    check_one_graph(lambda x: lora_linear_group(x, group, seeds=seeds), x, parameters(group), "aot_eager")


def test_a_mixed_batch_passes_through_the_op() -> None:
    adapters = tuple(adapter(rank, 64, 8, index=index) for index, rank in enumerate((2, 3)))
    group = [LoraProjection(DenseWeight(torch.randn(8, 64)), None, adapters), projection(64, 4, 2)]
    x, index = torch.randn(3, 5, 64, requires_grad=True), [0, -1, 1]

    def step(x: Tensor) -> tuple[Tensor, ...]:
        return lora_linear_group(x, group, adapter_index=index)

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtypes", [*(pytest.param(same, marks=FULL) for same in (F32, BF16)), F32_ON_BF16])
def test_within_the_budget(dtypes: Dtypes, monkeypatch: pytest.MonkeyPatch) -> None:
    group = [projection(64, 8, 2, dtype=dtypes.compute, lora_dtype=dtypes.lora, bias=True) for _ in range(2)]
    compiled = torch.compile(lora_linear_group, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr("tests.kernels.lora.groups.lora_linear_group", compiled)
    check_group(torch.randn(7, 64).to(dtypes.compute).requires_grad_(), group, dtypes)


def test_sizes_may_change() -> None:
    group = [projection(64, 8, 2), projection(64, 4, 2)]
    check_changing_sizes(lambda x: lora_linear_group(x, group))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=FULL)])
@pytest.mark.parametrize("recomputed", [False, True])
def test_dropout_is_drawn_anew_and_is_the_same_in_backward(backend: str, recomputed: bool) -> None:
    n = 64
    b = torch.eye(n).requires_grad_()

    def drop(x: Tensor) -> Tensor:
        return lora_linear(x, torch.zeros(n, n), torch.eye(n), b, dropout=0.25)

    def run(x: Tensor) -> Any:
        return checkpoint(drop, x, use_reentrant=False) if recomputed else drop(x)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    results = []
    for _ in range(2):
        x = torch.ones(200, n, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(x.grad, y.detach())
        assert 0.72 < (y > 0).float().mean() < 0.78
        results.append(y > 0)
    assert not torch.equal(*results)


def test_a_seed_drawn_while_compiled_is_the_one_drawn_otherwise() -> None:
    x, group = torch.randn(9, 64), [projection(64, 8, 2, dropout=0.5)]
    torch.manual_seed(5)
    eager = lora_linear_group(x, group)
    torch.manual_seed(5)
    compiled = torch.compile(lambda x: lora_linear_group(x, group), backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def test_what_torch_asks_of_an_op() -> None:
    group = many_kinds()
    arguments = flatten_group(Group(group, F32, seeds_for(group)))
    x = torch.randn(5, 64, requires_grad=True)
    torch.library.opcheck(lora_group_op, (x, *arguments))
    *ys, s = lora_group_op(x, *arguments)
    dys = [torch.randn_like(y) for y in ys]
    without = {id(tensor) for tensor in group[1].tensors()}  # its dy is None
    wanted = [tensor.requires_grad and id(tensor) not in without for tensor in arguments[0]]
    backward = ([dys[0], None, *dys[2:]], x.detach(), s.detach(), *arguments, torch.float32, wanted, [])
    with torch.no_grad():
        torch.library.opcheck(lora_group_backward_op, backward, test_utils=("test_schema", "test_faketensor"))


def test_an_output_that_nobody_uses_leaves_no_gradient() -> None:
    group = [projection(64, 8, 2), projection(64, 4, 2)]
    first, _, _ = lora_group_op(torch.randn(5, 64), *flatten_group(Group(group, F32, [None, None])))
    grads = torch.autograd.grad(first.sum(), parameters(group), allow_unused=True)
    assert [grad is None for grad in grads] == [False, False, True, True]


def test_a_group_survives_flattening() -> None:
    group = [*many_kinds(), *four_bit(nested=True)]
    seeds = seeds_for(group)
    dtypes = Dtypes(torch.float16, torch.float32, torch.bfloat16)
    tensors, numbers, layout = flatten_group(Group(group, dtypes, seeds))
    flat = unflatten_group(tensors, numbers, layout)
    back = flat.group
    assert back.dtypes == dtypes.on(torch.device("cpu")) and all(a is b for a, b in zip(back.seeds, seeds, strict=True))
    for theirs, ours, places in zip(group, back.projections, flat.tracked, strict=True):
        assert all(a is b for a, b in zip(theirs.tensors(), ours.tensors(), strict=True))
        assert [None if place is None else tensors[place] for place in places] == list(ours.tensors())
        assert torch.equal(theirs.weight.decode(), ours.weight.decode())
        assert [(a.scaling, a.dropout) for a in theirs.adapters] == [(a.scaling, a.dropout) for a in ours.adapters]


@pytest.mark.parametrize("saved", ["mm.default", "addmm.out", "everything"])
def test_selective_checkpointing(saved: str) -> None:
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    w, x = torch.randn(8, 8), torch.randn(3, 8, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return lora_linear(x.relu(), w, a, b).relu()

    check_selective_checkpointing(block, x, [a, b], saved)


def test_a_counter_around_a_checkpointed_forward_only() -> None:
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    w, x = torch.randn(8, 8), torch.randn(3, 8, requires_grad=True)
    with FlopCounterMode(display=False):
        y = checkpoint(lambda x: lora_linear(x.relu(), w, a, b), x, use_reentrant=False)
    expected = torch.autograd.grad(lora_linear(x.relu(), w, a, b).sum(), [x, a, b])
    torch.testing.assert_close(torch.autograd.grad(y.sum(), [x, a, b]), expected)


def test_a_backward_under_autocast_rounds_nothing() -> None:
    group = [projection(64, 8, 2), projection(64, 4, 2)]
    x = torch.randn(5, 64, requires_grad=True)
    wanted = [x, *parameters(group)]
    expected = torch.autograd.grad([y.sum() for y in lora_linear_group(x, group)], wanted)
    *ys, _ = lora_group_op(x, *flatten_group(Group(group, F32, [None, None])))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad([y.sum() for y in ys], wanted)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_fake_tensors_leave_nothing_behind() -> None:
    scratch.release_scratch()
    with FakeTensorMode():
        y = lora_linear(torch.empty(5, 64), torch.empty(8, 64), torch.empty(2, 64), torch.empty(8, 2))
    assert y.shape == (5, 8)
    group = four_bit()
    assert type(lora_linear_group(torch.randn(5, 64), group)[0]) is Tensor


def test_counters_see_what_runs() -> None:
    m, k, r = 16, 64, 4
    x = torch.randn(m, k, requires_grad=True)
    weight = DenseWeight(torch.randn(8, k))
    group = [
        LoraProjection(
            weight, None, (LoraAdapter(*(t.requires_grad_() for t in (torch.randn(r, k), torch.randn(8, r)))),)
        )
    ]
    with FlopCounterMode(display=False) as forward:
        (y,) = lora_linear_group(x, group)
    assert forward.get_total_flops() == 2 * m * (k * 8 + r * k + r * 8)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * m * (k * 8 + 2 * r * k + 2 * r * 8)


def test_an_explicit_request_is_refused() -> None:
    pytest.importorskip("triton")
    compiled = torch.compile(lambda x: lora_linear_group(x, [projection(64, 8, 2)], backend="triton"), backend="eager")
    with pytest.raises(Exception, match="backend: 'triton' cannot be traced yet"):
        compiled(torch.randn(5, 64))


def test_a_group_without_adapters() -> None:
    group = [projection(64, 8), projection(64, 4)]
    x = torch.randn(5, 64, requires_grad=True)
    step = torch.compile(lambda x: sum(y.sum() for y in lora_linear_group(x, group)), backend="aot_eager")
    (found,) = torch.autograd.grad(step(x), x)
    torch.testing.assert_close(found, sum(p.weight.decode().sum(0) for p in group).expand(5, 64))


def test_a_bias_that_is_made_in_the_graph() -> None:
    """Within the op it is a tensor that asks for nothing."""
    torch.manual_seed(0)
    weight = DenseWeight(torch.randn(6, 8))
    a, b, raw = (torch.randn(shape, requires_grad=True) for shape in ((2, 8), (6, 2), (6,)))
    x = torch.randn(3, 8)

    def loss() -> torch.Tensor:
        (y,) = lora_linear_group(x, [LoraProjection(weight, raw * 1.0, (LoraAdapter(a, b, 0.5),))])
        return y.square().sum()

    expected = torch.autograd.grad(loss(), (a, b, raw))
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(), (a, b, raw))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
