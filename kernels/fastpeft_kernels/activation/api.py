"""Gated activations, act(gate) * up, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.device import triton_available
from ..common.shapes import imitated
from ..common.writes import count_writes
from ..native.activation import activation_refusal, gated_activation_backward_native, gated_activation_native
from .choosing import BACKWARD, DTYPES, FORWARD, activation_backend
from .library import gated_activation_backward_library, gated_activation_library

BACKENDS = ("auto", "torch", "native", "triton")
# The C++ counts in this order.
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "quick_gelu", "relu2")


def gated_activation(
    gate: Tensor | None, up: Tensor, kind: str, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """h = act(gate) * up; without a gate h = act(up).

    Equivalent PyTorch, for "silu": `torch.nn.functional.silu(gate) * up`; `reference.ACTIVATIONS` has them all.
    Computed in fp32 (fp64 in fp64) and rounded once. Deterministic. Not differentiable: an autograd function calls
    it.

    Args:
        gate: (tokens, features) in fp32, fp16, bf16 or fp64, or None. Columns are contiguous, rows any distance apart:
            typically gate and up are the halves of one tensor (tokens, 2 * features).
        up: as gate; shape, dtype and device are the same.
        kind: "silu"; "gelu", with the error function, and "gelu_tanh", its approximation; "relu"; "quick_gelu", that is
            x * sigmoid(1.702 x); "relu2", the square of relu.
        out: as up; filled and returned. It may be the very tensor `gate` or `up`, or share no memory with them.
        backend: "torch"; "native" (C++, on CPU, not in fp64); "triton" (on CUDA, not in fp64); or "auto": what
            `fastpeft tune` found to be fastest here, else triton on CUDA, native on CPU where it can be built, torch.

    Returns:
        `out`, or a new contiguous tensor (tokens, features).

    Raises:
        TypeError: a tensor is not one, or not of those dtypes.
        ValueError: any other argument is not as above; a backend that was asked for cannot serve these tensors here.
        ImportError: backend "triton" without Triton.

    Source: GLU Variants Improve Transformer, Shazeer 2020, arXiv:2002.05202; relu2: Primer, So et al. 2021,
    arXiv:2109.08668.
    """
    _check_kind(kind)
    _check(up, "up", None)
    if gate is not None:
        _check(gate, "gate", up)
    if out is None:
        out = torch.empty(tuple(up.shape), dtype=up.dtype, device=up.device)
    else:
        _check_results({"gate": gate, "up": up}, {"out": out}, up)
    _check_backend(backend, up)
    fill_gated_activation(gate, up, kind, out, backend)
    return out


def fill_gated_activation(gate: Tensor | None, up: Tensor, kind: str, out: Tensor, backend: str = "auto") -> None:
    """`gated_activation` for callers that have checked their arguments."""
    if up.numel() == 0 or imitated(up.device):
        return
    if backend == "auto":
        backend = activation_backend(FORWARD, gate, up, kind)
    if backend == "torch":
        gated_activation_library(gate, up, kind, out)
    elif backend == "native":
        gated_activation_native(gate, up, KINDS.index(kind), out)
        count_writes(out)
    else:
        from .forward import gated_activation_triton
        from .tiles import config_of

        gated_activation_triton(gate, up, kind, out, config_of(backend))
        count_writes(out)


def gated_activation_backward(
    dh: Tensor,
    gate: Tensor | None,
    up: Tensor,
    kind: str,
    *,
    dgate: Tensor | None,
    dup: Tensor,
    h: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Gradients of `gated_activation`, and its result again, in one pass over memory.

    Equivalent PyTorch, with a = act(gate): `dgate = dh * up * act'(gate)`, `dup = dh * a`, `h = a * up`; without a gate
    `dup = dh * act'(up)`, `h = act(up)`. Computed in fp32 (fp64 in fp64) and rounded once. Deterministic.

    Args:
        dh: (tokens, features), the gradient of h. Layout, dtype and device of all tensors as in `gated_activation`.
        gate, up, kind, backend: as they were there.
        dgate: (tokens, features), filled; None when, and only when, gate is.
        dup: (tokens, features), filled.
        h: (tokens, features), filled with the forward's result, when given.

    Every element is read before any result is written at its place, so a result may be the very tensor of an input: `h`
    that is `dh` takes no memory of its own, `dgate` that is `gate` and `dup` that is `up` neither. Any other memory in
    common is refused.

    Raises:
        TypeError, ValueError, ImportError: as `gated_activation`.
    """
    _check_kind(kind)
    _check(up, "up", None)
    _check(dh, "dh", up)
    _check(dup, "dup", up)
    if gate is not None:
        _check(gate, "gate", up)
    if (gate is None) != (dgate is None):
        raise ValueError(
            f"dgate: expected {'None without' if gate is None else 'a tensor with'} a gate, "
            f"got {'None' if dgate is None else 'a tensor'}"
        )
    _check_results({"dh": dh, "gate": gate, "up": up}, {"dgate": dgate, "dup": dup, "h": h}, up)
    _check_backend(backend, up)
    fill_gated_activation_backward(dh, gate, up, kind, dgate, dup, h, backend)


