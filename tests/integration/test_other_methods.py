"""LoHa, LoKr and VeRA: PEFT's numbers in every state of the layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, PeftModel, VeraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn

import fastpeft
from fastpeft.layers.lora import FastLoraLayer
from fastpeft.layers.lycoris import FastLycorisLayer
from fastpeft_kernels.common.device import product_dtype
from tests.integration.models import make_base

X = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Three projections of one tensor, of differing sizes, and one back; nothing else has parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 6, bias=False), nn.Linear(12, 6)
        self.o = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.tanh(self.q(x)) * torch.cat([self.k(x), self.v(x)], dim=-1))


CONFIGS: dict[str, Callable[..., Any]] = {
    "loha": lambda **o: LoHaConfig(**{"r": 3, "alpha": 4, "init_weights": False, **o}),
    "lokr": lambda **o: LoKrConfig(**{"r": 8, "alpha": 4, "init_weights": False, **o}),
    "lokr low rank": lambda **o: LoKrConfig(**{"r": 1, "init_weights": False, "decompose_both": True, **o}),
    "vera": lambda **o: VeraConfig(**{"r": 5, "init_weights": False, **o}),
}
METHODS = {"loha": "loha_linear", "lokr": "lokr_linear", "lokr low rank": "lokr_linear", "vera": "vera_linear"}
every_method = pytest.mark.parametrize("method", METHODS)


def config(method: str, **options: Any) -> Any:
    return CONFIGS[method](**{"target_modules": ["q", "k", "v", "o"], **options})


def stir(model: nn.Module) -> None:
    """Adapters that are neither zero nor alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)


def pair(method: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    peft = get_peft_model(Block(), config(method, **options))
    stir(peft)
    peft.to(dtype)  # fp64: orders of summation show nowhere
    peft.train()
    ours = fastpeft.accelerate(copy.deepcopy(peft))
    return ours, peft


def gradients(model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    x = X.to(dtype, copy=True).requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def check(ours: nn.Module, peft: nn.Module, seed: int = 2, **tolerances: Any) -> None:
    dtype = next(peft.parameters()).dtype
    torch.manual_seed(seed)
    expected = gradients(peft, dtype)
    after = torch.rand(3)
    torch.manual_seed(seed)
    found = gradients(ours, dtype)
    assert torch.equal(torch.rand(3), after), "other random numbers were drawn"
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, **tolerances)


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, (FastLycorisLayer, FastLoraLayer))]


def reasons(model: nn.Module) -> set[str]:
    return {reason for layer in layers_of(model) for reason in layer.fastpeft_calls}


def forget(model: nn.Module) -> None:
    for layer in layers_of(model):
        layer.__dict__.pop("fastpeft_calls", None)


@every_method
@pytest.mark.parametrize("trained", ["adapters", "frozen bias"])
def test_values_and_gradients(method: str, trained: str) -> None:
    ours, peft = pair(method, torch.float32)
    if trained == "frozen bias":
        for model in (ours, peft):
            model.base_model.model.q.base_layer.bias.requires_grad_(True)
    check(ours, peft, rtol=1e-4, atol=1e-5)
    assert reasons(ours) == {"fused"}
    rows = [row for row in fastpeft.report(ours).rows if not row.note]
    assert {row.op for row in rows} == {METHODS[method]} and len(rows) == 4


@every_method
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_in_bf16_and_under_autocast_no_further_from_fp64_than_peft(method: str, adapters: torch.dtype) -> None:
    for autocast in (False, True):
        ours, peft = pair(method, torch.float32 if autocast else torch.bfloat16)
        if not autocast and adapters == torch.float32 and method != "vera":  # as PEFT makes them
            for model in (ours, peft):
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data = parameter.data.float()
        exact = gradients(copy.deepcopy(peft).double())
        dtype = peft.base_model.model.q.base_layer.weight.dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = gradients(ours, dtype), gradients(peft, dtype)
        wide = not autocast and adapters == torch.float32
        if method == "loha" and not wide and product_dtype(torch.bfloat16, X.device) == torch.bfloat16:
            assert reasons(ours) == {"LoHa in torch.bfloat16, in which weight and update cannot be added"}
        else:
            assert reasons(ours) == {"fused"}
        for name, right in exact.items():
            assert found[name].dtype == expected[name].dtype
            error, theirs = ((y[name].double() - right).norm() for y in (found, expected))
            eps = torch.finfo(torch.bfloat16).eps
            assert error <= 2 * theirs + eps * right.norm(), name


