"""How each layer of a model spends memory: what a plan decides, and `accelerate(memory=...)` carries out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Activations = Literal["keep", "selective", "recompute", "offload"]
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)


@dataclass(frozen=True)
class LayerPolicy:
    """One layer, the modules that transformers' own activation checkpointing wraps. Results are the same under each.

    Attributes:
        activations: what forward keeps for backward. "keep": all that backward reads. "selective": all
            but gate and up of MLPs that are one op, which are computed again. "recompute": the layer's input only.
            "offload": that input too, but in pinned host memory, brought back ahead of use.
        tile: tokens of an MLP that is one op which are computed at a time, forward and backward; 0 for all at once.
            Nothing of gate and up is kept then, and nothing of them is larger than a tile. Adapters' gradients are
            summed tile by tile, which rounds differently; all else is the same. Not with "keep".
        streamed: frozen base weights stay in host memory, as they are stored, and are copied to the device ahead of
            each use, forward and backward; adapters stay on the device.
    """

    activations: Activations = "keep"
    streamed: bool = False
    tile: int = 0

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"activations: expected one of {', '.join(ACTIVATIONS)}, got {self.activations!r}")
        if type(self.tile) is not int or self.tile < 0:
            raise ValueError(f"tile: expected 0 or more tokens, got {self.tile!r}")
        if self.tile and self.activations == "keep":
            raise ValueError(
                f'tile: expected 0 with activations="keep", which keeps gate and up of all tokens, got {self.tile}'
            )


@dataclass(frozen=True)
class MemoryPolicy:
    """A whole model.

    Attributes:
        layers: one for each layer, in the order of the model's modules (an encoder's before its decoder's), or one for
            all of them.
        decoded: bytes of one layer's decoded weights that may wait, where it is computed again, until backward reads
            them; what does not fit is decoded once more.
        ring: device buffers that streamed layers take turns in; 2 copy one layer while another computes.
        host_memory: bytes that streamed weights may take of the host's memory; None for what is free. Beyond it weights
            that lie in files mapped into memory, as `fastpeft.load(mapped=True)` gives them, stay there and are read
            from the disk when their turn comes; all others take memory all the same.
    """

    layers: LayerPolicy | tuple[LayerPolicy, ...] = LayerPolicy()
    decoded: int = 0
    ring: int = 2
    host_memory: int | None = None

    def __post_init__(self) -> None:
        if self.decoded < 0:
            raise ValueError(f"decoded: expected 0 or more bytes, got {self.decoded}")
        if self.ring < 1:
            raise ValueError(f"ring: expected 1 or more buffers, got {self.ring}")
        if self.host_memory is not None and self.host_memory < 0:
            raise ValueError(f"host_memory: expected 0 or more bytes or None, got {self.host_memory}")

    @property
    def different(self) -> tuple[LayerPolicy, ...]:
        """The policies that occur."""
        return tuple(dict.fromkeys([self.layers] if isinstance(self.layers, LayerPolicy) else self.layers))

    def of(self, count: int) -> tuple[LayerPolicy, ...]:
        """The policies of a model of `count` layers. Raises ValueError for another number of them."""
        if isinstance(self.layers, LayerPolicy):
            return (self.layers,) * count
        if len(self.layers) != count:
            raise ValueError(f"layers: expected {count} policies, one for each layer, got {len(self.layers)}")
        return self.layers
