"""Times on a CUDA GPU: the norms, forward and backward, beside what they replace, as a share of a copy's bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_clock import median_us
from .api import run_norm
from .form import Form, rms_form
from .reference import norm_reference

_DEVICE = torch.device("cuda")
_SHAPES = ((8192, 4096), (32768 * 8, 128), (8192, 16384))
_SMALL = (256, 1024)  # where the host decides


def speed_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named measurements, in microseconds; shares are of the bandwidth of a copy of the same size."""
    for shape in _SHAPES:
        for kind in ("llama", "gemma"):
            yield f"speed {kind} {shape[0]}x{shape[1]} bf16", partial(_measure, kind, shape, torch.bfloat16)
    yield "speed llama 8192x4096 fp32", partial(_measure, "llama", (8192, 4096), torch.float32)
    yield f"host time {_SMALL[0]}x{_SMALL[1]}", _measure_host


def _ways(kind: str, x: Tensor, weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """What computes y of x, by name."""
    form = _form(kind, x)

    def own(x: Tensor) -> Tensor:
        return norm_reference(x, weight, None, form)

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "triton": lambda x: run_norm(x, weight, None, form, "triton"),
        "module": own,
        "compiled": torch.compile(own),
    }
    if kind == "llama":
        ways["aten"] = lambda x: run_norm(x, weight, None, form, "aten")
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return ways
    arguments = (form.eps, form.offset, kind, False, False)
    ways["liger"] = lambda x: LigerRMSNormFunction.apply(x, weight, *arguments)  # type: ignore[no-untyped-call]
    return ways


def _form(kind: str, x: Tensor) -> Form:
    if kind == "llama":
        return rms_form(x.dtype, x.dtype, 1e-6, 0.0, "input")
    return rms_form(x.dtype, x.dtype, 1e-6, 1.0, "once")


def _measure(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    x, dy = (torch.randn(shape, device=_DEVICE, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    weight = torch.randn(shape[1], device=_DEVICE, dtype=dtype)
    out = torch.empty_like(dy)
    copy = median_us(lambda: out.copy_(dy))
    figures: dict[str, Any] = {"copy_us": copy}
    for name, way in _ways(kind, x, weight).items():
        try:
            y = way(x)
            forward = median_us(partial(_forward, way, x))
            backward = median_us(partial(torch.autograd.grad, y, x, dy, retain_graph=True))
        except Exception as error:  # a rival's failure is not ours, and is said
            if name in ("triton", "aten"):
                raise
            figures[f"{name}_error"] = f"{type(error).__name__}: {error}"[:200]
            continue
        figures |= {f"{name}_forward_us": forward, f"{name}_backward_us": backward}
        # forward moves as much as a copy, backward half as much more
        figures |= {f"{name}_forward_share": copy / forward, f"{name}_backward_share": 1.5 * copy / backward}
    return figures


def _measure_host() -> dict[str, Any]:
    """Microseconds of the host for a forward and a backward pass that keep the device busy for less."""
    x, dy = (torch.randn(_SMALL, device=_DEVICE, dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    weight = torch.randn(_SMALL[1], device=_DEVICE, dtype=torch.bfloat16)
    figures: dict[str, Any] = {}
    for name, way in _ways("llama", x, weight).items():
        if name == "liger":
            continue

        def step(way: Callable[[Tensor], Tensor] = way) -> None:
            torch.autograd.grad(way(x), x, dy)

        figures[f"{name}_us"] = _host_us(step)
    return figures


def _host_us(step: Callable[[], None]) -> float:
    samples = []
    for _ in range(13):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            step()
        samples.append((time.perf_counter() - begin) / 20 * 1e6)
    torch.cuda.synchronize()
    return median(samples[3:])


@torch.no_grad()
def _forward(way: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return way(x)
