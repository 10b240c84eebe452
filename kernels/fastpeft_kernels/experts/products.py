"""Products of rows with their own expert's matrix: a loop over experts that got rows, or torch's grouped product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.device import device_capability
from ..common.shapes import imitated
from .routing import Routes
from .structure import ExpertProjection, Matrices

BACKENDS = ("auto", "loop", "grouped_mm")


def multiply(x: Tensor, matrices: Matrices, features: int, routes: Routes, add_to: Tensor | None = None) -> Tensor:
    """y[i] = x[i] @ M[expert of i].T, (rows, features) for x (rows, m) and M (experts, features, m).

    With `add_to` the product is added to it, and it is returned.
    """
    if routes.spans is None:
        assert isinstance(matrices, Tensor)
        y = torch.nn.functional.grouped_mm(x, matrices.mT, offs=routes.ends)
        return y if add_to is None else add_to.add_(y)
    y = torch.empty((x.shape[0], features), dtype=x.dtype, device=x.device) if add_to is None else add_to
    for expert, first, last in routes.spans:
        matrix = matrices[expert] if isinstance(matrices, Tensor) else matrices(expert)
        if add_to is None:
            torch.mm(x[first:last], matrix.t(), out=y[first:last])
        else:
            y[first:last].addmm_(x[first:last], matrix.t())
    return y


def transposed(matrices: Matrices) -> Matrices:
    """(experts, m, n) of (experts, n, m)."""
    if isinstance(matrices, Tensor):
        return matrices.mT
    return lambda expert: matrices(expert).t()


def outer(y: Tensor, x: Tensor, experts: int, routes: Routes) -> Tensor:
    """Of each expert y[its rows].T @ x[its rows], (experts, n, m) for y (rows, n) and x (rows, m); 0 without rows."""
    if routes.spans is None:
        product = torch.nn.functional.grouped_mm(y.t(), x, offs=routes.ends)
        used = torch.diff(routes.ends, prepend=routes.ends.new_zeros(1)) > 0
        return torch.where(used[:, None, None], product, 0.0)
    product = torch.zeros((experts, y.shape[1], x.shape[1]), dtype=x.dtype, device=x.device)
    for expert, first, last in routes.spans:
        torch.mm(y[first:last].t(), x[first:last], out=product[expert])
    return product


def uses_loop(backend: str, projections: Sequence[ExpertProjection], dtype: torch.dtype) -> bool:
    """Whether products are a loop, which waits for the device once to learn how many rows each expert has.

    Raises:
        ValueError: an unknown backend, or "grouped_mm" was asked for and cannot serve these.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "loop":
        return True
    reason = _why_not_grouped(projections, dtype)
    if backend == "grouped_mm" and reason is not None:
        raise ValueError(f"backend: 'grouped_mm' was asked for, but {reason}")
    # On a CPU torch's grouped product is the same loop, without the dtypes and the decoding of ours.
    device = projections[0].weight.device
    capable = imitated(device) == "cuda" or (device_capability(device) or 0) >= 80
    return reason is not None or not capable


def _why_not_grouped(projections: Sequence[ExpertProjection], dtype: torch.dtype) -> str | None:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return "this torch has no grouped_mm"
    device = projections[0].weight.device
    if dtype != torch.bfloat16 and not (device.type == "cpu" and dtype in (torch.float32, torch.float16)):
        return f"it does not multiply {dtype} on {device.type}"
    for projection in projections:
        if not projection.weight.is_ready(dtype):
            return f"the weights do not lie ready in {dtype}"
        for size in (projection.in_features, projection.out_features, projection.rank):
            if size * dtype.itemsize % 16:
                return f"it needs rows of multiples of 16 bytes, and one has {size} numbers in {dtype}"
    return None
