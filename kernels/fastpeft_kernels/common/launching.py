"""Launches of Triton kernels that take the host less time where there was one like it before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import JITFunction, knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .bounded import remember

ALWAYS = {"enable_fp_fusion": True}
"""Options of every kernel. A product and a sum are rounded once, as all was measured and held to fp64: what Triton does
unasked up to 3.9, which warns that 3.10 will not."""
_ABSENT: Any = object()


class Launcher:
    """`launch(device, grid, *args, **named)` is `kernel[grid](*args, **named, **ALWAYS)` on `device`.

    Triton finds out at each launch for what kinds of arguments and which options the kernel is to be compiled; for what
    is called as before the compiled kernel is launched itself, which takes the host about half as long. As before means
    on the same device, with the same integers, constants and options, with floats, booleans and None at the same
    places, and with tensors of the same dtypes that lie at multiples of 16 bytes or don't: all that Triton compiles for
    on NVIDIA's GPUs, and more. Integers count by value and not by what Triton asks of them (1, a multiple of 16, 64
    bits): to ask takes longer, and the layers of a model have the same. All else is launched by Triton: arguments of
    other types, other options, and everything while it debugs, instruments or calls hooks.

    Args:
        kernel: of `triton.jit`, or the interpreter's; its constants come last.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._constants = 0  # where they begin; of the interpreter's nothing is kept
        if isinstance(kernel, JITFunction):
            self._constants = sum(not parameter.is_constexpr for parameter in kernel.params)

    def __call__(self, device: torch.device, grid: tuple[int, ...], /, *args: Any, **named: Any) -> None:
        """Launches it.

        Args:
            device: of all tensors.
            grid: programs in up to three dimensions.
            args, named: by place and by name, as Triton takes them: tensors, descriptors, numbers, None and constants,
                and the options num_warps, num_stages and maxnreg.
        """
        kernel, first = self.kernel, self._constants
        if not first:
            kernel[grid](*args, **named)
            return
        here = driver.active.get_current_device()
        if device.index is not None and device.index != here:
            with torch.cuda.device(device):
                self(device, grid, *args, **named)
            return
        get, names, places = named.get, kernel.arg_names, len(args)
        options = (get("num_warps", _ABSENT), get("num_stages", _ABSENT), get("maxnreg", _ABSENT))
        others = places + len(named) - len(names) - len(options) + options.count(_ABSENT)
        if others or _watched() or kernel.pre_run_hooks:
            kernel[grid](*args, **named, **ALWAYS)
            return
        bound = (*args, *map(named.__getitem__, names[places:]))
        kinds: list[Any] = [here, options, bound[first:]]
        for each in bound[:first]:
            kind = type(each)
            if kind is int or each is None:
                kinds.append(each)
            elif isinstance(each, Tensor):
                kinds.append(each.dtype)
                if each.data_ptr() % 16:
                    kinds.append("")
            elif kind is float or kind is bool:
                kinds.append(kind)
            elif kind is TensorDescriptor:
                kinds += each.base.dtype, tuple(each.block_shape)
            else:
                kernel[grid](*args, **named, **ALWAYS)
                return
        key = tuple(kinds)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*bound)
            return
        compiled = kernel[grid](*args, **named, **ALWAYS)
        if isinstance(compiled, CompiledKernel) and driver.active.get_current_target().backend == "cuda":
            remember(self._compiled, key, compiled)


def _watched() -> bool:
    """Whether Triton compiles by more than arguments and options now."""
    runtime = knobs.runtime
    return runtime.debug or runtime.add_stages_inspection_hook or knobs.compilation.instrumentation_mode  # type: ignore[no-any-return]
