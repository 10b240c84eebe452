"""Our attention as an implementation of transformers': `attn_implementation="fastpeft"`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastpeft_kernels.attention.api import attention, plain_attention
from fastpeft_kernels.attention.masks import Mask, dense_mask
from fastpeft_kernels.common.device import autocast_dtype

from ..layers.bypass import transformed
from ..layers.counting import DENSE, count
from .attention_documents import documents, restarted_documents, within
from .attention_masks import decoded, interval_mask, is_causal_alone, seen_keys
from .attention_one_query import one_query
from .transformers import ATTENTION, collects_weights

CHOSEN_KEYS = ("indices", "block_indices")
"""Arguments by which sparse attention names the keys that are seen, in place of a mask."""
OTHERS_ARGUMENTS = ("sinks",)
"""Arguments of functions that only some models have, and that no op of ours serves."""
_SEEN_TO = (*CHOSEN_KEYS, *OTHERS_ARGUMENTS, "cache", "cu_seq_lens_q", "seq_idx", "output_attentions")


def register_attention() -> None:
    """Make `attn_implementation="fastpeft"` known to transformers, for every model of this process; again is no harm.

    `accelerate` calls it. Call it yourself before `from_pretrained(..., attn_implementation="fastpeft")`,
    `model.set_attn_implementation("fastpeft")` or a trainer that is given that name.

    Raises:
        ImportError: torch, transformers or peft is missing or older than what fastpeft supports.
    """
    from .versions import require_core

    require_core()
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, interval_mask)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers.

    Args:
        module: the attention module; only `is_causal`, `training` and what it ran before are read.
        query: (batch, heads, queries, features).
        key, value: (batch, kv_heads, keys, features) and (..., v_features).
        attention_mask: see `attention_masks`.
        dropout: of the weights; as PyTorch draws it where its own attention serves, else by a counter, other elements
            with the same probability.
        scaling: 1 / sqrt(features) by default.
        is_causal: the module's by default; counts where there is no mask, as in transformers' `sdpa`.
        softcap: bound of the scores.
        s_aux: (heads,), sinks.
        position_bias: (1, heads, queries, keys), or (1, heads, 1, queries + keys - 1) by distance, as
            `relative_bias` makes it, or empty for none.
        others: documents (`cu_seq_lens_q` and so on), `position_ids`, `output_attentions`. A window is in the mask.

    Returns:
        (batch, queries, heads, v_features), and None, or the weights where `output_attentions` asks for them.

    Raises:
        ValueError: sparse attention, whose models make a mask of the keys they choose for "eager" and "sdpa" alone.
    """
    if square := is_causal_alone(attention_mask):
        attention_mask, is_causal = None, True
    queries, keys = query.shape[2], key.shape[2]
    causal = (_module_is_causal(module) if is_causal is None else is_causal) and queries > 1
    dropout = dropout if getattr(module, "training", True) else 0.0
    if position_bias is not None and position_bias.numel() == 0:
        position_bias = None
    weights = bool(others.get("output_attentions")) or collects_weights(module)
    ordinary = softcap is None and s_aux is None and dropout < 1.0 and not weights
    if ordinary and not _asks_for_more(query, key, value, others):
        done = None
        if queries == 1 and dropout == 0.0:
            done = one_query(query, key, value, attention_mask, position_bias, scaling)
        if done is None and position_bias is None and attention_mask is None:
            done = _plain(query, key, value, causal, dropout, scaling, others)
        if done is not None:
            count(module, "fused")
            return done, None
    if named := [name for name in CHOSEN_KEYS if others.get(name) is not None]:
        what = f"sparse attention ({', '.join(named)})"
        raise ValueError(f"attn_implementation: expected 'eager' or 'sdpa' for {what}, got {ATTENTION!r}")
    if others.get("cache") is not None:  # of continuous batching, which holds keys that are not here
        count(module, "a paged cache: transformers' sdpa")
        given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
        return _sdpa(module, query, key, value, attention_mask, **given, softcap=softcap, **others)
    mask, bias = decoded(attention_mask, queries, keys)
    relative, bias = _position_bias(position_bias, bias, queries, keys)
    found = documents(queries, keys, query.shape[0], causal, others)
    if found is None and causal and keys == queries and mask.dense is None and bias is None:
        found = restarted_documents(others.get("position_ids"), queries, lambda: seen_keys(mask, keys))
    if attention_mask is None and causal:
        if found is None and keys > queries and not square:  # the rest of a static cache, not yet written
            key, value = key[:, :, :queries], value[:, :, :queries]
            relative = None if relative is None else relative[:, : 2 * queries - 1]
            bias = None if bias is None else bias[..., :queries]
            keys = queries
        if found is None and (keys == queries or square):  # of more keys, Gemma 4 keeps the last queries alone
            mask = replace(mask, right=0)
    if found is not None:
        mask = within(mask, found)
    reason = _why_not(query, key, value, weights, others) or ("dropout of all weights" if dropout >= 1.0 else None)
    if reason is not None:
        count(module, reason)
        bias = _expanded(relative, bias, queries, keys)
        return _original(module, query, key, value, mask, bias, scaling, dropout, softcap, s_aux, others)
    count(module, "fused" if mask.dense is None else DENSE)
    query, key, value = _autocast(query, key, value)
    out = attention(
        query,
        key,
        value,
        mask=mask,
        scale=scaling,
        softcap=softcap,
        relative=relative,
        bias=bias,
        sinks=s_aux,
        dropout=dropout,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def _asks_for_more(query: Tensor, key: Tensor, value: Tensor, others: dict[str, Any]) -> bool:
    """Whether there is anything special about a call, before its mask and scores are looked at."""
    if type(query) is not Tensor or query.dtype.itemsize > 4 or query.shape[0] != key.shape[0]:
        return True
    if key.shape[1] != value.shape[1]:
        return True
    if torch.compiler.is_compiling() or any([others.get(name) is not None for name in _SEEN_TO]):
        return True
    return transformed() is not None


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    dropout: float,
    scaling: float | None,
    others: dict[str, Any],
) -> Tensor | None:
    """What most calls without a mask ask for, at little cost to the host: PyTorch's own where it serves; else None."""
    if causal and key.shape[2] != query.shape[2]:
        return None
    if causal and restarted_documents(others.get("position_ids"), query.shape[2]) is not None:
        return None
    query, key, value = _autocast(query, key, value)
    return plain_attention(query, key, value, causal=causal, scale=scaling, dropout=dropout)


