"""The steps of a fused loss, as `steps` defines them, in one Triton launch each: fp32, fp16 and bf16, on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.integers import cdiv
from ..common.launching import Launcher
from .steps import Running
from .tiles import CONFIGS, Config, check_launch
from .triton_gradient import gradient_step_kernel, rescale_kernel
from .triton_online import online_step_kernel

_RESCALED = {"BLOCK": 1024, "num_warps": 4}
_launch_online = Launcher(online_step_kernel)
_launch_gradient = Launcher(gradient_step_kernel)
_launch_rescale = Launcher(rescale_kernel)


def online_step(
    raw: Tensor,
    first: int,
    labels: Tensor,
    running: Running,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    write: bool = False,
    ignore_index: int | None = None,
    config: Config = CONFIGS[0],
) -> None:
    """`steps.online_step`; the fields of `running` are filled in place, and raw is left alone unless `write`.

    Args:
        ignore_index: tokens with this label are left out: their rows are not read, and their statistics not touched.

    Raises:
        ValueError: as `tiles.check_launch`.
    """
    tokens, words = raw.shape
    check_launch(online_step_kernel, raw, tokens)
    if raw.numel() == 0:
        return
    _launch_online(
        raw.device, (tokens,),
        raw, bias, class_weight, labels,
        running.top, running.others, running.label, running.factor,
        running.tilted, running.high, running.best, running.total,
        words, first, raw.stride(0), *_map(scale, softcap), running.slack, ignore_index,
        WRITE=write, CAPPED=softcap is not None, EXACT=raw.dtype == torch.float32,
        **config.fitted(words, raw), num_warps=config.num_warps,
    )  # fmt: skip


def _map(scale: float, softcap: float | None) -> tuple[float, float]:
    return (scale, 1.0) if softcap is None else (scale / softcap, softcap)


def gradient_step(
    raw: Tensor,
    first: int,
    labels: Tensor,
    top: Tensor,
    inverse: Tensor,
    others: Tensor,
    d_nll: Tensor | None,
    d_lse: Tensor | None,
    d_total: Tensor | None,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    out: Tensor | None = None,
    config: Config = CONFIGS[0],
) -> None:
    """`steps.gradient_step`, into `out` where that is given, shaped as raw; a row without a gradient is not read.

    Raises:
        ValueError: as `tiles.check_launch`.
    """
    tokens, words = raw.shape
    out = raw if out is None else out
    tile = config.fitted(words, raw, out)
    programs = tokens * cdiv(words, tile["LANES"] * tile["WIDTH"])
    check_launch(gradient_step_kernel, raw, programs)
    if raw.numel() == 0:
        return
    _launch_gradient(
        raw.device, (programs,),
        raw, out, bias, class_weight, labels, top, inverse, others, d_nll, d_lse, d_total,
        words, first, raw.stride(0), out.stride(0), *_map(scale, softcap),
        CAPPED=softcap is not None, EXACT=raw.dtype == torch.float32, **tile, num_warps=config.num_warps,
    )  # fmt: skip


def rescale(acc: Tensor, factor: Tensor) -> None:
    """acc (tokens, features) *= factor[:, None], both fp32; rows whose factor is 1 take no memory traffic.

    Raises:
        ValueError: as `tiles.check_launch`.
    """
    check_launch(rescale_kernel, acc, acc.shape[0])
    if acc.numel() == 0:
        return
    _launch_rescale(acc.device, (acc.shape[0],), acc, factor, acc.shape[1], acc.stride(0), **_RESCALED)
