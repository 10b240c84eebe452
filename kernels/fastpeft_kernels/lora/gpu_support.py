"""What the GPU checks share: random inputs, plain PyTorch beside us, the budget, the clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_verdicts import Verdicts
from ..common.random import dropout_bits, keep_threshold
from ..quant import encode_4bit
from ..weights import DenseWeight, FourBitWeight, FrozenWeight
from .keys import LINEAR, MIXED, RANK
from .projection import Dtypes, Group, LoraAdapter, LoraProjection
from .reference import lora_group_reference

DEVICE = torch.device("cuda")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MASK: dict[str, Any] = {"p": 0.3, "stream": 3}


def derive(
    run: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    group: Sequence[LoraProjection],
    dtypes: Dtypes,
    seeds: Sequence[Tensor | None],
    dys: Sequence[Tensor],
) -> list[Tensor]:
    """Outputs, dX and the parameters' gradients."""
    outputs = run(x, group, dtypes, seeds)
    parameters = [t for projection in group for t in projection.tensors() if t is not None and t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, [x, *parameters], list(dys))]


def make_projection(
    features: int,
    out: int,
    ranks: Sequence[int],
    dtypes: Dtypes,
    base: str,
    p: float,
    bias: bool = False,
    magnitude: bool = False,
) -> LoraProjection:
    values = rand(out, features, dtype=dtypes.compute) / features**0.5
    weight: FrozenWeight = FourBitWeight(encode_4bit(values, "nf4", 64, True)) if base == "nf4" else DenseWeight(values)
    adapters = tuple(
        LoraAdapter(
            (rand(rank, features) / features**0.5).requires_grad_(), rand(out, rank).requires_grad_(),
            torch.tensor(0.5) if i == 0 else torch.tensor(2.0, device=DEVICE), None, p, i,
        )
        for i, rank in enumerate(ranks)
    )  # fmt: skip
    offset = rand(out, dtype=dtypes.compute) if bias else None
    return LoraProjection(weight, offset, adapters, (rand(out) + 4.0).requires_grad_() if magnitude else None)


def copied(projection: LoraProjection, device: torch.device, dtype: torch.dtype | None = None) -> LoraProjection:
    """The projection on a device, dense, and in another dtype if one is given; the values the same."""

    def copy(t: Tensor) -> Tensor:
        return moved(t, device, dtype).requires_grad_(t.requires_grad)

    adapters = tuple(
        LoraAdapter(copy(a.a), copy(a.b), float(a.scaling), None, a.dropout, a.index) for a in projection.adapters
    )
    bias = None if projection.bias is None else copy(projection.bias)
    weight = DenseWeight(moved(projection.weight.decode(), device, dtype))
    return LoraProjection(weight, bias, adapters, None if projection.magnitude is None else copy(projection.magnitude))


def reference(
    x: Tensor,
    group: Group,
    dys: Sequence[Tensor],
    dtypes: Dtypes,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """What plain PyTorch gives on a device, in another dtype if one is given."""
    copies = [copied(projection, device, dtype) for projection in group.projections]
    seeds = [None if seed is None else seed.to(device) for seed in group.seeds]
    run = partial(lora_group_reference, adapter_index=group.adapter_index)
    given = [moved(dy, device, dtype) for dy in dys]
    results = derive(run, moved(x, device, dtype).requires_grad_(), copies, dtypes, seeds, given)
    return [t.to(DEVICE) for t in results]


def mixed_rows(rows: int) -> tuple[int, ...]:
    """`adapter_index` of so many rows: the first adapter, the second or none."""
    return tuple([(0, 1, 2, 0, 1, 1, 2)[i % 7] for i in range(rows)])


def with_numbers(projection: LoraProjection) -> LoraProjection:
    """With scalings that are numbers, as PEFT's are."""
    adapters = tuple(replace(adapter, scaling=0.5) for adapter in projection.adapters)
    return replace(projection, adapters=adapters)


def moved(t: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    return t.detach().to(device, dtype or t.dtype)


def reference_device(dtypes: Dtypes) -> torch.device:
    """Where plain PyTorch says how much may be erred.

    In fp32 on the CPU: how cuBLAS splits a sum depends on the shape, and with it its error, five times and more (1 to 5
    roundings of the largest value were measured for sums over 333 to 1024 tokens); ours are products of other shapes.
    """
    return torch.device("cpu") if dtypes == same_dtypes(F32) else DEVICE


def worse(one: Tensor, other: Tensor, exact: Tensor) -> Tensor:
    """The one of two results that errs more, for sums that the library on neither device makes as we do."""
    errors = [(each.double() - exact).abs().max() if exact.numel() else 0.0 for each in (one, other)]
    return one if errors[0] >= errors[1] else other


CHOICES: dict[str, dict[str, str]] = {
    "library": {RANK: "library", LINEAR: "torch", MIXED: "library"},
    "our kernels": {RANK: "triton", LINEAR: "triton", MIXED: "triton"},
}
"""What backend "auto" can be told to take."""


def dropped(x: Tensor, mask: dict[str, Any]) -> Tensor:
    """Dropout in plain PyTorch, so that no kernel of ours is in what the others are held to."""
    if not mask:
        return x
    keep = dropout_bits(mask["seed"], 0, x.shape[0], x.shape[1], mask["stream"]) >= keep_threshold(mask["p"])
    return torch.where(keep, x * (1.0 / (1.0 - mask["p"])), 0.0)


def within(ours: Tensor, same: Tensor, exact: Tensor, what: str) -> float:
    """The share of its budget that an error uses; see `Verdicts.within`."""
    verdicts = Verdicts()
    verdicts.within(ours, same, exact, what)
    return verdicts.settle()


def rand(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def same_dtypes(dtype: torch.dtype) -> Dtypes:
    return Dtypes(dtype, dtype, dtype)


def dtype_name(dtype: torch.dtype) -> str:
    return {BF16: "bf16", F16: "fp16", F32: "fp32", F64: "fp64"}[dtype]


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as the library accumulates it: the operands as they are, the result in fp32."""
    return torch.mm(a, b, out_dtype=F32) if a.is_cuda and a.dtype != F32 else a.float() @ b.float()
