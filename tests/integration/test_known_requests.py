"""What layers asked for before is asked for again only where nothing has changed of which it was made."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from peft import LoraConfig
from torch import nn

import fastpeft
from fastpeft.bench.steps import nf4_linear
from tests.integration.blocks import WIDTH, Stack, blocks, check, inputs, pair


def _second_adapter(q: Any) -> None:
    config = LoraConfig(r=2, lora_alpha=8, init_lora_weights=False)
    torch.manual_seed(5)
    q.update_layer("other", 2, lora_alpha=8, config=config)
    q.set_adapter(["default", "other"])


def _new_parameter(layer: Any, name: str, requires_grad: bool = True) -> None:
    torch.manual_seed(6)
    values = torch.randn_like(getattr(layer, name))
    setattr(layer, name, nn.Parameter(values, requires_grad=requires_grad))


def _other_rank(q: Any) -> None:
    torch.manual_seed(7)
    q.lora_A["default"].weight.data = torch.randn(3, WIDTH)
    q.lora_B["default"].weight.data = torch.randn(WIDTH, 3)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "scaling": lambda q: q.set_scale("default", 3.0),
    "scaling as a tensor": lambda q: q.scaling.update(default=torch.tensor(3.0)),
    "disabled": lambda q: q.enable_adapters(False),
    "merged": lambda q: q.merge(),
    "second adapter": _second_adapter,
    "no adapter": lambda q: q.set_adapter([]),
    "new base weight": lambda q: _new_parameter(q.base_layer, "weight", False),
    "new bias": lambda q: _new_parameter(q.base_layer, "bias"),
    "bias frozen": lambda q: q.base_layer.bias.requires_grad_(False),
    "no bias": lambda q: setattr(q.base_layer, "bias", None),
    "base weight trained": lambda q: q.base_layer.weight.requires_grad_(),
    "new a": lambda q: _new_parameter(q.lora_A["default"], "weight"),
    "b frozen": lambda q: q.lora_B["default"].weight.requires_grad_(False),
    "other rank": _other_rank,
    "values written": lambda q: q.base_layer.weight.data.mul_(1.5),
    "other memory": lambda q: setattr(q.base_layer.weight, "data", q.base_layer.weight.data * 1.5),
    "hook": lambda q: q.lora_A["default"].register_forward_hook(lambda module, args, y: y * 2),
    "hook on the base": lambda q: q.base_layer.register_forward_hook(lambda module, args, y: y * 2),
    "forward": lambda q: setattr(q.lora_B["default"], "forward", lambda x: torch.ones(*x.shape[:-1], WIDTH)),
    "class": lambda q: setattr(q.lora_A["default"], "__class__", Doubled),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["q", "v"])
def test_what_changes_is_seen(change: str, which: str) -> None:
    """In a sibling that is called first, or last."""
    ours, peft = pair()
    check(ours, peft)
    for model in (ours, peft):
        CHANGES[change](getattr(blocks(model)[1], which))
    check(ours, peft)


def test_dropout_is_seen() -> None:
    ours, _ = pair(lora_dropout=0.5)
    q, x = blocks(ours)[0].q, inputs()
    assert not torch.equal(q(x), q(x)), "drawn anew each time"
    ours.eval()
    assert torch.equal(q(x), q(x))
    q.lora_dropout["default"].train()
    assert not torch.equal(q(x), q(x))


def test_autocast_and_dtypes_are_seen() -> None:
    ours, _ = pair()
    q, x = blocks(ours)[0].q, inputs()
    assert q(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert q(x).dtype == torch.bfloat16
    assert q(x).dtype == torch.float32
    ours.bfloat16()
    assert q(x.bfloat16()).dtype == torch.bfloat16


def test_the_same_is_asked_for_again() -> None:
    ours, _ = pair()
    q, x = blocks(ours)[0].q, inputs()
    first = q.request(x)
    assert q.request(x * 2) is first
    q.set_scale("default", 5.0)
    second = q.request(x)
    assert second is not first and second.projection.adapters[0].scaling != first.projection.adapters[0].scaling
    assert q.request(x) is second


def test_nothing_of_it_is_copied_or_left() -> None:
    ours, peft = pair()
    q, x = blocks(ours)[0].q, inputs()
    before = q.request(x)
    for again in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert again.fastpeft_known.request is None
        assert again.request(x).projection.weight.weight is again.base_layer.weight
    assert q.request(x) is before
    check(ours, peft)
    fastpeft.restore(ours)
    assert not any("fastpeft_known" in module.__dict__ for module in ours.modules())


def _over_four_bits() -> Stack:
    """Blocks whose projections are bitsandbytes' Linear4bit, for PEFT's class of them."""
    stack = Stack()
    stack.is_loaded_in_4bit = True
    for block in stack.blocks:
        for name in ("q", "k", "v"):
            setattr(block, name, nf4_linear(getattr(block, name), torch.float32))
    return stack


def _other_values(q: Any) -> None:
    torch.manual_seed(8)
    q.base_layer.weight = nf4_linear(nn.Linear(WIDTH, WIDTH), torch.float32).weight


def _other_nested(q: Any) -> None:
    nested = q.base_layer.weight.quant_state.state2
    nested.absmax = nested.absmax * 2


def _other_offset(q: Any) -> None:
    state = q.base_layer.weight.quant_state
    state.offset = state.offset + 0.3


FOUR_BIT_CHANGES = {
    **{
        name: CHANGES[name]
        for name in ("scaling", "disabled", "second adapter", "no bias", "new a", "hook on the base")
    },
    "other values": _other_values,
    "other nested absmax": _other_nested,
    "other offset": _other_offset,
}


@pytest.mark.parametrize("change", FOUR_BIT_CHANGES)
@pytest.mark.parametrize("which", ["q", "v"])
def test_what_changes_over_four_bits_is_seen(change: str, which: str) -> None:
    pytest.importorskip("bitsandbytes")
    ours, peft = pair(_over_four_bits())
    check(ours, peft)
    for model in (ours, peft):
        FOUR_BIT_CHANGES[change](getattr(blocks(model)[1], which))
    check(ours, peft)


def test_the_same_is_asked_for_again_over_four_bits() -> None:
    pytest.importorskip("bitsandbytes")
    ours, _ = pair(_over_four_bits())
    q, x = blocks(ours)[0].q, inputs()
    first = q.request(x)
    assert q.request(x * 2) is first
    with torch.autocast("cpu", torch.bfloat16):
        assert q.request(x).dtypes.compute == torch.bfloat16
    before = q.request(x)
    _other_values(q)
    assert q.request(x) is not before


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_deleted_adapter_is_freed(four_bits: bool) -> None:
    if four_bits:
        pytest.importorskip("bitsandbytes")
    ours, peft = pair(_over_four_bits() if four_bits else None)
    check(ours, peft)
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["q", "k", "v"]))
    deleted = [ref(p) for name, p in ours.named_parameters() if ".default." in name]
    ours.set_adapter("other")
    ours.delete_adapter("default")
    gc.collect()
    assert deleted and not any(p() is not None for p in deleted)


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_replaced_base_is_freed_by_few_tokens(four_bits: bool) -> None:
    if four_bits:
        pytest.importorskip("bitsandbytes")
    ours, peft = pair(_over_four_bits() if four_bits else None)
    check(ours, peft)
    q = blocks(ours)[0].q
    replaced = ref(q.request(inputs()).projection.weight)
    if four_bits:
        _other_values(q)
    else:
        _new_parameter(q.base_layer, "weight", False)
    ours.eval()
    with torch.no_grad():
        ours(inputs(1, 1))
    gc.collect()
    assert replaced() is None
