"""LoRA projections: a frozen linear map plus low-rank updates, one at a time or all that read the same input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..common.device import autocast_dtype, autocast_off
from ..common.random import draw_seed
from ..common.tracing import as_op
from ..common.validation import FLOATING, check_instance
from ..weights import DenseWeight, FrozenWeight
from . import autograd, custom_op
from .backends import check_backend
from .mixed import check_adapter_index
from .projection import Dtypes, Group, LoraAdapter, LoraProjection, check_group
from .remade import note, remade


def lora_linear(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    a: Tensor,
    b: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """One LoRA projection of x; see `lora_linear_group`, of which this is the case of one projection, one adapter.

    Equivalent PyTorch: `F.linear(x, weight, bias) + scaling * F.linear(F.linear(F.dropout(x, dropout), a), b)`.

    Args:
        x: (..., in_features), floating.
        weight: frozen; a matrix (out_features, in_features) or a FrozenWeight.
        a: (rank, in_features).
        b: (out_features, rank), dtype of `a`.
        scaling: factor of the update; a float or a 0-d tensor.
        bias: (out_features,) or None.
        dropout: probability of dropping an element of x before `a`.
        training: False switches dropout off.
        backend: as for `lora_linear_group`.

    Returns:
        (..., out_features) in x's dtype, or autocast's.

    Raises:
        TypeError, ValueError: as `lora_linear_group`.

    Source: LoRA, Hu et al. 2021, arXiv:2106.09685.
    """
    frozen = weight if isinstance(weight, FrozenWeight) else DenseWeight(weight)
    projection = LoraProjection(frozen, bias, (LoraAdapter(a, b, scaling, None, dropout),))
    return lora_linear_group(x, (projection,), training=training, backend=backend)[0]


def lora_linear_group(
    x: Tensor,
    projections: Sequence[LoraProjection],
    *,
    compute_dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    training: bool = True,
    seeds: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
    adapter_index: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """All projections of one input, with any number of adapters each, as one differentiable operation.

    Equivalent PyTorch: `lora.reference.lora_group_reference`. Gradients reach x, every adapter's a, b and bias, and the
    projections' biases, where they require them; the frozen weights never get one. Keeps x, x A^T and the packed
    adapters for backward, no dropout mask and no decoded weight.

    Args:
        x: (..., in_features), floating; any number of leading dimensions, also empty.
        projections: frozen weights (out_features, in_features) with their adapters; none needs any adapter.
        compute_dtype: dtype of the frozen products; default autocast's dtype when autocast is on, else x's.
        lora_dtype: dtype of the adapters' products; default autocast's, else the adapters' own. Where it is wider than
            `compute_dtype`, the update is added to the frozen product in the wider dtype.
        out_dtype: dtype of the results; default `compute_dtype`.
        training: False switches dropout off.
        seeds: dropout seeds, int64 (1,) or None for each projection; default drawn from torch's generator of x's
            device, one for each projection with dropout, in order.
        backend: who computes the products. "library": BLAS, cuBLAS and, on a CPU, C++ only. "triton": our kernels all
            that they can, never falling back; fp16 and bf16 on a GPU. "auto": for each product what `fastpeft tune`
            measured to be faster on this device, else its default.
        adapter_index: for a mixed batch, x (rows, ..., in_features), in which each row has an adapter of its own: its
            `index` for each row; a row whose number no adapter has gets the frozen projection alone. The products of
            rank width are the library's then, whatever the backend.

    Returns:
        One new tensor (..., out_features) for each projection.

    Raises:
        TypeError: an argument that is no tensor, not floating, or adapters of differing dtypes.
        ValueError: sizes or devices that do not fit, or a backend that cannot serve them; the message names the
            argument, what was expected and what came.
        RuntimeError: in backward, when a frozen weight was changed or moved since forward.

    Source: LoRA, Hu et al. 2021, arXiv:2106.09685.
    """
    check_group(x, projections)
    dtypes = resolve_dtypes(x, projections, compute_dtype, lora_dtype, out_dtype)
    drawn = (
        draw_seeds(x.device, projections, training) if seeds is None else given_seeds(seeds, x, projections, training)
    )
    check_backend(x, Group(projections, dtypes, drawn, backend))
    if adapter_index is not None:
        adapter_index = check_adapter_index(adapter_index, x, projections)
    return run_group(x, projections, dtypes, drawn, backend, adapter_index)


def run_group(
    x: Tensor,
    projections: Sequence[LoraProjection],
    dtypes: Dtypes,
    seeds: Sequence[Tensor | None],
    backend: str = "auto",
    adapter_index: tuple[int, ...] | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear_group` for callers that have checked their arguments."""
    return run(x, Group(projections, dtypes, seeds, backend, adapter_index))


