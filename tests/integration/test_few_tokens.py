"""A few tokens without gradients, as in generation: PEFT's own operations where those are at least as fast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.layers.few_tokens import FEW_ELEMENTS, FEW_TOKENS, is_few
from fastpeft.layers.lora import FastLoraLayer
from fastpeft.layers.mlp import FastMlp
from tests.integration.blocks import blocks, check, inputs, many, pair
from tests.integration.models import batch, make
from tests.integration.quantised import make_quantised
from tests.integration.steps import step

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmv", "aten::mv")


def products(model: nn.Module, x: torch.Tensor) -> int:
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(x)
    return sum(event.count for event in profile.key_averages() if event.key.rstrip("_") in PRODUCTS)


@pytest.mark.parametrize("targets", ["q k v", "k v", "v", "q v", "q k"])
def test_no_product_more_than_peft_s(targets: str) -> None:
    """Also where a frozen sibling is called first, which would lead the others."""
    ours, peft = pair(target_modules=targets.split())
    check(ours, peft)
    x = inputs(1, 3)
    assert products(ours, x) == products(peft, x)


def operations(model: nn.Module, ids: torch.Tensor) -> int:
    """Of torch, for one token more than a cache holds."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with torch.profiler.profile() as profile:
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    return sum(1 for event in profile.events() if event.name.startswith("aten::") and event.cpu_parent is None)


@pytest.mark.parametrize("padded", [False, True])
def test_a_token_of_generation_takes_fewer_operations_than_peft_s(padded: bool) -> None:
    """What decides how fast a GPU generates is how many are launched. Each projection saves one."""
    peft = make(target_modules="all-linear").eval()
    ours: Any = fastpeft.accelerate(copy.deepcopy(peft))
    ids = torch.randint(3, 90, (2, 9))
    step(ours, {"input_ids": ids, "labels": ids})
    layers = [m for m in ours.modules() if isinstance(m, FastLoraLayer)]
    ours.eval()
    assert operations(ours, ids) <= operations(peft, ids) - len(layers)


def test_in_training_mode_a_forward_gives_the_same_bits_without_gradients() -> None:
    """GRPO and RLOO divide the probabilities of the one by those of the other. Generation is of fewer tokens."""
    model: Any = fastpeft.accelerate(make(target_modules="all-linear").train())
    ids = torch.randint(3, 90, (2, 9))
    step(model, {"input_ids": ids, "labels": ids})
    with torch.no_grad():
        without = model(input_ids=ids).logits
    assert torch.equal(without, model(input_ids=ids).logits)


def test_in_16_bits_a_token_is_no_less_exact_than_peft_s() -> None:
    torch.manual_seed(0)
    errors: list[tuple[float, float]] = []
    for _ in range(8):
        ours, peft = pair(target_modules=["q"])
        x = inputs(1, 3)
        with torch.no_grad():
            exact = blocks(copy.deepcopy(peft).double())[0].q(x.double())
            layers: list[Any] = [blocks(each.bfloat16())[0].q for each in (ours, peft)]
            found = [layer(x.bfloat16()).double() for layer in layers]
        errors.append(tuple([(each - exact).norm().item() for each in found]))  # type: ignore[arg-type]
    mine, theirs = (sum(each) for each in zip(*errors, strict=True))
    assert mine <= theirs


def test_many_tokens_are_computed_together() -> None:
    ours, peft = pair(target_modules=["k", "v"])
    check(ours, peft)
    before = blocks(ours)[0].v.fastpeft_calls["fused"]
    x = many()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), peft(x))
    assert blocks(ours)[0].v.fastpeft_calls == {"fused": before + 1}
    assert products(ours, x) < products(peft, x)


@pytest.mark.parametrize("first", [True, False], ids=["frozen first", "frozen between"])
def test_siblings_decide_together(first: bool) -> None:
    """One that drops something is computed by the op, without gradients too; then the others are, once."""
    ours, peft = pair(target_modules=["k", "v"] if first else ["q", "v"])
    check(ours, peft)
    block: Any = blocks(ours)[0]
    adapted = [block.k if first else block.q, block.v]
    block.v.lora_dropout["default"] = nn.Dropout(0.5)
    before = [dict(layer.fastpeft_calls) for layer in adapted]
    with torch.no_grad():
        block(inputs(1, 3))
    assert [layer.fastpeft_calls for layer in adapted] == [{"fused": calls["fused"] + 1} for calls in before]


