"""VeRA as LoRA: a frozen random `a`, and a `b` made of a frozen random matrix and two trained vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.validation import check_floating


def vera_up(b: Tensor, lambda_b: Tensor, lambda_d: Tensor) -> Tensor:
    """The `b` of a `LoraAdapter` whose update is VeRA's.

    Equivalent PyTorch: `lambda_b[:, None] * b * lambda_d`; lambda_b * (b (lambda_d * (a x))) is then the LoRA update of
    it and of VeRA's frozen a. So the op keeps (tokens, rank) for backward, where the formula keeps (tokens,
    out_features) for the gradient of lambda_b. Keeps its arguments; gradients reach both vectors, not `b`.

    Args:
        b: (out_features, rank), frozen, floating.
        lambda_b: (out_features,), floating.
        lambda_d: (rank,), floating.

    Returns:
        A new tensor (out_features, rank), in the widest of the dtypes.

    Raises:
        TypeError: an argument that is no floating tensor.
        ValueError: sizes that do not fit.

    Source: VeRA, Kopiczko et al. 2023, arXiv:2310.11454.
    """
    for name, tensor, dim in (("b", b, 2), ("lambda_b", lambda_b, 1), ("lambda_d", lambda_d, 1)):
        check_floating(name, tensor)
        if tensor.dim() != dim:
            raise ValueError(f"{name}: expected {dim} dimensions, got shape {tuple(tensor.shape)}")
    if (lambda_b.shape[0], lambda_d.shape[0]) != tuple(b.shape):
        raise ValueError(
            f"b: expected shape {(lambda_b.shape[0], lambda_d.shape[0])} of lambda_b and lambda_d, got {tuple(b.shape)}"
        )
    return _VeraUp.apply(b, lambda_b, lambda_d)  # type: ignore[no-any-return]


class _VeraUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, b: Tensor, lambda_b: Tensor, lambda_d: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(b, lambda_b, lambda_d)
        return lambda_b[:, None] * b * lambda_d

    @staticmethod
    @once_differentiable
    def backward(ctx, du: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        b, lambda_b, lambda_d = ctx.saved_tensors
        product = du * b
        d_lambda_b = torch.mv(product, lambda_d.to(product.dtype)).to(lambda_b.dtype)
        d_lambda_d = torch.mv(product.t(), lambda_b.to(product.dtype)).to(lambda_d.dtype)
        return None, d_lambda_b, d_lambda_d
