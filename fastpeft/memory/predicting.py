"""What one training needs, from a configuration alone: what lies there all the time, and the traced step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastpeft.config import LoraSection

from ..layers.mlp import FastMlp
from .composing import Peak, Traces, compose
from .layers import model_layers
from .live import LiveBytes, rounded
from .optimizer_state import state_sizes
from .policy import LayerPolicy
from .skeleton import Skeleton, build, stored
from .timeline import trace

_STATE = "optimizer's state"


@dataclass(frozen=True)
class Setting:
    """A training.

    Attributes:
        packed: frozen linear layers as nested NF4.
        dtype: of the frozen rest, and of autocast if it has 16 bits.
        device: "cuda" or "cpu", whose implementations are followed.
        accumulated: whether gradients of an earlier batch are there in forward, as with gradient accumulation.
    """

    config: Any
    task: str
    tokens: int
    rows: int
    packed: bool
    dtype: torch.dtype
    section: LoraSection
    optimizer: str = "adamw_torch"
    device: str = "cuda"
    accumulated: bool = True


@dataclass
class Model:
    """A skeleton, and its traces by (rows, tokens, what its layers do): each is made when it is first wanted."""

    setting: Setting
    skeleton: Skeleton = field(init=False)
    bytes: dict[str, int] = field(init=False)
    optimizer: int = field(init=False)
    layer_bytes: tuple[int, ...] = field(init=False)
    _traces: dict[tuple[int, int, LayerPolicy], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        s = self.setting
        self.skeleton = build(s.config, s.task, s.dtype, s.packed, s.section)
        layers = [self.skeleton.model.get_submodule(path) for path in self.skeleton.layers]
        all_of = self._count(stored(self.skeleton.model))
        of_layers = [self._count(stored(layer)) for layer in layers]
        extra = [0] * len(layers)
        for index in self.skeleton.order:
            extra[index] += 1
        for layer, uses in zip(of_layers, extra, strict=True):
            for kind, size in layer.items():
                all_of[kind] += (uses - 1) * size
        self.optimizer = all_of.pop(_STATE)
        self.bytes = all_of
        self.layer_bytes = tuple(of_layers[i]["packed"] + of_layers[i]["dense"] for i in self.skeleton.order)

    def _count(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        live = LiveBytes(self.setting.device)
        sizes = dict.fromkeys(("packed", "dense", "trained", "buffer", _STATE), 0)
        for kind, tensor in tensors:
            sizes[kind] += (new := live.add([tensor]))
            if kind == "trained" and new:
                state = state_sizes(self.setting.optimizer, tensor.numel(), self.setting.device)
                sizes[_STATE] += sum(rounded(size, self.setting.device) for size in state)
        return sizes

    @property
    def gradients(self) -> int:
        return self.bytes["trained"]

    def traces(self, kinds: Iterable[LayerPolicy], rows: int, tokens: int) -> Traces:
        found = {}
        for kind in kinds:
            key = (rows, tokens, kind)
            if key not in self._traces:
                self._traces[key] = self._trace(kind, rows, tokens)
            found[kind] = self._traces[key]
        return found

    def peak(self, layers: tuple[LayerPolicy, ...], rows: int, tokens: int) -> Peak:
        """Of one step, beside what lies there all the time; each policy keeps all or computes again."""
        traces = self.traces(dict.fromkeys(layers or (LayerPolicy(),)), rows, tokens)
        return compose(traces, self.skeleton.order, layers)

    def _trace(self, kind: LayerPolicy, rows: int, tokens: int) -> Any:
        model: Any = self.skeleton.model
        layers = model_layers(model)
        for module in model.modules():
            if isinstance(module, FastMlp):
                module.fastpeft_tile = kind.tile
        if kind.activations == "keep":
            model.gradient_checkpointing_disable()
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        dtype = self.setting.dtype
        return trace(
            model,
            layers,
            _batch(self.setting, rows, tokens),
            self.setting.device,
            autocast=dtype if dtype.itemsize == 2 else None,
            accumulated=self.setting.accumulated,
        )


def _batch(setting: Setting, rows: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.empty((rows, tokens), dtype=torch.int64, device="meta")
    if setting.task == "sequence-classification":
        return {"input_ids": ids, "labels": ids[:, 0]}
    return {"input_ids": ids, "labels": ids}
