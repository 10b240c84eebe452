"""RMSNorm with a gate, of the value or of the result."""

from __future__ import annotations

from torch import Tensor

from ..common.validation import check_instance, check_tensor
from .api import check_norm, run_checked
from .form import ACTIVATIONS, ROUNDINGS, gated_form


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    norm_before_gate: bool = True,
    activation: str = "silu",
    groups: int = 1,
    rounding: str = "input",
    backend: str = "auto",
) -> Tensor:
    """y = rms_norm(x) * act(gate), or rms_norm(x * act(gate)), over parts of the last dimension; differentiable once.

    Equivalent PyTorch, for the defaults: `(torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps).float() *
    torch.nn.functional.silu(gate.float())).to(x.dtype)`; `reference.norm_reference` has the roundings. All else as
    `rms_norm`; backward reads the gate too, and nothing more is kept.

    Args:
        x, weight, eps, rounding: as in `rms_norm`.
        gate: of x's shape, floating.
        norm_before_gate: the gate's factor is of the norm's result, which then has x's dtype (Qwen3-Next); else of what
            is normalised (Mamba 2).
        activation: of the gate, "silu" or "sigmoid" (Kimi Linear).
        groups: into how many parts of equal size a row is divided, each with a mean square of its own (Mamba 2).
        backend: "torch", "triton" (CUDA, not fp64, at most 8192 features a group), or "auto".

    Returns:
        y, as x but contiguous.

    Raises:
        TypeError, ValueError, ImportError: as `rms_norm`.

    Source: Transformers are SSMs, Dao and Gu 2024, arXiv:2405.21060; `rms_norm`.
    """
    check_norm(x, weight, None, eps)
    check_tensor("gate", gate, x.device, tuple(x.shape))
    check_instance("norm_before_gate", norm_before_gate, bool)
    for name, value, known in (("activation", activation, ACTIVATIONS), ("rounding", rounding, ROUNDINGS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, got {value!r}")
    if type(groups) is not int or groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups: expected an integer that divides {x.shape[-1]} features, got {groups!r}")
    dtype = x.dtype if weight is None else weight.dtype
    form = gated_form(x.dtype, dtype, float(eps), rounding, norm_before_gate, activation, groups)
    return run_checked(x, weight, None, form, backend, gate)
