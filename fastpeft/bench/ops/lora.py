"""LoRA projections: one, or query, key and value of one input; dense and in 4 bits, with one adapter and several."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fastpeft_kernels.lora import lora_linear_group

from .. import unsloth_functions
from ..left_out import NotHereError
from . import models
from .case import Forward, Inputs, OpCase
from .models import Shape
from .peers import compiled
from .projections import Plan, by_layers, compiled_group, peft_model

ONE, SIBLINGS = ("o_proj",), ("q_proj", "k_proj", "v_proj")


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """What is most wanted comes first, should the time run out."""
    gpu = device == "cuda"
    tokens = (2048 if gpu else 64) if depth == "quick" else 8192 if gpu else 256
    shape, dtype = (models.LLAMA_8B, torch.bfloat16) if gpu else (models.QWEN3_600M, torch.float32)
    yield from (case(shape, SIBLINGS, base, (16,), tokens, dtype) for base in ("dense", "nf4"))
    yield case(shape, ONE, "dense", (16,), tokens, dtype)
    yield case(shape, ONE, "dense", (8, 16, 8), tokens, dtype)
    if depth == "quick":
        return
    yield from (case(shape, SIBLINGS, base, (rank,), tokens, dtype) for rank in (8, 64) for base in ("dense", "nf4"))
    yield case(shape, ONE, "nf4", (16,), tokens, dtype)
    if gpu:
        yield from (case(shape, SIBLINGS, base, (16,), 2048, dtype) for base in ("dense", "nf4"))
    else:
        yield case(shape, SIBLINGS, "dense", (16,), 64, torch.bfloat16)
        yield case(models.BERT_BASE, SIBLINGS, "dense", (8,), tokens, dtype)
    if depth == "full":
        larger = (models.LLAMA_70B, models.QWEN3_32B, models.QWEN3_4B) if gpu else (models.QWEN3_4B,)
        yield from (case(each, SIBLINGS, base, (16,), tokens, dtype) for each in larger for base in ("dense", "nf4"))
        yield from (case(shape, ONE, base, (rank,), tokens, dtype) for rank in (8, 64) for base in ("dense", "nf4"))
        yield case(shape, SIBLINGS, "nf4", (16,), tokens if gpu else 64, torch.float16)


def case(
    shape: Shape, names: tuple[str, ...], base: str, ranks: tuple[int, ...], tokens: int, dtype: torch.dtype
) -> OpCase:
    """Of the projections `names` of one layer; their input, all adapters and none of the weights get gradients."""
    every = {
        "q_proj": (shape.q_size, shape.hidden),
        "k_proj": (shape.kv_size, shape.hidden),
        "v_proj": (shape.kv_size, shape.hidden),
        "o_proj": (shape.hidden, shape.q_size),
    }
    plan = Plan({name: every[name] for name in names}, tokens, base, ranks, bias=shape.biased)
    return OpCase(
        op="lora",
        name=f"{shape.name} {', '.join(names)}, {plan.words}",
        dtype=dtype,
        make=partial(plan.make, dtype),
        floors=plan.floors(dtype.itemsize),
        reference=_torch,
        peers={
            "fastpeft": _fastpeft,
            "fastpeft layers": by_layers(_Layers, accelerated=True),
            "torch.compile": compiled(_torch),
            "peft": by_layers(_Layers),
            "unsloth": _unsloth,
        },
        settings={"model": shape.name, "tokens": tokens, "rank": sum(ranks), "adapters": len(ranks), "base": base},
    )


class _Layers(nn.Module):
    """Whichever projections are its children, all of one input."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.children())


def _torch(inputs: Inputs) -> Forward:
    x, linears = inputs.tensors["x"], list(inputs.extra["linears"].values())
    return lambda: tuple(linear(x) for linear in linears)


def _fastpeft(inputs: Inputs) -> Forward:
    compiled_group()
    x, projections = inputs.tensors["x"], [each.projection() for each in inputs.extra["linears"].values()]
    return lambda: lora_linear_group(x, projections)


def _unsloth(inputs: Inputs) -> Forward:
    functions, x, linears = unsloth_functions.load(), inputs.tensors["x"], inputs.extra["linears"]
    if any(len(linear.adapters) > 1 for linear in linears.values()):
        raise NotHereError("takes one adapter")
    layer = peft_model(_Layers(), linears).get_base_model()
    if len(linears) == 1:
        return lambda: (functions.apply_lora_o(layer, x[None])[0],)
    return lambda: tuple(y[0] for y in functions.apply_lora_qkv(layer, x[None], inplace=False))
