"""T5's position bias, and that of models like it, as one value for each distance in place of queries x keys.

The first layer of a stack makes the bias, and every layer hands it on to the next, so what it makes here is what all of
them give to their attention function; UMT5's layers make one each. Cross-attention, which has none, makes zeros of
queries x keys; here nothing.
"""

from __future__ import annotations

import dis
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.transformers import ATTENTION, attention_implementation
from .mixing import reduced, unmixed

SIZES = ((3, 3, 0), (5, 2, 0), (2, 7, 5), (1, 6, 5), (300, 2, 0), (2, 300, 0))
"""(queries, keys, past) of the proof."""


class RelativeBias(nn.Module):
    """Mixed in before a model's own attention class, while its attention function is ours."""

    def compute_bias(
        self, query_length: int, key_length: int, *args: Any, past_seen_tokens: Any = 0, **kwargs: Any
    ) -> Any:
        """(1, heads, 1, query_length + key_length - 1): the bias at key - query + query_length - 1.

        That is what the model's own code gives for one query that stands at the last one's place, over that many keys.
        """
        make: Any = super().compute_bias  # type: ignore[misc]
        if not _ours(self):
            return make(query_length, key_length, *args, past_seen_tokens=past_seen_tokens, **kwargs)
        past = past_seen_tokens + query_length - 1
        return make(1, query_length + key_length - 1, *args, past_seen_tokens=past, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        without = not self.has_relative_attention_bias and not args and kwargs.get("position_bias") is None
        if without and _ours(self):
            kwargs["position_bias"] = hidden_states.new_empty((1, 1, 1, 0))
        return super().forward(hidden_states, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, RelativeBias)


class NoBias(nn.Module):
    """Mixed in before UMT5's attention class where it is cross-attention, which takes no bias that could be handed in.

    Its code asks `has_relative_attention_bias` whether to make zeros or to call `compute_bias`: it is told the latter.
    """

    def compute_bias(self, query_length: int, key_length: int, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        """(1, 1, 1, 0), for none."""
        return torch.empty((1, 1, 1, 0), device=device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not _ours(self):
            return super().forward(*args, **kwargs)
        self.has_relative_attention_bias = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.has_relative_attention_bias = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, NoBias)


MIXTURES = (RelativeBias, NoBias)


def mixture_of(module: Any) -> type[nn.Module]:
    """Which of them serves a module for which `why_not_by_distance` gives None."""
    has = module.has_relative_attention_bias
    return RelativeBias if has or _takes_a_bias(unmixed(type(module))) else NoBias


def why_not_by_distance(module: Any) -> str | None:
    """Why an attention module's bias cannot be one of distances; None if it can, empty if the module knows of none."""
    has = getattr(module, "has_relative_attention_bias", None)
    if not isinstance(has, bool) or not hasattr(module, "compute_bias"):
        return ""
    kind: Any = unmixed(type(module))
    if not has:
        served = _takes_a_bias(kind) or _asks_whether_to_make_one(kind)
        return None if served else "zeros of queries x keys in place of a bias"
    try:
        with torch.no_grad():
            alike = all(_same(kind, module, *sizes) for sizes in SIZES)
    except Exception as error:
        return f"trying its position bias failed with {type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
    return None if alike else "a position bias that is not one of distances"


def _same(kind: type[Any], module: Any, queries: int, keys: int, past: int) -> bool:
    full: Tensor = kind.compute_bias(module, queries, keys, past_seen_tokens=past)
    by_distance: Tensor = kind.compute_bias(module, 1, queries + keys - 1, past_seen_tokens=past + queries - 1)
    key, query = torch.arange(keys), torch.arange(queries)[:, None]
    wanted = by_distance[:, :, 0, (key - query + queries - 1).to(full.device)]
    return full.shape == (1, full.shape[1], queries, keys) and torch.equal(full, wanted)


def _ours(module: Any) -> bool:
    return attention_implementation(module) == ATTENTION


@cache
def _asks_whether_to_make_one(kind: type[Any]) -> bool:
    """Whether the code of its forward reads the flag and makes a bias once each, by arguments that `NoBias` takes."""
    steps = dis.get_instructions(inspect.unwrap(kind.forward))
    read = [each.argval for each in steps if each.opname in ("LOAD_ATTR", "LOAD_METHOD")]
    return read.count("has_relative_attention_bias") == read.count("compute_bias") == 1


@cache
def _takes_a_bias(kind: type[Any]) -> bool:
    return "position_bias" in inspect.signature(kind.forward).parameters
