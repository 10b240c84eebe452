"""What a frozen sibling takes part in as a module: calls by keyword, shallow copies, bitsandbytes' storage for CPUs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.layers.frozen import FrozenSibling
from tests.integration.blocks import blocks, check, gradients, inputs, pair
from tests.integration.models import batch
from tests.integration.quantised import four_bit_layers, make_quantised
from tests.integration.reports import siblings
from tests.integration.steps import step
from tests.integration.test_frozen_siblings import GROUPED


class TestCalls:
    def test_by_keyword(self) -> None:
        ours, peft = pair(target_modules=["q", "v"])
        check(ours, peft)
        layer, x = blocks(ours)[0].k, inputs().requires_grad_()
        assert isinstance(layer, FrozenSibling)
        torch.testing.assert_close(layer(input=x), layer(x))

    def test_by_keyword_over_4_bits(self) -> None:
        model = fastpeft.accelerate(make_quantised(lora={"target_modules": ["q_proj", "v_proj"]}))
        step(model, batch(model))
        layer = next(m for m in model.modules() if isinstance(m, FrozenSibling))
        x = torch.randn(2, layer.in_features)
        torch.testing.assert_close(layer(x=x), layer(x))

    def test_with_anything_else_raise_as_before(self) -> None:
        ours, peft = pair(target_modules=["q", "v"])
        check(ours, peft)
        for arguments in ((), (inputs(), 1)):
            messages = []
            for model in (ours, peft):
                with pytest.raises(TypeError) as raised:
                    blocks(model)[0].k(*arguments)
                messages.append(str(raised.value))
            assert messages[0] == messages[1]


class TestNames:
    """PEFT prints that of a base layer's class."""

    def test_of_linear_layers(self) -> None:
        ours, peft = pair(target_modules=["q", "v"])
        check(ours, peft)
        layer = blocks(ours)[0].k
        assert isinstance(layer, FrozenSibling) and repr(layer) == repr(blocks(peft)[0].k)

    def test_of_4_bit_layers(self) -> None:
        plain = make_quantised(lora={"target_modules": ["q_proj", "v_proj"]})
        model = fastpeft.accelerate(copy.deepcopy(plain))
        step(model, batch(model))
        name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, FrozenSibling))
        assert repr(layer) == repr(plain.get_submodule(name))
        assert type(pickle.loads(pickle.dumps(layer))).__qualname__ == "SiblingLinear4bit"


class TestShallowCopies:
    @pytest.mark.parametrize(
        ("name", "action"), [("q", fastpeft.restore), ("q", fastpeft.accelerate), ("k", fastpeft.restore)]
    )
    def test_do_not_dissolve_the_original_s_group(self, name: str, action: Any) -> None:
        ours, peft = pair(target_modules=["q", "v"])
        check(ours, peft)
        layer, x = getattr(blocks(ours)[0], name), inputs()
        copied = copy.copy(layer)
        action(copied)
        torch.testing.assert_close(copied(x), layer(x))
        assert "fastpeft_group" not in copied.__dict__
        assert siblings(ours) == GROUPED and isinstance(blocks(ours)[0].k, FrozenSibling)
        before = layer.fastpeft_calls["fused"]
        gradients(ours, inputs().requires_grad_())
        assert layer.fastpeft_calls["fused"] == before + 1


class TestPackingForCpus:
    """bitsandbytes rearranges 4-bit weights at the first call in eval mode, on CPUs with AVX512-BF16."""

    @pytest.fixture
    def packed(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Addresses of the weights that it would have rearranged."""
        found: list[int] = []

        def pack(weight: Tensor, state: Any) -> tuple[Tensor, Any]:
            found.append(weight.data_ptr())
            return weight, state

        monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", pack)
        return found

    def test_never_before_they_join(self, packed: list[int]) -> None:
        model = make_quantised(lora={"target_modules": ["q_proj", "v_proj"]}).eval()
        for layer in four_bit_layers(model):
            layer.support_avx512bf16_for_cpu = True
        fastpeft.accelerate(model, mlp=False)
        with torch.no_grad():
            model(**batch(model))
        of = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
        joined = {name for name, module in of.items() if isinstance(module, FrozenSibling)}
        assert {name.rpartition(".")[2] for name in joined} == {"k_proj"}
        assert not {of[name].weight.data_ptr() for name in joined}.intersection(packed)
        others: list[nn.Module] = [module for name, module in of.items() if name.endswith("o_proj")]
        assert others and all(o.weight.data_ptr() in packed and o.support_avx512bf16_for_cpu for o in others)
        fastpeft.restore(model)
        assert all(layer.support_avx512bf16_for_cpu for layer in four_bit_layers(model))
