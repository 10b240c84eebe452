"""Two copies of one model, one of them accelerated: the same call on both must do the same."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import fastpeft
from tests.budget import assert_within_budget

Call = Callable[[Any], Any]


class Twins:
    """What is called on both copies, with the same random numbers, must return, raise, warn and change the same.

    Args:
        plain: of PEFT; not accelerated, and left as it is.
    """

    def __init__(self, plain: nn.Module) -> None:
        self.plain = copy.deepcopy(plain)
        self.ours = fastpeft.accelerate(copy.deepcopy(plain))

    def call(self, call: Call, of: Call = lambda model: model) -> bool:
        """`call` gets what `of` finds in each model. Returns whether it raised nothing."""
        seed = torch.randint(2**31, ()).item()
        ours, plain = (_outcome(partial(call, of(model)), seed) for model in (self.ours, self.plain))
        assert_same(ours, plain, "outcome")
        self.check_state()
        return "returned" in plain

    def check_state(self) -> None:
        """Parameters, what is trained, and what PEFT's layers keep."""
        assert_same(_state(self.ours), _state(self.plain), "model")

    def check_numbers(self, inputs: Mapping[str, Any], truth: Callable[[nn.Module], nn.Module]) -> None:
        """Output and all gradients, within the budget of every op. `truth` makes a copy of a model in fp64."""
        wide = {name: _wide(value) for name, value in inputs.items()}
        seed = torch.randint(2**31, ()).item()
        exact = _outcome(lambda: numbers(truth(self.plain), wide), seed)
        ours, plain = (_outcome(partial(numbers, model, inputs), seed) for model in (self.ours, self.plain))
        if "raised" in plain:
            return assert_same(ours, plain, "forward")
        ours, plain, exact = (found["returned"] for found in (ours, plain, exact))
        assert ours.keys() == plain.keys() == exact.keys()
        for name, value in ours.items():
            assert_within_budget(value, plain[name], exact[name], name)
        return None


def numbers(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Output and gradients; the latter of what is trained, and of inputs that are floating."""
    inputs = {name: _leaf(value) for name, value in inputs.items()}
    model.zero_grad(set_to_none=True)
    y = model(**inputs)
    if y.requires_grad:
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    named = {**dict(model.named_parameters()), **inputs}
    found = {name: t.grad for name, t in named.items() if getattr(t, "grad", None) is not None}
    model.zero_grad(set_to_none=True)
    return {"y": y.detach(), **found}


def assert_same(ours: Any, plain: Any, path: str) -> None:
    """Equal bit by bit; of modules and parameters what they hold, our classes standing for PEFT's."""
    assert stock(ours).__qualname__ == stock(plain).__qualname__, f"{path}: {type(ours)}, {type(plain)}"
    if isinstance(plain, Tensor):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape, path
        assert ours.requires_grad == plain.requires_grad, path
        assert ours.device == plain.device, path
        if plain.is_meta:
            return
        if is_traceable_wrapper_subclass(plain):  # of torchao, whose tensors compare nothing
            for name in plain.__tensor_flatten__()[0]:
                assert_same(getattr(ours, name), getattr(plain, name), f"{path}.{name}")
            return
        assert torch.equal(ours.isnan(), plain.isnan()), path
        assert torch.equal(ours[~ours.isnan()], plain[~plain.isnan()]), path
    elif isinstance(plain, nn.Module):
        assert_same(_state(ours), _state(plain), path)
    elif isinstance(plain, Mapping):
        assert list(ours) == list(plain), f"{path}: {list(ours)}, {list(plain)}"
        for key in plain:
            assert_same(ours[key], plain[key], f"{path}.{key}")
    elif isinstance(plain, (list, tuple)):
        assert len(ours) == len(plain), path
        for index, (one, other) in enumerate(zip(ours, plain, strict=True)):
            assert_same(one, other, f"{path}[{index}]")
    elif dataclasses.is_dataclass(plain) or isinstance(plain, SimpleNamespace):
        assert_same(vars(ours), vars(plain), path)
    elif type(plain).__eq__ is not object.__eq__:
        assert ours == plain, f"{path}: {ours!r}, {plain!r}"


def stock(value: Any) -> type:
    """The class of PEFT in the place of ours."""
    kind = type(value)
    return next(c for c in kind.__mro__ if not c.__module__.startswith("fastpeft"))


def _outcome(call: Callable[[], Any], seed: int) -> Any:
    """What it returns or raises, and the warnings."""
    torch.manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result: Any = {"returned": call()}
        except Exception as error:
            words = str(error).replace("FastLoraEmbedding", "Embedding")
            result = {"raised": type(error), "words": words}
    told = {f"{w.category.__name__}: {w.message}" for w in caught}
    return {
        **result,
        "warnings": sorted(words for words in told if "Triggered internally" not in words),
    }  # torch's: once


def _state(model: nn.Module) -> dict[str, Any]:
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {
        "parameters": dict(model.named_parameters(remove_duplicate=False)),
        "buffers": dict(model.named_buffers()),
        "state": dict(model.state_dict()),
        "training": {path: module.training for path, module in model.named_modules()},
        "layers": {path: _kept(layer) for path, layer in layers.items()},
    }


def _kept(layer: BaseTunerLayer) -> dict[str, Any]:
    """Attributes that are neither ours nor modules."""
    left = {"_modules", "_parameters", "_buffers", "training"}
    return {
        name: value
        for name, value in sorted(vars(layer).items())
        if name not in left and not name.startswith("fastpeft") and "hooks" not in name
    }


def _leaf(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_() if floating else value


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