@every_method
def test_adapters_switched_merged_and_deleted(method: str) -> None:
    ours, peft = pair(method, torch.float32)
    tolerances = {"rtol": 1e-4, "atol": 1e-5}
    for model in (ours, peft):
        torch.manual_seed(5)
        model.add_adapter("b", config(method))
        model.base_model.set_adapter(["default", "b"])
        stir(model)
    for active in (["default", "b"], ["b"], ["default"]):
        for model in (ours, peft):
            model.base_model.set_adapter(active)
        check(ours, peft, **tolerances)
    assert reasons(ours) == {"fused"}
    with ours.disable_adapter(), peft.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(ours(X), peft(X))
    for model in (ours, peft):
        model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(ours(X), peft(X))
    for model in (ours, peft):
        model.unmerge_adapter()
        model.delete_adapter("b")
    check(ours, peft, **tolerances)
    with torch.no_grad():
        before = peft(X)
        torch.testing.assert_close(ours.merge_and_unload()(X), before, rtol=1e-3, atol=1e-4)


@every_method
def test_a_merge_between_forward_and_backward_is_an_error(method: str) -> None:
    ours, _ = pair(method, torch.float32)
    y = ours(X)
    ours.merge_adapter()
    with pytest.raises(RuntimeError, match="was changed or moved between forward and backward"):
        y.sum().backward()


@every_method
def test_saved_and_loaded(method: str, tmp_path: Path) -> None:
    ours, peft = pair(method, torch.float32)
    assert ours.state_dict().keys() == peft.state_dict().keys()
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = fastpeft.accelerate(PeftModel.from_pretrained(Block(), tmp_path, is_trainable=True))
    check(again, peft, rtol=1e-4, atol=1e-5)


@every_method
def test_pickled_copied_and_restored(method: str) -> None:
    ours, peft = pair(method, torch.float32)
    expected = gradients(peft, torch.float32)
    for model in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert len(layers_of(model)) == 4
        torch.testing.assert_close(gradients(model, torch.float32), expected, rtol=1e-4, atol=1e-5)
    classes = [type(module) for module in peft.modules()]
    assert [type(module) for module in fastpeft.restore(ours).modules()] == classes
    assert not any(name.startswith("fastpeft") for module in ours.modules() for name in module.__dict__)
    torch.testing.assert_close(gradients(ours, torch.float32), expected)


@every_method
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(method: str, reentrant: bool) -> None:
    ours, peft = pair(method, torch.float32)
    ours(X)
    expected = gradients(peft, torch.float32)
    x = X.clone().requires_grad_()
    ours.zero_grad(set_to_none=True)
    y = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=reentrant)
    y.square().sum().backward()
    found = {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in ours.named_parameters() if p.grad is not None}}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_method
def test_a_few_tokens_without_gradients_and_fp64_are_right_too(method: str) -> None:
    ours, peft = pair(method, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(X[:1, :1]), peft.eval()(X[:1, :1]), rtol=1e-4, atol=1e-5)
    check(*pair(method))


@every_method
def test_dtypes_under_autocast_are_peft_s_in_every_state(method: str) -> None:
    ours, peft = pair(method, torch.float32)

    def compare() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            for x in (X, X.repeat(4096, 1, 1)):
                with torch.no_grad():
                    assert ours.base_model.model.o(x).dtype == peft.base_model.model.o(x).dtype == torch.float32

    compare()
    with ours.disable_adapter(), peft.disable_adapter():
        compare()
    for model in (ours, peft):
        model.merge_adapter()
    compare()


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_module_dropout_drops_as_peft_does(method: str) -> None:
    ours, peft = pair(method, torch.float32, module_dropout=0.5)
    trained = set()
    for seed in range(4):
        check(ours, peft, seed=seed, rtol=1e-4, atol=1e-5)
        trained.add(frozenset(name for name, p in ours.named_parameters() if p.grad is not None))
    assert len(trained) > 1 and reasons(ours) == {"fused"}


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_rank_dropout_is_peft_s_and_named(method: str) -> None:
    ours, peft = pair(method, torch.float32, rank_dropout=0.5)
    check(ours, peft)
    assert reasons(ours) == {"adapter 'default': rank_dropout, which drops rows of the update itself"}
    forget(ours)
    check(ours.eval(), peft.eval(), rtol=1e-4, atol=1e-5)
    assert reasons(ours) == {"fused"}


