"""Measured choices of a group's products: each is asked for and taken, and all keep the same for backward."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpeft_kernels.lora import Dtypes, lora_linear_group, rank_products
from fastpeft_kernels.lora.keys import LINEAR, MIXED, RANK, MixedKey, RankKey
from fastpeft_kernels.lora.mixed_products import MixedProducts
from fastpeft_kernels.lora.projection import Group
from fastpeft_kernels.tuning import choosing
from fastpeft_kernels.tuning.records import Winner
from tests.kernels.lora.groups import check_group, parameters, projection, seeds_for

CPU, F16 = torch.device("cpu"), torch.float16
HALF = Dtypes(F16, F16, F16)
pytestmark = pytest.mark.usefixtures("groups_in_python")
OURS, LIBRARY = {RANK: "triton", LINEAR: "triton"}, {RANK: "library", LINEAR: "torch"}


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a GPU that our kernels serve."""
    monkeypatch.setattr("fastpeft_kernels.lora.keys.kernels_serve", lambda device: True)
    monkeypatch.setattr("fastpeft_kernels.common.device._slow_on_cpu", lambda dtype: False)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of our launchers that were called."""
    pytest.importorskip("triton")
    from fastpeft_kernels.lora import backward, forward

    called: list[str] = []
    for module, name in (
        *((forward, name) for name in ("lora_down", "lora_linear")),
        *((backward, name) for name in ("lora_up_bwd", "lora_down_bwd_weight", "lora_down_bwd_input_")),
    ):
        function = getattr(module, name)

        def spy(*args: Any, name: str = name, function: Any = function, **options: Any) -> Any:
            called.append(name)
            return function(*args, **options)

        monkeypatch.setattr(module, name, spy)
    return called


def group_of_two(p: float) -> list[Any]:
    return [projection(32, out, 8, dtype=F16, dropout=p) for out in (16, 24)]


def x_of_16() -> Tensor:
    return torch.randn(16, 32).to(F16).requires_grad_()


def win(choice: str, *keys: RankKey) -> None:
    for key in keys:
        choosing.learn(CPU, Winner(RANK, key._asdict(), choice, {choice: 1.0}))


@pytest.mark.interpreter
def test_the_winner_is_taken(ours: list[str]) -> None:
    """S and dA are of 16 columns together; dS and dB are of the first projection's output, and not of the other's."""
    win("triton", RankKey(16, 32, 16, "float16"), RankKey(16, 16, 8, "float16"))
    check_group(x_of_16(), group_of_two(0.0), HALF)
    assert Counter(ours) == {"lora_down": 1, "lora_up_bwd": 1, "lora_down_bwd_weight": 1}


@pytest.mark.interpreter
@pytest.mark.parametrize("safe", (True, False))
def test_dropout_is_in_our_kernels_where_the_assembler_is_trusted(
    safe: bool, ours: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[Tensor] = []
    dropout = rank_products.dropout
    monkeypatch.setattr(rank_products, "hopper_dots_safe", lambda device: None if safe else "not here")
    monkeypatch.setattr(rank_products, "dropout", lambda x, *mask: copies.append(x) or dropout(x, *mask))
    with choosing.forced(OURS):
        check_group(x_of_16(), group_of_two(0.5), HALF)
    both = {"lora_down": 2, "lora_linear": 4, "lora_up_bwd": 2, "lora_down_bwd_weight": 2}
    assert Counter(ours) == (both | {"lora_down_bwd_input_": 2} if safe else both)
    assert len(copies) == (0 if safe else 6)


@pytest.mark.interpreter
@pytest.mark.parametrize("choice", ("triton", "library"))
def test_a_mixed_batch_has_a_choice_of_its_own(choice: str, ours: list[str]) -> None:
    """S and dA are of 16 columns together; the rest is each projection's own."""
    group = [projection(32, out, 8, 5, dtype=F16) for out in (16, 24)]
    group = [replace(p, adapters=tuple(replace(a, index=i) for i, a in enumerate(p.adapters))) for p in group]
    with choosing.forced({RANK: "triton", LINEAR: "torch", MIXED: choice}):
        check_group(torch.randn(3, 5, 32).to(F16).requires_grad_(), group, HALF, adapter_index=[1, 0, 1])
    taken = {"lora_down": 1, "lora_down_bwd_input_": 3, "lora_up_bwd": 2, "lora_down_bwd_weight": 1}
    assert Counter(ours) == (taken if choice == "triton" else {})


def test_the_library_serves_a_mixed_batch_unmeasured() -> None:
    group = Group([projection(32, 16, 8, dtype=F16)], HALF, [None], adapter_index=(0, 1))
    products = MixedProducts(group, 8192)
    assert not products.ours(4096, 16, F16)
    with choosing.forced({MIXED: "triton"}):
        assert products.ours(4096, 16, F16)


def test_the_case_of_a_mixed_batch_has_no_more_rows_than_tokens() -> None:
    key = MixedKey(2048, 64, 16, "float16", 1024)
    assert key.at(300, CPU) == key._replace(tokens=512, rows=512)
    assert key.smaller() == key._replace(tokens=512, rows=512)
    assert str(key.at(2048, CPU)) == "2048x64, r=16, float16, 1024 rows"


@pytest.mark.interpreter
def test_no_measurement_is_for_fp32(ours: list[str]) -> None:
    with choosing.forced(OURS):
        check_group(torch.randn(16, 32, requires_grad=True), [projection(32, 16, 8)], Dtypes(*[torch.float32] * 3))
    assert not ours


@pytest.mark.interpreter
def test_the_library_asked_for_by_name_is_taken(ours: list[str]) -> None:
    with choosing.forced(OURS):
        check_group(x_of_16(), group_of_two(0.5), HALF, backend="library")
    assert not ours


def kept(run: Any) -> list[tuple[torch.Size, torch.dtype]]:
    found: list[tuple[torch.Size, torch.dtype]] = []

    def pack(t: Tensor) -> Tensor:
        found.append((t.shape, t.dtype))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return found


@pytest.mark.interpreter
@pytest.mark.parametrize("reentrant", (False, True))
def test_a_recomputation_may_choose_otherwise(reentrant: bool) -> None:
    group, x = group_of_two(0.1), x_of_16()
    seeds, kinds, gradients = seeds_for(group), [], []

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return lora_linear_group(x, group, seeds=seeds)

    for later in (LIBRARY, OURS):
        with choosing.forced(later):
            kinds.append(kept(lambda: run(x)))
        with choosing.forced(LIBRARY):
            ys = checkpoint(run, x, use_reentrant=reentrant)
        with choosing.forced(later):
            torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        gradients.append([t.grad for t in (x, *parameters(group))])
        for t in (x, *parameters(group)):
            t.grad = None
    assert kinds[0] == kinds[1] != []
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_a_compiled_group_looks_its_choices_up_too() -> None:
    group, x = group_of_two(0.5), x_of_16()
    seeds = seeds_for(group)
    compiled = torch.compile(lambda x: lora_linear_group(x, group, seeds=seeds), fullgraph=True, backend="aot_eager")
    with choosing.meeting() as met:
        ys = compiled(x)
        assert {op for op, _ in met} == {RANK, LINEAR}
        met.clear()
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        assert {op for op, _ in met} == {RANK, LINEAR}
