"""Every public method of PEFT's LoRA layers, on an accelerated model and on the plain one: the same, bit by bit.

Afterwards output and gradients are held to the budget of every op.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig

from tests.integration import peft_layers
from tests.integration.peft_layers import KINDS
from tests.integration.surface import methods_of, properties_of
from tests.integration.twins import Call, Twins, stock

full = pytest.mark.full


def config(**values: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 3, **values})


def update(**values: Any) -> Call:
    """Adds an adapter to the layer and makes it active, too."""

    def call(layer: Any) -> None:
        chosen = config(**values)
        layer.update_layer("third", chosen.r, lora_alpha=chosen.lora_alpha, config=chosen)
        layer.set_adapter(["default", "third"])

    return call


def broken(layer: Any) -> None:
    """What cannot be merged safely."""
    for values in (layer.lora_B, layer.lora_embedding_B):
        for weight in values.parameters():
            weight.data.fill_(torch.nan)
    layer.merge(safe_merge=True)


def then(*calls: Call) -> Call:
    """One after the other; gives what the last one returned."""
    return lambda layer: [call(layer) for call in calls][-1]


def with_eigens(layer: Any) -> None:
    """CorDA takes the decomposition from the base layer, where its preprocessing leaves it."""
    weight = layer.get_base_layer().weight.float()
    u, s, v = torch.linalg.svd(weight.mT if getattr(layer, "fan_in_fan_out", False) else weight, full_matrices=False)
    layer.get_base_layer().eigens = SimpleNamespace(S_WC=s[:4], U_WC=u[:, :4], V_WC=v[:4].mT)


def with_gradient(layer: Any) -> None:
    """LoRA-GA takes it from the base layer."""
    layer.get_base_layer()._peft_loraga_grad = torch.randn_like(layer.get_base_layer().weight)


CALLS: dict[str, Call] = {
    "merge": lambda layer: layer.merge(),
    "merge: safe": lambda layer: layer.merge(safe_merge=True),
    "merge: safe, broken": broken,
    "merge: both": lambda layer: layer.merge(adapter_names=["default", "other"]),
    "merge: one after the other": then(
        lambda layer: layer.merge(adapter_names=["other"]),
        lambda layer: layer.merge(adapter_names=["default", "other"]),
    ),
    "merge: unknown": lambda layer: layer.merge(adapter_names=["nobody"]),
    "merge: none": lambda layer: layer.merge(adapter_names=[]),
    "unmerge": then(lambda layer: layer.merge(), lambda layer: layer.unmerge()),
    "unmerge: both": then(
        lambda layer: layer.merge(safe_merge=True, adapter_names=["default", "other"]), lambda layer: layer.unmerge()
    ),
    "unmerge: nothing": lambda layer: layer.unmerge(),
    "get_delta_weight": lambda layer: layer.get_delta_weight("other"),
    "get_delta_weight: unknown": lambda layer: layer.get_delta_weight("nobody"),
    "get_delta_factors": lambda layer: layer.get_delta_factors("default"),
    "get_param": lambda layer: layer.get_param(),
    "get_base_layer": lambda layer: layer.get_base_layer(),
    "get_base_weight": lambda layer: layer.get_base_weight(),
    "set_base_weight": lambda layer: layer.set_base_weight(layer.get_base_weight() * 0.5),
    "enable_adapters: off": lambda layer: layer.enable_adapters(False),
    "enable_adapters: off, merged": then(lambda layer: layer.merge(), lambda layer: layer.enable_adapters(False)),
    "enable_adapters: off and on": then(
        lambda layer: layer.enable_adapters(False), lambda layer: layer.enable_adapters(True)
    ),
    "set_adapter": lambda layer: layer.set_adapter("other"),
    "set_adapter: both": lambda layer: layer.set_adapter(["other", "default"]),
    "set_adapter: none": lambda layer: layer.set_adapter([]),
    "set_adapter: unknown": lambda layer: layer.set_adapter("nobody"),
    "set_adapter: frozen": lambda layer: layer.set_adapter("other", inference_mode=True),
    "set_requires_grad": lambda layer: layer.set_requires_grad("default", False),
    "set_requires_grad: several": lambda layer: layer.set_requires_grad(["default", "other"]),
    "delete_adapter": lambda layer: layer.delete_adapter("other"),
    "delete_adapter: the active one": lambda layer: layer.delete_adapter("default"),
    "delete_adapter: all": then(
        lambda layer: layer.delete_adapter("other"), lambda layer: layer.delete_adapter("default")
    ),
    "update_layer": update(),
    "update_layer: dropout, rsLoRA": then(update(lora_dropout=0.5, use_rslora=True), lambda layer: layer.eval()),
    "update_layer: bias": update(lora_bias=True),
    "update_layer: DoRA": update(use_dora=True),
    "update_layer: frozen": update(inference_mode=True),
    "update_layer: rank 0": update(r=0),
    "reset_lora_parameters": lambda layer: layer.reset_lora_parameters("default", True),
    "reset_lora_parameters: gaussian": lambda layer: layer.reset_lora_parameters("default", "gaussian"),
    "reset_lora_parameters: unknown": lambda layer: layer.reset_lora_parameters("default", "nothing"),
    "olora_init": lambda layer: layer.olora_init("default"),
    "pissa_init": lambda layer: layer.pissa_init("default", "pissa"),
    "pissa_init: fast": lambda layer: layer.pissa_init("default", "pissa_niter_2"),
    "mica_init": lambda layer: layer.mica_init("default"),
    "corda_init": then(with_eigens, lambda layer: layer.corda_init("default", "corda")),
    "loftq_init": lambda layer: layer.loftq_init(
        "default", config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    ),
    "orthogonal_init": lambda layer: layer.orthogonal_init("default"),
    "lora_ga_init": then(with_gradient, lambda layer: layer.lora_ga_init("default", peft.LoraGAConfig())),
    "resolve_lora_variant": lambda layer: type(layer.resolve_lora_variant(config=config(use_dora=True))),
    "set_scale": lambda layer: layer.set_scale("default", 0.3),
    "set_scale: unknown": lambda layer: layer.set_scale("nobody", 0.3),
    "scale_layer": lambda layer: layer.scale_layer(0.25),
    "unscale_layer": then(lambda layer: layer.scale_layer(0.25), lambda layer: layer.unscale_layer()),
    "unscale_layer: by a factor": lambda layer: layer.unscale_layer(0.5),
    "supports_lora_conversion": lambda layer: [layer.supports_lora_conversion(name) for name in ("default", "nobody")],
    "merge_masks": lambda layer: layer.merge_masks(None, None, torch.zeros(2, 3, 4)),
}
"""After the method's name, what is special. A layer that lacks a method raises the same as PEFT's."""

REFUSED = {
    "merge: safe, broken",
    "get_delta_weight: unknown",
    "update_layer: rank 0",
    "reset_lora_parameters: unknown",
    "loftq_init",  # needs CUDA
}
"""Calls that PEFT refuses on a Linear; all others must come to something there. Other classes of its refuse more."""

OFTEN = (
    "merge: both",
    "unmerge",
    "enable_adapters: off, merged",
    "set_adapter: both",
    "update_layer",
    "set_base_weight",
)
SOME = [pytest.param(kind, marks=() if kind in ("Linear", "Embedding", "Linear4bit") else full) for kind in KINDS]


def cases() -> list[Any]:
    """Every call that a class has; outside `make test-full` all of Linear's and some of the others that are served."""
    found = []
    for kind in KINDS:
        for name in CALLS:
            often = kind == "Linear" or (KINDS[kind].served and kind != "TorchaoLoraLinear" and name in OFTEN)
            found.append(pytest.param(kind, name, marks=() if often else full))
    return found