def test_vera_dropout_drops_with_its_probability() -> None:
    ours, peft = pair("vera", torch.float32, vera_dropout=0.5)
    check(ours.eval(), peft.eval(), rtol=1e-4, atol=1e-5)
    assert reasons(ours) == {"fused"}
    layer, x = ours.base_model.model.o, torch.randn(1, 12)
    with torch.no_grad():
        y = layer(x)
        mean = layer.train()(x.expand(1, 4000, 12)).mean(1)
    assert not torch.equal(layer(x), y) and layer.fastpeft_calls["fused"] >= 3
    torch.testing.assert_close(mean, y, rtol=0.1, atol=0.3)


def test_vera_keeps_nothing_as_wide_as_the_output() -> None:
    ours, peft = pair("vera", torch.float32)
    x = torch.randn(64, 12)
    kept: dict[str, set[tuple[int, ...]]] = {"ours": set(), "peft": set()}
    for name, model in (("ours", ours), ("peft", peft)):
        layer, shapes = model.base_model.model.o, kept[name]
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: s.add(tuple(t.shape)) or t, lambda t: t):
            layer(x)
    assert (64, 8) in kept["peft"] and (64, 8) not in kept["ours"] and (64, 5) in kept["ours"]


def test_vera_in_a_llama_joins_siblings_and_mlps() -> None:
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    model = fastpeft.accelerate(get_peft_model(make_base(), VeraConfig(r=5, target_modules=targets)))
    assert fastpeft.verify(model).passed
    rows = {row.path.rpartition(".")[2]: row for row in fastpeft.report(model).rows}
    assert rows["mlp"].op == "lora_mlp" and not rows["mlp"].note
    assert rows["q_proj"].partners == "one of 3" and rows["k_proj"].op == "frozen_linear"


@every_method
def test_what_else_is_peft_s_is_named(method: str) -> None:
    ours, peft = pair(method, torch.float32)
    for model in (ours, peft):
        model.base_model.model.o.base_layer.weight.requires_grad_(True)
    check(ours, peft, rtol=1e-4, atol=1e-5)
    assert "the base weight is trained" in ours.base_model.model.o.fastpeft_calls
    for model in (ours, peft):
        model.base_model.model.o.base_layer.weight.requires_grad_(False)
    if method != "vera":  # PEFT's VeRA layers have no such switch
        forget(ours)
        with disable_input_dtype_casting(ours), disable_input_dtype_casting(peft):
            check(ours, peft, rtol=1e-4, atol=1e-5)
        assert reasons(ours) == {"casting of inputs disabled (peft.helpers.disable_input_dtype_casting)"}


@pytest.mark.full
@pytest.mark.parametrize("method", ["loha", "vera"])
def test_under_torch_compile(method: str) -> None:
    ours, peft = pair(method, torch.float32)
    ours(X)
    found = torch.compile(ours, backend="eager")(X)
    torch.testing.assert_close(found, peft(X), rtol=1e-4, atol=1e-5)


def test_loha_in_sixteen_bits_stays_with_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.layers import lycoris

    monkeypatch.setattr(lycoris, "product_dtype", lambda dtype, device: dtype)  # as where the device has such products
    ours, peft = pair("loha", torch.bfloat16)
    check(ours, peft)
    assert reasons(ours) == {"LoHa in torch.bfloat16, in which weight and update cannot be added"}


@every_method
def test_verify(method: str) -> None:
    peft = get_peft_model(Block(), config(method, init_weights=True))
    zeros = [p for p in peft.parameters() if p.requires_grad and not p.any()]
    model = fastpeft.accelerate(peft)
    outcome = fastpeft.verify(model, {"x": X})
    assert outcome.passed and {check.path.rpartition(".")[2] for check in outcome.checks} == {"", "q", "k", "v", "o"}
    assert zeros and not any(p.any() for p in zeros)
    wrong = model.base_model.model.o
    stock = type(wrong).forward
    type(wrong).forward = lambda self, x: stock(self, x) * (1.0 if self.fastpeft_suspended else 1.01)
    try:
        assert {check.path.rpartition(".")[2] for check in fastpeft.verify(model, {"x": X}).failures} >= {"q", "o"}
    finally:
        type(wrong).forward = stock
