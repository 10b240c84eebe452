"""Norms of any model with a fused forward: the same module, computed in one pass each way, x kept and nothing wider.

A module becomes one of these by a swap of `__class__`, once `norm_proof` has proved on this instance what it
computes. Each forward reads eps and weight anew; what the op does not cover runs the module's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.common.shapes import kind_of
from fastpeft_kernels.norm.api import run_norm
from fastpeft_kernels.norm.form import fits_registers

from .bypass import transformed
from .counting import Counting
from .mixing import reduced, swap_out
from .norm_structure import DTYPES, Norm, changed

FEW_ON_CPU = {torch.float32: 1 << 18, torch.bfloat16: 1 << 20, torch.float16: 1 << 20}
"""Numbers up to which PyTorch's operations, called from the model's Python, take less time on a CPU than ours."""
FEW_GATED_ON_CPU = 1 << 20
"""The same of norms with a gate, in any dtype."""
FEW = "few numbers on a CPU"


class FastNorm(nn.Module, Counting):
    """Mixed in before a model's own class; overrides `forward`. Under torch.compile it is the model's own again, which
    the compiler makes one kernel."""

    fastpeft_norm: Norm | None = None
    fastpeft_suspended: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.fastpeft_norm is None or self.fastpeft_suspended or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        reason = self.why_not(*args, **kwargs)
        self._count(reason or "fused")
        return super().forward(*args, **kwargs) if reason is not None else self.fused(*args)

    def fused(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """The op, on what it serves."""
        norm, parameters = self.fastpeft_norm, self._parameters
        assert norm is not None
        form = norm.form(x.dtype, getattr(self, norm.eps_name))
        y: Tensor = run_norm(x, parameters.get("weight"), parameters.get("bias"), form, gate=gate)
        return y

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        """Why the module's own forward must run, or None."""
        norm, weight = self.fastpeft_norm, self._parameters.get("weight")
        assert norm is not None
        gated = norm.norm_before_gate is not None
        if kwargs or len(args) != (2 if gated else 1):
            return f"called with other arguments than {'x and gate' if gated else 'x'}"
        for given in args:
            if type(given) is not Tensor:
                return f"an input of type {type(given).__name__}"
        x = args[0]
        few = FEW_GATED_ON_CPU if gated else FEW_ON_CPU.get(x.dtype, 0)
        if (x.is_cpu or (x.is_meta and kind_of(x.device) == "cpu")) and x.numel() <= few:
            return FEW
        if x.dim() not in norm.dimensions:
            return f"an input of {x.dim()} dimensions"
        if (name := changed(self, norm)) is not None:
            return f"{name}: changed since it was accelerated"
        if type(getattr(self, norm.eps_name)) not in (float, int):
            return f"{norm.eps_name}: no number"
        if weight is None and norm.weight_dtype is None:
            return transformed() if x.dtype in DTYPES else f"an input in {x.dtype}"
        if type(weight) is not nn.Parameter:  # sharded, or a view that FSDP1 or a replica keeps elsewhere
            return f"a weight of type {type(weight).__name__}"
        if weight.dtype != norm.weight_dtype:
            return f"a weight cast from {norm.weight_dtype} to {weight.dtype}"
        if x.dtype not in DTYPES:
            return f"an input in {x.dtype}"
        if x.device != weight.device or x.shape[-1] != weight.shape[0]:
            return f"an input of {tuple(x.shape)} on {x.device}, a weight of {tuple(weight.shape)} on {weight.device}"
        if gated and (args[1].shape != x.shape or args[1].device != x.device or args[1].dtype not in DTYPES):
            return f"a gate of {tuple(args[1].shape)} in {args[1].dtype}"
        if gated and kind_of(x.device) == "cuda":
            form = norm.form(x.dtype, getattr(self, norm.eps_name))
            if not fits_registers(form, x, weight.requires_grad):
                return f"a gate of {x.shape[-1]} features, which the kernel has no registers for"
        return transformed()

    def leave(self) -> None:
        """This instance as it was before."""
        for name in ("fastpeft_norm", "fastpeft_calls", "fastpeft_suspended"):
            self.__dict__.pop(name, None)
        swap_out(self, FastNorm)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, FastNorm)
