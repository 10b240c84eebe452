"""What an accelerated model is verified against: fp64 copies of its layers, and the model in other states meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .integrations import bitsandbytes, quantised
from .integrations.transformers import multiply_experts_one_by_one
from .layers.counting import uncounted
from .layers.embedding import FastEmbedding, stock_embedding
from .layers.experts import FastExperts, stock_wrapper
from .layers.frozen import FrozenSibling
from .layers.lora import FastLoraLayer, fast_classes
from .layers.lycoris import FastLycorisLayer
from .layers.lycoris import fast_classes as lycoris_classes
from .layers.mixing import stock_class
from .layers.mlp import FastMlp
from .layers.norm import FastNorm
from .layers.tokens import FastTokens, stock_tokens


def in_fp64(layer: nn.Module) -> nn.Module:
    """PEFT's layer in fp64, read from the parameters and not through our own code, so that no misreading escapes."""
    if isinstance(layer, FrozenSibling):
        return child_copy(layer).double()
    classes = {**fast_classes(), **lycoris_classes()}
    stock = next(stock for stock, ours in classes.items() if ours is type(layer))
    return _copied(layer, stock)


def whole_in_fp64(module: FastMlp | FastExperts | FastEmbedding | FastTokens) -> nn.Module:
    """The model's own MLP over PEFT's layers, or PEFT's layer around the model's own experts or embedding, likewise."""
    if isinstance(module, FastMlp):
        return _copied(module, stock_class(FastMlp, type(module)))
    stock = {FastExperts: stock_wrapper, FastEmbedding: stock_embedding, FastTokens: stock_tokens}
    return _copied(module, next(make() for ours, make in stock.items() if isinstance(module, ours)))


def norm_in_fp64(module: FastNorm) -> nn.Module:
    """The model's own norm, likewise; to be called within `Wide`."""
    wide = _copied(module, stock_class(FastNorm, type(module)))
    for name, parameter in module._parameters.items():
        own = None if parameter is None else nn.Parameter(parameter.detach().double(), parameter.requires_grad)
        wide._parameters[name] = own
    return wide


class Wide(TorchDispatchMode):
    """Operations that are asked for a floating dtype give fp64: models' norms cast to fp32 by name."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        dtype = kwargs.get("dtype")
        if dtype is not None and dtype.is_floating_point:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _copied(module: nn.Module, stock: type[nn.Module]) -> nn.Module:
    """The module as one of `stock` in fp64, without hooks and without what is ours."""
    wide = stock.__new__(stock)
    nn.Module.__init__(wide)
    own = {name for name in module.__dict__ if name.startswith("fastpeft_")} | {"forward", "_old_forward", "_hf_hook"}
    wide.__dict__ |= {n: v for n, v in module.__dict__.items() if n not in own and n not in wide.__dict__}
    made: dict[nn.Module | None, nn.Module | None] = {None: None}
    for name, child in module._modules.items():
        if child not in made:  # PEFT's layers over GPTQ and AWQ hold their base under two names
            made[child] = child_copy(child)
        wide._modules[name] = made[child]
    return wide.double().train(module.training)


def child_copy(module: Any) -> nn.Module:
    """A copy whose weights are as they are decoded, of PEFT's classes."""
    if isinstance(module, FastLoraLayer):
        return in_fp64(module)
    if isinstance(module, FastExperts):
        return whole_in_fp64(module)
    if bitsandbytes.is_linear_4bit(module):
        return bitsandbytes.dense_linear(module)
    reader = quantised.reader(module)
    if reader is not None:
        return reader.dense_linear(module)
    copied = copy.deepcopy(module)
    multiply_experts_one_by_one(copied)
    return copied


@contextmanager
def suspended(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """PEFT's own forward in every layer, around experts and embeddings; the model's own in every MLP."""
    active = [module for module in modules.values() if not module.fastpeft_suspended]
    for module in active:
        module.fastpeft_suspended = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in active:
            module.__dict__.pop("fastpeft_suspended", None)


@contextmanager
def noisy(layers: Mapping[str, nn.Module], rounding: dict[str, float], seed: int) -> Iterator[None]:
    """Outputs with gaussian noise of the given rms added, and rounded again."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(rms: float) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            noise = torch.randn(output.shape, generator=generator).to(output.device) * rms
            return (output + noise).to(output.dtype)

        return hook

    handles = [layers[path].register_forward_hook(disturb(rms)) for path, rms in rounding.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def calm(model: nn.Module, seed: int) -> Iterator[None]:
    """Evaluation mode, and random values in every factor that is still zero; all as before afterwards."""
    training = [module for module in model.modules() if module.training]
    four_bit = [(m, bitsandbytes.forbid_cpu_packing(m)) for m in model.modules() if bitsandbytes.is_linear_4bit(m)]
    kinds = (FastLoraLayer, FastLycorisLayer, FastExperts, FastEmbedding, FastTokens)
    own = [each for module in model.modules() if isinstance(module, kinds) for each in _own_parameters(module)]
    loaded_for_inference = not any(parameter.requires_grad for parameter in model.parameters())
    frozen = [parameter for parameter, _ in own] if loaded_for_inference else []
    zeros = [(parameter, rank) for parameter, rank in own if not parameter.any()]
    generator = torch.Generator().manual_seed(seed)
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for factor, rank in zeros:
                factor.copy_(torch.randn(factor.shape, generator=generator) / rank)
        with uncounted(model):
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in frozen:
            parameter.requires_grad_(False)
        for base, setting in four_bit:
            bitsandbytes.allow_cpu_packing(base, setting)
        with torch.no_grad():
            for factor, _ in zeros:
                factor.zero_()


def _own_parameters(layer: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """(parameter, rank) of the adapters, those that PEFT starts with zeros among them; of vectors their size."""
    for name, parameter in layer.named_parameters():
        if not name.startswith("base_layer."):
            yield parameter, parameter.shape[0 if name.startswith("lora_embedding_A") else -1]
