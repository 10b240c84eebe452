"""Launches of Triton kernels that take the host less time where there was one like it before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bounded import remember
from .device import launching_on


class Launcher:
    """Launches a kernel whose arguments are tensor descriptors, tensors, numbers and constants, in this order.

    Triton finds out at each launch for what kind of arguments the kernel is to be compiled, in some 20 us of the host;
    for what is called as before the compiled kernel is launched itself, which takes a quarter of that. As before means
    on the same device, with the same numbers and constants, and tensors of the same dtypes at multiples of 16 bytes.

    Args:
        kernel: of `triton.jit`, or the interpreter's.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __call__(
        self,
        device: torch.device,
        grid: tuple[int, ...],
        tensors: Sequence[Tensor | None],
        numbers: tuple[float, ...],
        described: Sequence[Any] = (),
        **constants: Any,
    ) -> None:
        """`kernel[grid](*described, *tensors, *numbers, **constants)` on `device`.

        Args:
            device: of all tensors.
            grid: programs in up to three dimensions.
            tensors: each on `device`, or None.
            numbers: integers and floats; at one place always of one type.
            described: a `TensorDescriptor` each, whose blocks the constants decide, or None.
            constants: of the kernel, and launch options.
        """
        grid, places = (*grid, 1, 1)[:3], 0
        kinds: list[torch.dtype | None] = []
        for tensor in tensors:
            if tensor is None:
                kinds.append(None)
            else:
                kinds.append(tensor.dtype)
                places |= tensor.data_ptr()
        for each in described:
            kinds.append(None if each is None else each.base.dtype)
        key = (device, numbers, *kinds, *constants, *constants.values())
        args = (*described, *tensors, *numbers)
        found = None if places % 16 else self._compiled.get(key)
        if found is not None and (device.index is None or device.index == torch.cuda.current_device()):
            compiled, last = found
            compiled[grid](*args, *last)
            return
        with launching_on(device):
            compiled = self.kernel[grid](*args, **constants)
        if compiled is not None and not places % 16:  # None: the interpreter's
            last = tuple([constants[name] for name in self.kernel.arg_names[len(args) :]])
            remember(self._compiled, key, (compiled, last))