def fill_gated_activation_backward(
    dh: Tensor,
    gate: Tensor | None,
    up: Tensor,
    kind: str,
    dgate: Tensor | None,
    dup: Tensor,
    h: Tensor | None,
    backend: str = "auto",
) -> None:
    """`gated_activation_backward` for callers that have checked their arguments."""
    if up.numel() == 0 or imitated(up.device):
        return
    if backend == "auto":
        backend = activation_backend(BACKWARD, gate, up, kind)
    if backend == "torch":
        gated_activation_backward_library(dh, gate, up, kind, dgate, dup, h)
    elif backend == "native":
        gated_activation_backward_native(dh, gate, up, KINDS.index(kind), dgate, dup, h)
        count_writes(dgate, dup, h)
    else:
        from .backward import gated_activation_backward_triton
        from .tiles import config_of

        gated_activation_backward_triton(dh, gate, up, kind, dgate, dup, h, config_of(backend))
        count_writes(dgate, dup, h)


def _check_backend(backend: str, up: Tensor) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "native" and (reason := activation_refusal(up.device, up.dtype)):
        raise ValueError(f"backend: 'native' was asked for, which {reason}")
    if backend == "triton":
        if not triton_available():
            raise ImportError("backend: 'triton' was asked for, but Triton is not installed")
        if up.dtype not in DTYPES:
            raise ValueError(f"backend: 'triton' was asked for, which takes fp32, fp16 and bf16, got {up.dtype}")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")


def _check(x: Tensor, name: str, up: Tensor | None) -> None:
    """Raises unless `x` is a matrix of contiguous rows, like `up`."""
    if not isinstance(x, Tensor) or x.dtype not in (*DTYPES, torch.float64):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a tensor in fp32, fp16, bf16 or fp64, got {got}")
    if x.dim() != 2:
        raise ValueError(f"{name}: expected (tokens, features), got shape {tuple(x.shape)}")
    if up is not None and (x.shape != up.shape or x.dtype != up.dtype or x.device != up.device):
        raise ValueError(
            f"{name}: expected shape, dtype and device of up, {tuple(up.shape)}, {up.dtype} and {up.device}, "
            f"got {tuple(x.shape)}, {x.dtype} and {x.device}"
        )
    rows, columns = x.shape
    if (columns > 1 and x.stride(1) != 1) or (rows > 1 and x.stride(0) < columns):
        raise ValueError(f"{name}: expected contiguous columns and rows that do not overlap, got strides {x.stride()}")


def _check_results(inputs: dict[str, Tensor | None], results: dict[str, Tensor | None], up: Tensor) -> None:
    given = {name: x for name, x in inputs.items() if x is not None}
    wanted = {name: x for name, x in results.items() if x is not None}
    for name, result in wanted.items():
        _check(result, name, up)
        if result.requires_grad:
            raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does")
        for other, x in given.items():
            if _share(result, x) and not _same_place(result, x):
                raise ValueError(
                    f"{name}: expected the very tensor {other} or memory of its own, got a part of {other}"
                )
        for other, x in wanted.items():
            if other != name and _share(result, x):
                raise ValueError(f"{name}: expected memory of its own, got some of {other}'s")


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and (a.stride(0) == b.stride(0) or a.shape[0] <= 1)


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices of one shape have memory in common. Taken to, where telling would need a search."""
    rows, columns = a.shape
    size = a.element_size()
    distance = b.data_ptr() - a.data_ptr()
    stride = b.stride(0) if distance < 0 else a.stride(0)  # of the one that begins first
    reach = ((rows - 1) * stride + columns) * size
    if a.numel() == 0 or abs(distance) >= reach:
        return False
    if rows > 1 and a.stride(0) == b.stride(0) and distance % size == 0:
        column = abs(distance) // size % stride
        return column < columns or stride - column < columns
    return True
