"""PEFT's LoRA on an embedding, its update added in one pass: same tree, same parameters."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from fastpeft_kernels.lora import lora_embedding, mixed_lora_embedding

from ..integrations import peft
from .bypass import why_not_embedded
from .counting import Counting
from .naming import NamedAsPeft
from .requests import OTHER_ROWS, without_names


class FastEmbedding(NamedAsPeft, Counting, nn.Module):
    """Mixed in before PEFT's embedding class; overrides `forward`. The frozen embedding is called as it is."""

    op_name = "lora_embedding"
    fastpeft_suspended: bool = False

    def request(self, ids: Tensor, *args: Any, **kwargs: Any) -> dict[int, tuple[Tensor, Tensor, float | Tensor]] | str:
        """(a, b, scaling) of what is to be added for ids, or why PEFT's own forward must run."""
        row_names = kwargs.get("adapter_names")
        reason = why_not_embedded(self, ids, args, kwargs if row_names is None else without_names(kwargs))
        if reason is None and row_names is not None and len(row_names) != ids.shape[0]:
            reason = OTHER_ROWS
        return reason or peft.embedding_adapters(self, row_names)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        if self.fastpeft_suspended:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return, misc]
        adapters = self.request(x, *args, **kwargs)
        if isinstance(adapters, str):
            self._count(adapters)
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return, misc]
        self._count("fused")
        y: Tensor = layer.base_layer(x)
        dtype, padding = y.dtype, layer.get_base_layer().padding_idx
        row_names = kwargs.get("adapter_names")
        index = None if row_names is None else peft.adapter_index(row_names)
        if index is not None:
            return mixed_lora_embedding(y, x, adapters, index, padding_idx=padding).to(dtype)
        for a, b, scaling in adapters.values():
            y = lora_embedding(y, x, a, b, scaling=scaling, padding_idx=padding)
        return y.to(dtype)


def stock_embedding() -> type[nn.Module]:
    """PEFT's class."""
    from peft.tuners.lora import Embedding

    return Embedding  # type: ignore[no-any-return]


@cache
def fast_embedding() -> type[nn.Module]:
    """Made when PEFT is first needed; a module attribute, so that instances can be pickled."""
    members = {"__module__": __name__, "__doc__": "Embedding of PEFT, in one pass."}
    globals()["FastLoraEmbedding"] = made = type("FastLoraEmbedding", (FastEmbedding, stock_embedding()), members)
    return made


def __getattr__(name: str) -> Any:
    """Unpickling looks the class up by name."""
    if name == "FastLoraEmbedding":
        return fast_embedding()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