@pytest.mark.parametrize(("kind", "name"), cases())
def test_methods(kind: str, name: str) -> None:
    plain = peft_layers.make(kind)
    if name.partition(":")[0] not in methods_of(type(peft_layers.layer(plain))):
        pytest.skip(f"{kind} has no such method")
    twins = Twins(plain)
    assert (peft_layers.layer(twins.ours).__class__ is not peft_layers.layer(plain).__class__) == KINDS[kind].served
    done = twins.call(CALLS[name], peft_layers.layer)
    if (kind, name) == ("Linear8bitLt", "update_layer: DoRA"):
        return  # on a CPU PEFT's own layer loses the scales of its base in its first forward
    assert kind != "Linear" or done == (name not in REFUSED)
    twins.check_numbers({"x": KINDS[kind].x()}, peft_layers.wide)


@pytest.mark.parametrize("kind", SOME)
def test_properties(kind: str) -> None:
    twins = Twins(peft_layers.make(kind))
    names = properties_of(stock(peft_layers.layer(twins.plain)))
    assert {"weight", "bias", "merged", "active_adapters"} <= names
    for name in sorted(names):
        twins.call(lambda layer, name=name: getattr(layer, name), peft_layers.layer)
    twins.call(repr, peft_layers.layer)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("kind", SOME)
def test_unloaded(kind: str, merge: bool) -> None:
    """`unload_and_optionally_merge_module`, where a layer has it."""
    twins = Twins(peft_layers.make(kind))
    call = "merge_and_unload" if merge else "unload"
    x = KINDS[kind].x()
    assert twins.call(lambda model: getattr(model, call)())
    assert torch.equal(twins.ours.base_model.model(x), twins.plain.base_model.model(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("rows", [["default", "other", "__base__"], ["other"] * 3, ["other"], ["nobody"] * 3])
def test_forward_with_an_adapter_by_row(kind: str, rows: list[str]) -> None:
    twins = Twins(peft_layers.make(kind).eval())
    twins.check_numbers({"x": KINDS[kind].x(), "adapter_names": rows}, peft_layers.wide)
    twins.call(lambda layer: layer.merge(), peft_layers.layer)
    twins.check_numbers({"x": KINDS[kind].x(), "adapter_names": rows}, peft_layers.wide)
