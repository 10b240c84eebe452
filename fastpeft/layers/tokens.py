"""PEFT's trainable tokens over an embedding or a head; forward copies no matrix. Same tree, same parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.common.device import autocast_dtype
from fastpeft_kernels.lora import Dtypes, LoraAdapter, LoraProjection
from fastpeft_kernels.tokens import token_embedding, token_linear
from fastpeft_kernels.tokens.api import index_of
from fastpeft_kernels.weights import DenseWeight, ReplacedRows

from ..integrations.trainable_tokens import TrainedTokens, trained_tokens
from .bypass import why_not_called, why_not_embedded
from .counting import Counting
from .head import lazy_logits
from .head_call import LossCalls
from .kept import bring
from .merges import SeenMerges
from .naming import NamedAsPeft
from .requests import Request, plain_request


class FastTokens(NamedAsPeft, SeenMerges, Counting, nn.Module):
    """Mixed in before PEFT's class; overrides what computes, with the adapters of the whole batch or of some rows."""

    op_name = "trained_tokens"
    fastpeft_suspended: bool = False
    fastpeft_loss: LossCalls | None = None  # of a model's head

    def request(self, x: Tensor) -> TrainedTokens | Request | str:
        """What to compute for x, ids of an embedding or a head's input, or why PEFT's own forward must run."""
        layer: Any = self
        if isinstance(self._modules["base_layer"], nn.Embedding):
            return trained_tokens(self, layer.active_adapters, x.device)
        if not layer.merged and (layer.disable_adapters or not layer.active_adapters):
            return plain_request(self._modules["base_layer"], x)
        found = self._replaced(x, layer.active_adapters)
        return found if isinstance(found, str) else _as_lora(found, autocast_dtype(x.device) or x.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.fastpeft_loss is not None and not args and not kwargs and (lazy := lazy_logits(self, x)) is not None:
            self._count("fused")
            return lazy
        return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return, misc]

    def forward_adapters(self, x: Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Called by PEFT's `forward`, and by its wrapper for the rows of one adapter in a mixed batch."""
        base: Any = self._modules["base_layer"]
        embeds = isinstance(base, nn.Embedding)
        if self.fastpeft_suspended:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)  # type: ignore[no-any-return, misc]
        reason = (why_not_embedded if embeds else why_not_called)(self, x, args, kwargs)
        found = reason or (
            trained_tokens(self, active_adapters, x.device) if embeds else self._replaced(x, active_adapters)
        )
        if isinstance(found, str):
            self._count(found)
            return super().forward_adapters(x, active_adapters, *args, **kwargs)  # type: ignore[no-any-return, misc]
        self._count("fused")
        if not embeds:
            return token_linear(x, *found)
        y = token_embedding(x, *found, padding_idx=base.padding_idx)
        scale = self._get_embed_scale()  # type: ignore[operator]
        return y if scale is None else y * scale.to(y.dtype)

    def _replaced(self, x: Tensor, names: Sequence[str]) -> TrainedTokens | str:
        """Of a head; as PEFT does, without its bias."""
        found = trained_tokens(self, names, x.device)
        if not isinstance(found, str) and autocast_dtype(x.device) is None and found.weight.dtype != x.dtype:
            return f"input in {x.dtype}, base weight in {found.weight.dtype}, no autocast"
        return found

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """A new adapter's rows are copied from the base, which is not written to."""
        bring(self)
        super(SeenMerges, self).update_layer(*args, **kwargs)  # type: ignore[misc]

    def base_parameter(self) -> nn.Parameter | None:
        return self.get_submodule("base_layer")._parameters.get("weight")


def _as_lora(found: TrainedTokens, dtype: torch.dtype) -> Request | str:
    """A head of which some rows are replaced, as the loss takes one: x W^T + (x A^T) B^T with W of the new rows, an A
    that is zero, with the rows' gradient, and a column of B for each row, zero but for its word.

    What W had in their place is never multiplied: the difference from it would be rounded as coarsely as it is large.
    B costs as many bytes for each word as there are rows, and products as wide: with half as many rows as features,
    what the loss saves beside one over logits.
    """
    weight, rows, tokens = found
    words, features = weight.shape
    if 2 * len(tokens) > features:
        return f"{len(tokens)} trained tokens, more than half of {features} features"
    index = index_of(tokens, weight.device)
    new = rows.to(weight.dtype)
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    replaced = ReplacedRows(
        DenseWeight(weight),
        new.detach().index_select(0, index_of(tuple(order), weight.device)),
        index_of(tuple([tokens[i] for i in order]), weight.device),
        [tokens[i] for i in order],
    )
    a = (new - new.detach()).to(dtype)
    b = torch.zeros((words, len(tokens)), dtype=dtype, device=weight.device)
    b[index, torch.arange(len(tokens), device=weight.device)] = 1.0
    projection = LoraProjection(replaced, None, (LoraAdapter(a, b, 1.0),))
    return Request(projection, Dtypes(dtype, dtype, dtype))


def stock_tokens() -> type[nn.Module]:
    """PEFT's class."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    return TrainableTokensLayer


@cache
def fast_tokens() -> type[nn.Module]:
    """Made when PEFT is first needed; a module attribute, so that instances can be pickled."""
    members = {"__module__": __name__, "__doc__": "TrainableTokensLayer of PEFT, without a copy of the matrix."}
    globals()["FastTrainableTokens"] = made = type("FastTrainableTokens", (FastTokens, stock_tokens()), members)
    return made


def __getattr__(name: str) -> Any:
    """Unpickling looks the class up by name."""
    if name == "FastTrainableTokens":
        return fast_tokens()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
