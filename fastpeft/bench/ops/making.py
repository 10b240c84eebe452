"""What the cases of ops are put together from: random numbers, floors, and peers that are given tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..left_out import NotHereError
from .case import Direction, Floor, Forward, Inputs, Peer

Function = Callable[..., Sequence[Tensor]]
"""From the tensors of a case, by name, to its outputs."""


class Numbers:
    """Random numbers that are the same in every dtype, once they were rounded to the case's.

    Args:
        device: where they are made.
        dtype: in which they are given.
        rounded: to which they are rounded first: the case's dtype.
        seed: of a generator of their own.
    """

    def __init__(self, device: str, dtype: torch.dtype, rounded: torch.dtype, seed: int) -> None:
        self.device, self.dtype, self.rounded = device, dtype, rounded
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        numbers = torch.randn(shape, device=self.device, generator=self.generator).mul_(scale)
        return numbers.to(self.rounded).to(self.dtype)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, device=self.device, generator=self.generator)

    def one(self) -> Tensor:
        """The gradient of a loss that is computed in fp32 at least."""
        return torch.ones((), device=self.device, dtype=torch.promote_types(self.dtype, torch.float32))


def floors(
    flops: tuple[float, float], operands: float, outputs: float, needed: float, gradients: float, dys: float = -1
) -> dict[Direction, Floor]:
    """Forward reads the operands and writes the outputs. Backward reads dys and what it needs, and writes gradients.

    Both together do all of the products, and read every operand once: they write the outputs too.

    Args:
        flops: of the products of the definition, forward and backward.
        operands, outputs, needed, gradients: bytes; `needed` is what of the operands, or of what forward made of them,
            no backward can do without.
        dys: bytes; those of the outputs by default.
    """
    dys = outputs if dys < 0 else dys
    return {
        "forward": Floor(flops[0], operands + outputs),
        "backward": Floor(flops[1], dys + needed + gradients),
        "both": Floor(sum(flops), operands + outputs + dys + gradients),
    }


def only_both(floors: dict[Direction, Floor]) -> dict[Direction, Floor]:
    """Of an op whose gradients some make in forward, so that neither direction alone could be compared."""
    return {"both": floors["both"]}


def by_name(function: Function) -> Peer:
    """The peer that calls the function with the inputs' tensors."""

    def peer(inputs: Inputs) -> Forward:
        return lambda: function(**inputs.tensors)

    return peer


def package(name: str, inputs: Inputs | None = None) -> Any:
    """A module of an optional package.

    Args:
        inputs: of a peer whose kernels need a GPU; None where it needs none.

    Raises:
        NotHereError: the package is not installed, does not import, or the inputs are not on a GPU.
    """
    if inputs is not None and not any(tensor.is_cuda for tensor in inputs.tensors.values()):
        raise NotHereError("needs a GPU")
    try:
        return import_module(name)
    except ImportError as error:
        raise NotHereError(f"{name.partition('.')[0]} does not import: {error}") from error


def on_copies(function: Function, names: Sequence[str], always: bool) -> Peer:
    """One that writes over what it is given, on copies, which are made anew before a call that would read the rest.

    Args:
        function: writes over the tensors `names`.
        always: whether forward does; else only backward does, and forward alone costs no copy.
    """

    def peer(inputs: Inputs) -> Forward:
        given = [inputs.tensors[name] for name in names]
        copies = _Copies([tensor.detach().clone() for tensor in given])

        def forward() -> Sequence[Tensor]:
            copies.refresh(given)
            own = dict(zip(names, _Given.apply(copies, *given), strict=True))
            copies.stale = always
            return function(**{**inputs.tensors, **own})

        return forward

    return peer


class _Copies:
    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors, self.stale = tensors, False

    def refresh(self, given: Sequence[Tensor]) -> None:
        if self.stale:
            for copy, tensor in zip(self.tensors, given, strict=True):
                copy.copy_(tensor.detach())
        self.stale = False


class _Given(torch.autograd.Function):
    """Gives the copies; their gradients are the originals'."""

    @staticmethod
    def forward(ctx: Any, copies: _Copies, *originals: Tensor) -> tuple[Tensor, ...]:
        ctx.copies = copies
        return tuple(copy.detach() for copy in copies.tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.copies.stale = True
        return None, *gradients


def peft_layer(layer: torch.nn.Module, config: str, **options: Any) -> Any:
    """PEFT's layer around one of torch's, as `get_peft_model` makes it, its base frozen.

    Args:
        config: name of PEFT's configuration class.
        options: for it, beside the target.
    """
    peft = package("peft")
    holder = torch.nn.Module()
    holder.layer = layer
    target = {} if "target_parameters" in options else {"target_modules": ["layer"]}
    model = peft.get_peft_model(holder, getattr(peft, config)(**target, **options), autocast_adapter_dtype=False)
    return model.base_model.model.layer
