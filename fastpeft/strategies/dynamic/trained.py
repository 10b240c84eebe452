"""Which layers are trained at the moment."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fastpeft.errors import UserError


@dataclass(frozen=True)
class Layer:
    """One of a model's layers, with something to train in it.

    Attributes:
        number: its place among all layers, an encoder's before a decoder's; 0 is the lowest.
        path: of the module.
        parameters: what is trained there.
    """

    number: int
    path: str
    parameters: tuple[Any, ...]


class Trained:
    """A frozen layer has no gradients, no optimizer state, and below the lowest trained one keeps nothing for backward.

    Attributes:
        layers: those with something to train, by number.
        others: what is trained outside of layers (heads, embeddings), always.
        active: numbers of the layers that are trained.
    """

    def __init__(self, model: Any) -> None:
        """Raises UserError for a model whose layers are not known."""
        from fastpeft.memory.layers import model_layers

        paths = list(model_layers(model))
        inside: dict[int, list[Any]] = {}
        self.others: list[Any] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            place = next((place for place, path in enumerate(paths) if name.startswith(f"{path}.")), None)
            (self.others if place is None else inside.setdefault(place, [])).append(parameter)
        if not inside:
            raise UserError(
                "strategy.options.rules: expected a model with something to train in layers that transformers marks as "
                f"such, got {type(model.get_base_model()).__name__}"
            )
        self.layers = {place: Layer(place, paths[place], tuple(inside[place])) for place in sorted(inside)}
        self.active = frozenset(self.layers)

    def only(self, numbers: Collection[int], optimizer: Any) -> None:
        """Train these layers and freeze all others.

        What thaws begins with a fresh optimizer state, as what was never trained.

        Args:
            numbers: of layers.
            optimizer: of the run; accelerate's wrapper or torch's.
        """
        states = getattr(optimizer, "optimizer", optimizer).state
        for number, layer in self.layers.items():
            wanted = number in numbers
            for parameter in layer.parameters:
                parameter.requires_grad_(wanted)
                if not wanted:
                    parameter.grad = None
                    states.pop(parameter, None)
        self.active = frozenset(numbers)

    @property
    def values(self) -> int:
        """How many numbers are trained at the moment."""
        layers = (parameter for number in self.active for parameter in self.layers[number].parameters)
        return sum(parameter.numel() for parameter in (*self.others, *layers))

    def in_gradient(self) -> dict[int, list[Any]]:
        """By number of the layer, the parameters that have a gradient."""
        found = {
            number: [parameter for parameter in self.layers[number].parameters if parameter.grad is not None]
            for number in sorted(self.active)
        }
        return {number: parameters for number, parameters in found.items() if parameters}


def named(numbers: Collection[int]) -> str:
    """Layers in words: "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"