class TestIsFew:
    @pytest.mark.parametrize(
        ("dtype", "shape", "few"),
        [
            (torch.float32, (2, 32, 1024), True),
            (torch.float32, (2, 33, 1024), False),
            (torch.float32, (1, 8, 16384), True),
            (torch.bfloat16, (1, 8, 16), True),
            (torch.bfloat16, (1, 9, 16), False),
        ],
    )
    def test_by_size_and_dtype(self, dtype: torch.dtype, shape: tuple[int, ...], few: bool) -> None:
        x = torch.empty(shape, dtype=dtype)
        assert not is_few(x)
        with torch.no_grad():
            assert is_few(x) is few

    def test_autocast_decides_the_dtype_of_the_products(self) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert is_few(torch.empty(1, 8, 16)) and not is_few(torch.empty(1, 9, 16))

    def test_elsewhere_than_on_a_cpu(self) -> None:
        with torch.no_grad():
            assert is_few(torch.empty(1, 8, 16, device="meta")) and not is_few(torch.empty(1, 9, 16, device="meta"))


def test_an_mlp_of_few_and_of_many_tokens() -> None:
    model = fastpeft.accelerate(make())
    step(model, batch(model))
    mlps: list[Any] = [m for m in model.modules() if isinstance(m, FastMlp)]
    many_ids = torch.zeros(1, FEW_ELEMENTS // model.config.hidden_size + 1, dtype=torch.long)
    before = [mlp.fastpeft_calls["fused"] for mlp in mlps]
    with torch.no_grad():
        model(input_ids=many_ids[:, :3])
        model(input_ids=many_ids)
    assert mlps and [mlp.fastpeft_calls for mlp in mlps] == [{FEW_TOKENS: 1, "fused": calls + 1} for calls in before]


def test_over_4_bits_we_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's operations, over weights that are decoded by us: bitsandbytes takes longer."""
    stock = make_quantised(lora={"target_modules": ["k_proj", "v_proj"]}).eval()
    model: Any = fastpeft.accelerate(copy.deepcopy(stock))
    ids = torch.randint(3, 90, (1, 3))
    step(model, {"input_ids": ids, "labels": ids})
    adapted = [type(m.base_layer) for m in model.modules() if isinstance(m, FastLoraLayer)]
    calls: list[Any] = []
    called = adapted[0].forward
    monkeypatch.setattr(adapted[0], "forward", lambda self, x: calls.append(self) or called(self, x))
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        frozen = len(calls)
        theirs = stock(input_ids=ids).logits
    assert torch.equal(ours, theirs)
    assert len(calls) - frozen == frozen + len(adapted)
    layers: list[Any] = [m for m in model.modules() if isinstance(m, FastLoraLayer)]
    assert layers and all(layer.fastpeft_calls[FEW_TOKENS] == 1 for layer in layers)


def test_what_hangs_on_an_adapter_s_module_is_called() -> None:
    """Hooks, dropout in train mode alone, another class: each once, in a forward of PEFT's."""
    ours, peft = pair(target_modules=["q"])
    check(ours, peft)
    ours.eval()
    peft.eval()
    x = inputs(1, 3)
    for name in ("lora_A", "lora_B", "lora_dropout", "base_layer"):
        seen: list[Any] = []
        layer: Any = blocks(ours)[0].q
        part = getattr(layer, name)
        module = part if name == "base_layer" else part["default"]
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        with torch.no_grad():
            torch.testing.assert_close(blocks(ours)[0](x), blocks(peft)[0](x))
        handle.remove()
        assert seen == [1]
    blocks(ours)[0].q.lora_dropout["default"] = nn.Dropout(0.5)
    with torch.no_grad(), pytest.raises(AssertionError):
        torch.testing.assert_close(blocks(ours)[0](x), blocks(peft)[0](x))
