"""MLPs with LoRA on every projection: SwiGLU, GeGLU from two projections or one, and without a gate."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.activation.reference import ACTIVATIONS
from fastpeft_kernels.mlp import Mlp, lora_mlp

from .. import unsloth_functions
from ..left_out import NotHereError
from . import models
from .case import Forward, Inputs, OpCase
from .making import package
from .models import Shape
from .peers import compiled
from .projections import Plan, by_layers, compiled_group, peft_model


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """What is most wanted comes first, should the time run out."""
    gpu = device == "cuda"
    tokens = (2048 if gpu else 64) if depth == "quick" else 8192 if gpu else 256
    shape, dtype = (models.LLAMA_8B, torch.bfloat16) if gpu else (models.QWEN3_600M, torch.float32)
    yield from (case(shape, base, 16, tokens, dtype) for base in ("dense", "nf4"))
    yield case(models.BERT_BASE, "dense", 16, tokens, dtype)
    if depth == "quick":
        return
    yield case(models.GEMMA3_4B if gpu else models.MODERNBERT_BASE, "dense", 16, tokens, dtype)
    yield case(shape, "dense", 64, tokens, dtype)
    if gpu:
        yield from (case(shape, base, 16, 2048, dtype) for base in ("dense", "nf4"))
    else:
        yield case(shape, "dense", 16, 64, torch.bfloat16)
        yield case(models.T5_BASE, "dense", 16, tokens, dtype)
    if depth == "full":
        yield case(shape, "nf4", 64, tokens, dtype)
        larger = (models.LLAMA_70B, models.QWEN3_32B, models.QWEN3_4B) if gpu else (models.QWEN3_4B, models.GEMMA3_4B)
        yield from (case(each, base, 16, tokens, dtype) for each in larger for base in ("dense", "nf4"))
        if gpu:
            yield case(models.MODERNBERT_BASE, "dense", 16, tokens, dtype)


def case(shape: Shape, base: str, rank: int, tokens: int, dtype: torch.dtype) -> OpCase:
    """Of one layer's MLP; its input and all adapters get gradients."""
    inner, down = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    sizes = {"up_proj": inner, "down_proj": down}
    if shape.joined:
        sizes = {"Wi": (2 * shape.intermediate, shape.hidden), "Wo": down}
    elif shape.gated:
        sizes = {"gate_proj": inner, **sizes}
    plan = Plan(sizes, tokens, base, (rank,), bias=shape.biased, chained=True)
    kind = shape.kind
    layers = partial(_Layers, kind, tuple(sizes))
    return OpCase(
        op="mlp",
        name=f"{shape.name} {kind}{'' if shape.gated else ' without a gate'}, {plan.words}",
        dtype=dtype,
        make=partial(plan.make, dtype),
        floors=plan.floors(dtype.itemsize),
        reference=partial(_torch, kind),
        peers={
            "fastpeft": partial(_fastpeft, kind),
            "fastpeft layers": by_layers(layers, accelerated=True),
            "torch.compile": compiled(partial(_torch, kind)),
            "peft": by_layers(layers),
            "peft + liger": partial(_liger, kind),
            "unsloth": partial(_unsloth, kind),
        },
        settings={"model": shape.name, "tokens": tokens, "rank": rank, "base": base, "activation": kind},
    )


class _Layers(nn.Module):
    """An MLP whose projections become its children: the last is the one back."""

    def __init__(self, kind: str, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        modules = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU()}
        self.act_fn = modules[kind]

    def forward(self, x: Tensor) -> Tensor:
        *inner, down = (getattr(self, name) for name in self.names)
        pre = [layer(x) for layer in inner]
        if pre[0].shape[-1] == 2 * down.in_features:
            pre = list(pre[0].chunk(2, dim=-1))
        h: Tensor = self.act_fn(pre[0])
        return down(h * pre[1] if len(pre) == 2 else h)  # type: ignore[no-any-return]


class _LigerLayers(_Layers):
    """The same around Liger's activation."""

    function: Any

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.function(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return,operator]


def _torch(kind: str, inputs: Inputs) -> Forward:
    x = inputs.tensors["x"]
    *inner, down = inputs.extra["linears"].values()

    def forward() -> tuple[Tensor]:
        pre = [linear(x) for linear in inner]
        if pre[0].shape[-1] == 2 * down.weight.shape[1]:
            pre = list(pre[0].chunk(2, dim=-1))
        h = ACTIVATIONS[kind](pre[0])
        return (down(h * pre[1] if len(pre) == 2 else h),)

    return forward


def _fastpeft(kind: str, inputs: Inputs) -> Forward:
    compiled_group()
    *inner, down = (each.projection() for each in inputs.extra["linears"].values())
    x, mlp = inputs.tensors["x"], Mlp(tuple(inner), down, kind)
    return lambda: (lora_mlp(x, mlp),)


def _liger(kind: str, inputs: Inputs) -> Forward:
    x, linears = inputs.tensors["x"], inputs.extra["linears"]
    if "gate_proj" not in linears or kind not in ("silu", "gelu_tanh"):
        raise NotHereError("has no such activation")
    module, function = ("swiglu", "LigerSiLUMulFunction") if kind == "silu" else ("geglu", "LigerGELUMulFunction")
    layers = _LigerLayers(kind, tuple(linears))
    layers.function = getattr(package(f"liger_kernel.ops.{module}", inputs), function).apply
    model = peft_model(layers, linears)
    return lambda: (model(x),)


def _unsloth(kind: str, inputs: Inputs) -> Forward:
    functions, x, linears = unsloth_functions.load(), inputs.tensors["x"], inputs.extra["linears"]
    names = {"silu": "swiglu", "gelu": "geglu_exact", "gelu_tanh": "geglu_approx"}
    if "gate_proj" not in linears or kind not in names:
        raise NotHereError("has no such activation")
    mlp = peft_model(_Layers(kind, tuple(linears)), linears).get_base_model()
    function = getattr(functions, f"apply_lora_mlp_{names[kind]}")
    return lambda: (function(mlp, x[None], inplace=False)[0],)
