"""Divergences and their gradients, in one Triton launch each: fp32, fp16 and bf16, on CUDA."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .divergence_kernels import divergence_bwd_kernel, divergence_fwd_kernel
from .tiles import CONFIGS, Config, check_launch


def divergence_triton(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    temperature: float,
    beta: float,
    out: Tensor,
    kept: Tensor,
    config: Config = CONFIGS[0],
) -> None:
    """Fill `out` and `kept`, as `divergence_op.compute` gives them.

    Raises:
        ValueError: as `tiles.check_launch`.
    """
    tokens, words = student.shape
    check_launch(divergence_fwd_kernel, student, tokens)
    if student.numel() == 0:
        return
    flags = None if counted is None else counted.contiguous().view(torch.uint8)
    with torch.cuda.device_of(student):
        divergence_fwd_kernel[(tokens,)](
            student, teacher, flags, out, kept, tokens, words, student.stride(0), teacher.stride(0), 1.0 / temperature,
            beta, KIND=kind_of(beta), EXACT=_exact(student, teacher), **config.fitted(words, student, teacher),
            num_warps=config.num_warps,
        )  # fmt: skip


def divergence_backward_triton(
    dvalues: Tensor,
    student: Tensor,
    teacher: Tensor,
    kept: Tensor,
    temperature: float,
    beta: float,
    dstudent: Tensor,
    config: Config = CONFIGS[0],
) -> None:
    """Fill `dstudent`; a row whose value in `dvalues` is zero gets zeros, and is not read.

    Raises:
        ValueError: as `tiles.check_launch`.
    """
    tokens, words = student.shape
    tile = config.fitted(words, student, teacher)
    programs = tokens * triton.cdiv(words, tile["LANES"] * tile["WIDTH"])
    check_launch(divergence_bwd_kernel, student, programs)
    if student.numel() == 0:
        return
    with torch.cuda.device_of(student):
        divergence_bwd_kernel[(programs,)](
            dvalues, student, teacher, kept, dstudent, tokens, words, student.stride(0), teacher.stride(0),
            dstudent.stride(0), 1.0 / temperature, beta, KIND=kind_of(beta), EXACT=_exact(student, teacher), **tile,
            num_warps=config.num_warps,
        )  # fmt: skip


def kind_of(beta: float) -> str:
    return "forward" if beta == 0 else "reverse" if beta == 1 else "mixed"


def _exact(student: Tensor, teacher: Tensor) -> bool:
    return torch.float32 in (student.dtype, teacher.dtype)
