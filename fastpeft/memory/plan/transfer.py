"""How much of the copying of streamed weights hides behind computing. Seconds, bytes and operations; no torch."""

from __future__ import annotations

from dataclasses import dataclass

PRODUCT = 2
"""Operations for each token and element of a weight in one product: a multiplication and an addition."""


@dataclass(frozen=True)
class Transfer:
    """One streamed layer in a training step, while the next is copied (`MemoryPolicy.ring` of 2 or more).

    Backward of a frozen weight is one product, dY W; checkpointing adds forward's once more. Attention, adapters and
    element-wise work are left out, so that copies hide at least as well as said. Other uses of the link at the same
    time (offloaded activations go the other way) are left out too.

    Attributes:
        tokens: of one forward pass, all rows of the batch together.
        elements: of the layer's frozen weights.
        nbytes: that are copied for it, as stored.
        link: bytes a second from host to device; measured, for pinned memory.
        speed: operations a second of the device's products.
        recomputed: the layer's forward runs in backward again ("recompute", "offload").
    """

    tokens: int
    elements: int
    nbytes: int
    link: float
    speed: float
    recomputed: bool = True

    def __post_init__(self) -> None:
        for name in ("tokens", "elements", "nbytes", "link", "speed"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")

    @property
    def copy(self) -> float:
        """Seconds of one copy; a step makes two, one each way."""
        return self.nbytes / self.link

    @property
    def forward(self) -> float:
        """Seconds of forward's products."""
        return PRODUCT * self.tokens * self.elements / self.speed

    @property
    def backward(self) -> float:
        """Seconds of backward's, with those that are computed again."""
        return self.forward * (2 if self.recomputed else 1)

    @property
    def hidden(self) -> float:
        """Share of both copies that takes no time of its own, 0 to 1."""
        return (min(self.copy, self.forward) + min(self.copy, self.backward)) / (2 * self.copy)

    @property
    def waited(self) -> float:
        """Seconds that a step becomes longer by this layer's copies."""
        return 2 * self.copy * (1 - self.hidden)


def tokens_to_hide(elements: int, nbytes: int, link: float, speed: float) -> float:
    """Tokens of a forward pass from which on all copies hide, arguments as of `Transfer`.

    Forward decides, where a layer computes least: 4-bit weights of 0.52 bytes over 25 GB/s beside 400 TFLOP/s hide from
    about 4,100 tokens on, whatever the layer's size; 16-bit ones from 16,000.
    """
    return nbytes / link * speed / (PRODUCT * elements)
