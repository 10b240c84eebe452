"""What is fine-tuned, and how."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .sizes import MODELS

METHODS = ("lora", "qlora")
WIDER = {"bfloat16": "float32", "float16": "float32", "float32": "float64"}
"""By the dtype of a case: the wider one in which plain PEFT is run for its losses."""


@dataclass(frozen=True)
class FinetuneCase:
    """One model, method and batch. Nothing is dropped out: losses would differ between runs that are all right.

    Attributes:
        model: a name of `sizes.MODELS`, a name on the model hub, or a folder.
        method: "lora", or "qlora" over bitsandbytes' NF4 with nested scales.
        dtype: of base and products; 16 bits train under autocast over adapters in fp32, as PEFT makes them.
        device: "cuda" or "cpu".
        rows, tokens: of a batch, and of each row; an encoder-decoder reads as many and writes a quarter.
        steps: of the run.
        warmup: of them, whose time does not count.
        scale, layers: of a model of MODELS.
        checkpointing: recompute every layer in backward.
        threads: torch's, on a CPU; None for its own choice.
    """

    model: str
    method: str = "lora"
    dtype: str = "bfloat16"
    device: str = "cuda"
    rows: int = 4
    tokens: int = 1024
    rank: int = 16
    steps: int = 50
    warmup: int = 5
    scale: str = "full"
    layers: int | None = None
    checkpointing: bool = False
    learning_rate: float = 2e-4
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("dtype", WIDER), ("device", ("cuda", "cpu"))):
            if (given := getattr(self, name)) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {given!r}")
        for name, least in (("rows", 1), ("tokens", 1), ("rank", 1), ("steps", 2)):
            if (number := getattr(self, name)) < least:
                raise ValueError(f"{name}: expected at least {least}, got {number}")
        for name in ("layers", "threads"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise ValueError(f"{name}: expected at least 1, got {given}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a number above 0, got {self.learning_rate}")
        if not 1 <= self.warmup < self.steps:
            raise ValueError(f"warmup: expected 1 to {self.steps - 1}, one less than steps, got {self.warmup}")

    @property
    def published(self) -> bool:
        """Whether it has random weights, in the sizes of MODELS."""
        return self.model in MODELS

    @property
    def name(self) -> str:
        words = [self.model.rstrip("/\\").replace("\\", "/").rpartition("/")[2]]
        words += [self.scale] * (self.published and self.scale != "full")
        words += [f"{self.layers} layers"] * (self.layers is not None)
        words += [self.method, self.dtype, f"{self.rows}x{self.tokens} tokens", f"r={self.rank}"]
        words += ["checkpointing"] * self.checkpointing
        return " ".join(words)

    @property
    def settings(self) -> dict[str, Any]:
        """For records."""
        return {**asdict(self), "model": self.name.partition(" ")[0]}
