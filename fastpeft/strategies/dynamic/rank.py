"""LoRA adapters of which some ranks go, for good or for a while."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"


class Adapter:
    """One module's, of PEFT.

    Attributes:
        path: within the base model.
        layer: PEFT's.
    """

    def __init__(self, path: str, layer: Any, config: Any) -> None:
        self.path, self.layer, self._config = path, layer, config

    @property
    def a(self) -> Any:
        """(rank, in_features)."""
        return self.layer.lora_A[ADAPTER].weight

    @property
    def b(self) -> Any:
        """(out_features, rank)."""
        return self.layer.lora_B[ADAPTER].weight

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def alpha(self) -> float:
        """What `alpha_pattern` must say for the scaling to stay what it is."""
        divisor = math.sqrt(self.rank) if self._config.use_rslora else self.rank
        return float(self.layer.scaling[ADAPTER] * divisor)

    def importance(self) -> Any:
        """(rank,) mean of |value times gradient| over a rank's row of A, plus that over its column of B."""
        a, b = ((weight.detach() * weight.grad).abs() for weight in (self.a, self.b))
        return a.mean(1) + b.mean(0)

    def keep(self, ranks: Sequence[int], optimizer: Any = None) -> None:
        """Leave these alone, with their optimizer state; the scaling stays. PEFT's configuration is told.

        State that is not value by value (Adafactor's, blocks of 8 bits) begins anew.

        Args:
            ranks: ascending.
            optimizer: of the run; accelerate's wrapper or torch's; None after it.
        """
        states = {} if optimizer is None else getattr(optimizer, "optimizer", optimizer).state
        for parameter, dim in ((self.a, 0), (self.b, 1)):
            places = torch.tensor(ranks, device=parameter.device)
            state, shape = states.get(parameter, {}), parameter.shape
            tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
            for name, value in tensors.items():
                if value.shape == shape:
                    state[name] = value.index_select(dim, places).contiguous()
            if any(value.shape != shape and value.numel() > 1 for value in tensors.values()):
                del states[parameter]
            parameter.grad = None
            parameter.data = parameter.data.index_select(dim, places).contiguous()
        self.layer.lora_A[ADAPTER].out_features = self.layer.lora_B[ADAPTER].in_features = len(ranks)
        self.layer.r[ADAPTER], self.layer.lora_alpha[ADAPTER] = len(ranks), self.alpha
        self._config.rank_pattern[self.path] = len(ranks)
        self._config.alpha_pattern[self.path] = self.alpha


def adapters_of(model: Any) -> dict[str, Adapter]:
    """By path, those of a PEFT model's linear layers.

    Args:
        model: with an adapter of the name that `get_peft_model` gives.
    """
    config = model.peft_config[ADAPTER]
    found = {}
    for path, module in model.get_base_model().named_modules():
        lora_a = getattr(module, "lora_A", None)
        if isinstance(lora_a, nn.ModuleDict) and ADAPTER in lora_a and isinstance(lora_a[ADAPTER], nn.Linear):
            found[path] = Adapter(path, module, config)
    return found


def first_alone(adapters: Iterable[Adapter], rank: int) -> list[tuple[Tensor, Tensor]]:
    """Set all but the first ranks of A and of B to zero, so that they neither count nor get a gradient.

    Args:
        rank: how many count.

    Returns:
        What `put_back` wants: views of the values, and what they were.
    """
    others = [view for each in adapters for view in (each.a.detach()[rank:], each.b.detach()[:, rank:])]
    found = [(view, view.clone()) for view in others]
    for view in others:
        view.zero_()
    return found


def put_back(left_out: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Undo `first_alone`."""
    for view, values in left_out:
        view.copy_(values)


def cut_to(model: Any, rank: int) -> None:
    """Leave a PEFT model the first ranks of each adapter alone; the scaling stays. It saves as any of that rank.

    Raises:
        ValueError: less than one.
    """
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    for adapter in adapters_of(model).values():
        if rank < adapter.rank:
            adapter.keep(range(rank))