def _module_is_causal(module: Any) -> bool:
    """What no mask means. Modules that don't say (Mllama's cross-attention): eager sees all, sdpa is causal."""
    before = getattr(module, "fastpeft_attention", None)
    return bool(getattr(module, "is_causal", before is None or before.name != "eager"))


def _why_not(query: Tensor, key: Tensor, value: Tensor, weights: bool, others: dict[str, Any]) -> str | None:
    """Why the model's own attention must compute a call; None if it need not."""
    if weights:
        return "output_attentions"
    if named := [name for name in OTHERS_ARGUMENTS if others.get(name) is not None]:
        return f"called with {', '.join(named)}"
    if query.shape[0] != key.shape[0]:
        return f"{query.shape[0]} rows of queries over {key.shape[0]} of keys"
    if key.shape[1] != value.shape[1]:
        return f"{key.shape[1]} heads of keys and {value.shape[1]} of values"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"queries of dtype {query.dtype}"
    if type(query) not in (Tensor, torch.nn.Parameter):
        return f"queries of type {type(query).__name__}"
    return None if torch.compiler.is_compiling() else transformed()


def _original(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    bias: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
    others: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The function of the model's own file for `eager`, else transformers' `sdpa`, over a mask of queries x keys.

    Where keys and values differ in heads, PyTorch's own.
    """
    seen = dense_mask(mask, query.shape[2], key.shape[2], query.device)
    if seen is not None:
        hidden = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
        hidden = hidden.masked_fill(~seen, torch.finfo(query.dtype).min)
        bias = hidden if bias is None else hidden + bias
    if key.shape[1] != value.shape[1] and softcap is None and s_aux is None:  # those functions repeat both alike
        options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": True}
        out = scaled_dot_product_attention(query, key, value, attn_mask=bias, **options)
        return out.transpose(1, 2).contiguous(), None
    others = {name: each for name, each in others.items() if name not in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")}
    optional = {"softcap": softcap, "s_aux": s_aux}
    given = {"scaling": scaling, "dropout": dropout, **{n: v for n, v in optional.items() if v is not None}, **others}
    eager = _eager(type(module))
    function = _sdpa if eager is None else eager
    if function is _sdpa:
        given["is_causal"] = False
    out, weights = function(module, query, key, value, bias, **given)
    return out, weights


def _eager(kind: type[Any]) -> Callable[..., Any] | None:
    for each in kind.__mro__:
        found: Callable[..., Any] | None = getattr(sys.modules.get(each.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return None


def _sdpa(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out: tuple[Tensor, None] = sdpa_attention_forward(*args, **kwargs)
    return out


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """In one dtype, as autocast makes the arguments of PyTorch's own attention."""
    dtype = autocast_dtype(tensors[0].device)
    return list(tensors) if dtype is None or tensors[0].dtype == torch.float64 else [each.to(dtype) for each in tensors]


def _position_bias(
    given: Tensor | None, bias: Tensor | None, queries: int, keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """(relative, bias) of the op."""
    if given is None:
        return None, bias
    if given.shape[0] == given.shape[2] == 1 and given.shape[3] == queries + keys - 1:
        return given[0, :, 0], bias
    return None, given if bias is None else bias + given


def _expanded(relative: Tensor | None, bias: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """relative as a bias of queries x keys, with the other one added."""
    if relative is None:
        return bias
    query = torch.arange(queries, device=relative.device)[:, None]
    key = torch.arange(keys, device=relative.device)
    full = relative[:, key - query + queries - 1][None]
    return full if bias is None else full + bias
