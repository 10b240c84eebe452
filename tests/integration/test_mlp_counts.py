"""What layers with MLPs as one op cost: products, bytes kept, and what is made again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import fastpeft
from fastpeft.layers import few_tokens
from fastpeft_kernels.lora import rank_products
from fastpeft_kernels.native import native_library, skinny
from tests.integration.models import batch, checkpointed, make, make_base, with_lora
from tests.integration.quantised import quantise
from tests.integration.reports import mlp_rows
from tests.integration.steps import step
from tests.integration.test_mlp import calls
from tests.kernels.lora.test_counts import PRODUCTS, products


def kept_a_token(model: nn.Module, **given: Any) -> float:
    """Bytes that a forward keeps for backward beside parameters, a token."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = model(**given, use_cache=False)
    assert outputs.logits.requires_grad
    return sum(size for place, size in kept.items() if place not in own) / outputs.logits[..., 0].numel()


@contextmanager
def every_product(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many were made: the library's, as torch's profiler sees them, and ours in C++, two from one read as one."""
    ours: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(rank_products, "skinny", lambda *args, **kw: (ours.append(1), skinny(*args, **kw)))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            yield lambda: len(ours) + sum(e.count for e in profile.key_averages() if e.key in PRODUCTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_kept_bytes_of_a_layer(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slope between two depths: products of a dense layer, and what it keeps, which the frozen layer keeps too."""
    monkeypatch.setattr("fastpeft_kernels.common.device._slow_on_cpu", lambda dtype: True)  # in fp32 on any machine
    found = []
    for depth in (2, 4):
        base = make_base(dtype=dtype, num_hidden_layers=depth, hidden_size=256, intermediate_size=688, head_dim=64)
        ids = torch.randint(3, 90, (4, 64))
        embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
        frozen = kept_a_token(copy.deepcopy(base).requires_grad_(False), inputs_embeds=embedded)
        model = fastpeft.accelerate(with_lora(base, r=8), attention=False)
        step(model, {"input_ids": ids, "labels": ids})
        with every_product(monkeypatch) as count:
            model(input_ids=ids, labels=ids).loss.backward()
        found.append((count(), kept_a_token(model, input_ids=ids), frozen))
    gemms, ours, frozen = ((deep - shallow) / 2 for shallow, deep in zip(*found, strict=True))
    assert gemms == (40 if native_library() else 47) and ours <= frozen


def test_products_of_a_layer_over_nf4(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for depth in (2, 4):
        base = make_base(num_hidden_layers=depth, hidden_size=256, intermediate_size=512, head_dim=64)
        model = fastpeft.accelerate(with_lora(quantise(base), r=8), attention=False)
        ids = torch.randint(3, 90, (4, 64))
        step(model, {"input_ids": ids, "labels": ids})
        with every_product(monkeypatch) as count:
            model(input_ids=ids, labels=ids).loss.backward()
        found.append(count())
    assert (found[1] - found[0]) / 2 == (40 if native_library() else 47)


def slope(measured: Callable[[PeftModel, dict[str, Tensor]], float], mlp: bool | str = True, **config: Any) -> float:
    """Of something a layer, between models of two depths that are accelerated and have run a step."""
    found = []
    for depth in (2, 4):
        base = make_base(num_hidden_layers=depth, hidden_size=64, intermediate_size=128, head_dim=16)
        model = fastpeft.accelerate(with_lora(base, **config), mlp=mlp, attention=False)
        ids = torch.randint(3, 90, (2, 8))
        given = {"input_ids": ids, "labels": ids}
        step(model, given)
        found.append(measured(model, given))
    return (found[1] - found[0]) / 2


def step_products(model: nn.Module, given: dict[str, Tensor]) -> float:
    count, _ = products(lambda: model(**given, use_cache=False).loss.backward())
    return float(count)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_products_of_a_checkpointed_layer(targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recomputation ends before the MLP's down projection, of which nothing is kept; a reentrant one does not."""
    monkeypatch.setattr(few_tokens, "FEW_ELEMENTS", 0)  # a reentrant forward runs without gradients
    plain = slope(step_products, target_modules=targets)
    stopped, reentrant = (
        slope(lambda m, given, how=how: step_products(checkpointed(m, how), given), target_modules=targets)
        for how in (False, True)
    )
    forward, down = (18, 2) if targets == "all-linear" else (9, 1)
    assert (stopped - plain, reentrant - plain) == (forward - down, forward)


class TestRecompute:
    def test_less_is_kept_for_gate_and_up_once_more(self) -> None:
        def kept(model: nn.Module, given: dict[str, Tensor]) -> float:
            return kept_a_token(model, input_ids=given["input_ids"])

        assert slope(kept) - slope(kept, mlp="recompute") == 2 * 128 * 4
        assert slope(step_products, mlp="recompute") - slope(step_products) == 1 + 2 * 2

    def test_same_numbers(self) -> None:
        model = fastpeft.accelerate(make(lora_dropout=0.3))
        given = batch(model)
        step(model, given)
        found = []
        for mlp in (True, "recompute"):
            fastpeft.accelerate(model, mlp=mlp)  # type: ignore[arg-type]
            torch.manual_seed(5)
            found.append(step(model, given))
        assert found[0].equals(found[1]) and calls(model) == {"fused"}

    def test_it_can_be_changed_and_is_reported(self) -> None:
        model = fastpeft.accelerate(make(), mlp="recompute")
        assert {row.op for row in mlp_rows(model)} == {"lora_mlp, gate and up computed again"}
        assert {row.op for row in mlp_rows(copy.deepcopy(model))} == {"lora_mlp, gate and up computed again"}
        assert {row.op for row in mlp_rows(fastpeft.accelerate(model))} == {"lora_mlp"}
        fastpeft.accelerate(model, mlp="recompute")
        fastpeft.restore(model)
        assert not any(name.startswith("fastpeft") for m in model.modules() for name in m.__dict__)

    def test_an_unknown_value(self) -> None:
        with pytest.raises(ValueError, match="mlp: expected True, False or 'recompute', got 'always'"):
            fastpeft.accelerate(make(), mlp="always")  # type: ignore[arg-type]