def run(x: Tensor, group: Group) -> tuple[Tensor, ...]:
    """`run_group` of a group, which keeps what was found out of it for the next time.

    torch.compile and dispatch modes see one op forward and one backward.
    """
    with autocast_off(x.device):
        if as_op():
            return custom_op.apply(x, group)
        dtypes = group.dtypes if group.backend == "triton" else group.dtypes.for_input(x)
        group = group if dtypes == group.dtypes else replace(group, dtypes=dtypes)
        outputs = autograd.apply(x, group, remade(x))
        note(outputs)
        return outputs


def draw_seeds(device: torch.device, projections: Sequence[LoraProjection], training: bool) -> list[Tensor | None]:
    """One seed for each projection that drops anything, in order; None for the others."""
    return [draw_seed(device) if training and any(a.dropout for a in p.adapters) else None for p in projections]


def given_seeds(
    seeds: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[LoraProjection],
    training: bool,
    more: Sequence[float] = (),
) -> list[Tensor | None]:
    """The caller's seeds, of each projection and for each of `more`, checked; None where nothing is dropped."""
    check_instance("seeds", seeds, list, tuple)
    drops = [any(adapter.dropout for adapter in projection.adapters) for projection in projections]
    drops += [p > 0.0 for p in more]
    if len(seeds) != len(drops):
        what = "one for each projection" + " and one for what is dropped between them" * bool(more)
        raise ValueError(f"seeds: expected {len(drops)}, {what}, got {len(seeds)}")
    if not training:
        return [None] * len(seeds)
    for i, (seed, wanted) in enumerate(zip(seeds, drops, strict=True)):
        if not wanted:
            continue
        if seed is None:
            raise ValueError(f"seeds[{i}]: expected an int64 tensor (1,) where something is dropped, got None")
        check_instance(f"seeds[{i}]", seed, Tensor)
        if seed.dtype != torch.int64 or tuple(seed.shape) != (1,) or seed.device != x.device:
            raise ValueError(
                f"seeds[{i}]: expected int64 (1,) on {x.device}, got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
            )
    return [seed if wanted else None for seed, wanted in zip(seeds, drops, strict=True)]


def resolve_dtypes(
    x: Tensor,
    projections: Sequence[LoraProjection],
    compute: torch.dtype | None,
    lora: torch.dtype | None,
    out: torch.dtype | None,
) -> Dtypes:
    autocast = autocast_dtype(x.device)
    own = {adapter.a.dtype for projection in projections for adapter in projection.adapters}
    if lora is None and autocast is None and len(own) > 1:
        raise TypeError(
            f"projections: expected adapters of one dtype, or lora_dtype to be given, got {sorted(map(str, own))}"
        )
    compute = compute or autocast or x.dtype
    lora = lora or autocast or (own.pop() if own else compute)
    resolved = Dtypes(compute, lora, out or compute)
    for name in ("compute", "lora", "out"):
        if getattr(resolved, name) not in FLOATING:
            raise TypeError(f"{name}_dtype: expected a floating dtype of {FLOATING}, got {getattr(resolved, name)!r}")
    return resolved
