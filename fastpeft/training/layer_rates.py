"""Learning rates that fall from layer to layer, from the head down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastpeft.errors import UserError

from .optimizers import chosen_optimizer


@dataclass(frozen=True)
class Level:
    """What learns at one rate.

    Attributes:
        name: such as "layer 2 of 6".
        below: how many levels lie above it: 0 for the head.
        parameters: names of what is trained there.
    """

    name: str
    below: int
    parameters: tuple[str, ...]


def levels(model: Any) -> list[Level]:
    """Head, layers from the top, embeddings; each stack of layers (an encoder's, a decoder's) is counted by itself.

    What comes before the first layer are embeddings; what is neither there nor in a layer, norms and poolers between
    them too, belongs to the head.

    Raises:
        UserError: a model whose layers are not known.
    """
    from fastpeft.memory.layers import model_layers

    stacks: dict[str, list[str]] = {}
    for path in model_layers(model):
        stacks.setdefault(path.rpartition(".")[0], []).append(path)
    if not stacks:
        raise UserError(
            "strategy.options.layer_rate_decay: expected a model of layers that transformers marks as such, "
            f"got {type(model).__name__}"
        )
    of_layer = {
        path: (f"layer {number} of {len(paths)}", len(paths) - number + 1)
        for paths in stacks.values()
        for number, path in enumerate(paths, 1)
    }
    deepest = max(map(len, stacks.values())) + 1
    found: dict[tuple[int, str], list[str]] = {}
    in_layers = False
    for name, parameter in model.named_parameters():
        layer = next((path for path in of_layer if name.startswith(f"{path}.")), None)
        in_layers = in_layers or layer is not None
        if not parameter.requires_grad:
            continue
        label, below = of_layer[layer] if layer else ("head", 0) if in_layers else ("embeddings", deepest)
        found.setdefault((below, label), []).append(name)
    return [Level(label, below, tuple(found[below, label])) for below, label in sorted(found)]


def use_layer_rates(trainer: Any, optimizer: str, decay: float) -> list[tuple[str, float, int]]:
    """Give a trainer its optimizer, with groups by level; before it trains.

    Args:
        optimizer: `training.optim`.
        decay: each level's rate is so many times that of the one above.

    Returns:
        (level, peak rate, how many values are trained there), from the head down.

    Raises:
        UserError: a model whose layers are not known, or an optimizer that takes no groups of parameters.
    """
    arguments, model = trainer.args, trainer.model
    kind, settings = chosen_optimizer(optimizer, arguments, model)
    if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & settings.keys():
        raise UserError(
            f"strategy.options.layer_rate_decay: expected an optimizer of groups of parameters, got {optimizer}"
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(
            "strategy.options.layer_rate_decay: expected null with FSDP or DeepSpeed, "
            "which make the optimizer by themselves"
        )
    settings.pop("lr", None)
    decayed = set(trainer.get_decay_parameter_names(model))
    named = dict(model.named_parameters())
    groups, found = [], []
    for level in levels(model):
        rate = arguments.learning_rate * decay**level.below
        for weight_decay, inside in ((arguments.weight_decay, True), (0.0, False)):
            if parameters := [named[name] for name in level.parameters if (name in decayed) == inside]:
                groups.append({"params": parameters, "lr": rate, "weight_decay": weight_decay})
        found.append((level.name, rate, sum(named[name].numel() for name in level.parameters)))
    trainer.optimizer = kind(groups, lr=arguments.learning_rate, **settings)
    return found
