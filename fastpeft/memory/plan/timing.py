"""What a step's layers take in time, told from operations and the link; nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from ..policy import LayerPolicy
from .transfer import PRODUCT, tokens_to_hide

if TYPE_CHECKING:
    from .predicting import Model


TILED = 0.01
"""Of an MLP's time, what tiles of TILED_AT tokens add. Measured on a CPU: 1.01 at 4096, and 1.08 at 1024."""
TILED_AT = 4096


@dataclass(frozen=True)
class Rates:
    """What a time is told from.

    Attributes:
        flops: multiplications and additions a second that training reaches on the GPU.
        link: bytes a second from host to GPU, and as many at the same time back.
        disk: bytes a second that are read from the disk into the host's memory.
    """

    flops: float = 60e12
    link: float = 20e9
    disk: float = 2e9

    def copying(self, size: float, waiting: float = 0) -> float:
        """Seconds until so many bytes are on the GPU, of which `waiting` are read from the disk at the same time."""
        return max(size / self.link, waiting / self.disk)


@dataclass(frozen=True)
class Work:
    """Of one layer.

    Attributes:
        elements: weights that each token is multiplied by, of stacked experts those that it chooses.
        gates: of these gate and up of MLPs that are one op, which "selective" computes again.
        down: of these those that nothing in backward reads the result of.
    """

    elements: float
    gates: float
    down: float


def work_of(layer: Any, config: Any) -> Work:
    """Of a traced layer."""
    from fastpeft.replacements.memory import mlps

    total = gates = down = 0.0
    chosen, experts = getattr(config, "num_experts_per_tok", None), _experts(config)
    for module in layer.modules():
        if hasattr(module, "in_features") and not hasattr(module, "base_layer"):
            total += _elements(module)
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() == 3 and chosen and experts:
                total += parameter.numel() * chosen / experts
    for mlp in mlps(layer):
        roles = mlp.fastpeft_roles
        assert roles is not None
        gates += sum(_elements(mlp.get_submodule(name)) for name in roles.inner)
        down += _elements(mlp.get_submodule(roles.down))
    return Work(total, gates, down)


def seconds(
    model: Model, policies: Sequence[LayerPolicy], rows: int, tokens: int, rates: Rates,
    waiting: Sequence[int] | None = None,
) -> float:  # fmt: skip
    """Of a step of all layers, of each of which so many bytes are `waiting` on the disk.

    Products with frozen weights take as long forward as backward; attention, of causal scores, two and a half times as
    long backward. What is computed again is added, and in each pass the time of the link, or of the disk, stands in
    where it is longer.
    Tiles add their share of the MLP's time.
    """
    total = 0.0
    sizes = zip(model.streamed_bytes, waiting or [0] * len(policies), model.spans(rows, tokens), strict=True)
    for policy, traced, (size, read, span) in zip(policies, model.skeleton.order, sizes, strict=True):
        work = model.work[traced]
        product = PRODUCT * span.all
        attention = 2.0 * span.all * span.positions * span.width
        inputs = span.all * span.width * model.setting.dtype.itemsize
        forward = product * work.elements + attention
        backward = product * work.elements + 2.5 * attention
        if policy.activations == "selective":
            backward += product * work.gates
        elif policy.activations != "keep":
            backward += forward - product * work.down
        if policy.tile:
            mlp = product * (work.gates + work.down)
            more = TILED * (TILED_AT / min(policy.tile, TILED_AT)) ** 1.5  # through both of what was measured
            forward, backward = forward + more * mlp, backward + more * (2 * mlp - product * work.down)
        copied, moved = size * policy.streamed, inputs * (policy.activations == "offload")
        total += max(forward / rates.flops, rates.copying(copied, read), moved / rates.link)
        total += max(backward / rates.flops, rates.copying(copied + moved, read))
    return total or 1.0


def hidden_from(model: Model, policies: Sequence[LayerPolicy], rates: Rates) -> int | None:
    """Tokens of a forward pass from which on the copies of all streamed layers hide; None where none is streamed."""
    return _hidden_from(
        model,
        [size * each.streamed for size, each in zip(model.streamed_bytes, policies, strict=True)],
        rates.link,
        rates.flops,
    )


def read_hidden_from(model: Model, waiting: Sequence[int], rates: Rates) -> int | None:
    """The same of what is read from the disk, so many bytes of each layer."""
    return _hidden_from(model, waiting, rates.disk, rates.flops)


def _hidden_from(model: Model, sizes: Sequence[int], rate: float, flops: float) -> int | None:
    found = [
        tokens_to_hide(int(model.work[traced].elements), size, rate, flops)
        for traced, size in zip(model.skeleton.order, sizes, strict=True)
        if size and not model.sees(traced)
    ]
    return ceil(max(found)) if found else None


def _elements(linear: Any) -> int:
    return int(linear.in_features * linear.out_features)


def _experts(config: Any) -> int:
    return getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
