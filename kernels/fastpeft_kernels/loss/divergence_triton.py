"""Divergences and their gradients, in one Triton launch each: fp32, fp16 and bf16, on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.integers import cdiv
from ..common.launching import Launcher
from .divergence_kernels import divergence_bwd_kernel, divergence_fwd_kernel
from .hard_labels import HardLabels
from .logit_map import PLAIN, LogitMap
from .tiles import CONFIGS, Config, check_launch

_launch_forward = Launcher(divergence_fwd_kernel)
_launch_backward = Launcher(divergence_bwd_kernel)


def divergence_triton(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    temperature: float,
    beta: float,
    out: Tensor,
    kept: Tensor,
    config: Config = CONFIGS[0],
    *,
    student_map: LogitMap = PLAIN,
    teacher_map: LogitMap = PLAIN,
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
    _launch_forward(
        student.device, (tokens,),
        student, teacher, student_map.bias, teacher_map.bias, flags, out, kept,
        tokens, words, student.stride(0), teacher.stride(0),
        *_map(student_map, temperature), *_map(teacher_map, temperature), beta,
        KIND=kind_of(beta), STUDENT_CAPPED=student_map.softcap is not None,
        TEACHER_CAPPED=teacher_map.softcap is not None, EXACT=_exact(student, teacher),
        **config.fitted(words, student, teacher), num_warps=config.num_warps,
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
    *,
    student_map: LogitMap = PLAIN,
    teacher_map: LogitMap = PLAIN,
    hard: HardLabels | None = None,
) -> None:
    """Fill `dstudent`, as `divergence_op.compute_backward` gives it; it may be student.

    Raises:
        ValueError: as `tiles.check_launch`.
    """
    tokens, words = student.shape
    tile = config.fitted(words, student, teacher)
    programs = tokens * cdiv(words, tile["LANES"] * tile["WIDTH"])
    check_launch(divergence_bwd_kernel, student, programs)
    if student.numel() == 0:
        return
    _launch_backward(
        student.device, (programs,),
        dvalues, student, teacher, student_map.bias, teacher_map.bias, kept, dstudent,
        *(hard[1:] if hard else [None] * 5),
        tokens, words, hard.first if hard else 0, kept.stride(0), student.stride(0), teacher.stride(0),
        dstudent.stride(0), *_map(student_map, temperature), *_map(teacher_map, temperature), temperature, beta,
        KIND=kind_of(beta), STUDENT_CAPPED=student_map.softcap is not None,
        TEACHER_CAPPED=teacher_map.softcap is not None, EXACT=_exact(student, teacher), **tile,
        num_warps=config.num_warps,
    )  # fmt: skip


def kind_of(beta: float) -> str:
    return "forward" if beta == 0 else "reverse" if beta == 1 else "mixed"


def _map(logit_map: LogitMap, temperature: float) -> tuple[float, float]:
    """factor and softcap of `logits_and_slopes`, for logits over temperature."""
    scale, softcap = logit_map.scale, logit_map.softcap
    return (scale / temperature, 1.0) if softcap is None else (scale / softcap, softcap / temperature)


def _exact(student: Tensor, teacher: Tensor) -> bool:
    return torch.float32 in (student.dtype, teacher.dtype)
