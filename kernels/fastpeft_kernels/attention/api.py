"""The public function."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..common.device import autocast_dtype, autocast_off
from ..common.random import draw_seed
from ..common.tracing import as_op
from ..common.validation import check_instance
from . import autograd, custom_op
from .candidates import registry
from .candidates.request import NotServedError, Request
from .choosing import backend_of, triton_refusal
from .library import attention_dense, attention_sdpa, sdpa_as_it_lies, sdpa_refusal
from .masks import Mask, bounded
from .reference import attention_reference
from .scores import Scores
from .validation import check_mask, check_qkv, check_scores

BACKENDS = ("auto", "triton", "sdpa", "blockwise", "reference", *registry.CANDIDATES)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    relative: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q kT) v with all that models do to it, in memory linear in the number of tokens.

    Equivalent PyTorch: `reference.attention_reference`. Products and sums are in fp32 at least. Under autocast q, k and
    v are cast to its dtype first.

    Args:
        q: (batch, heads, queries, features) in fp64, fp32, bf16 or fp16, any strides.
        k, v: (batch, kv_heads, keys, features) and (..., v_features); heads is a multiple of kv_heads.
        mask: which keys each query sees; all by default.
        scale: 1 / sqrt(features) by default.
        softcap, relative, bias, sinks, dropout, seed: see `Scores`; a seed is drawn where dropout needs one.
        return_lse: also give the logarithm of the sum of the exponentials, without a gradient.
        deterministic: the same bits in every backward; may be slower.
        backend: "triton", our kernels on a GPU; "sdpa", `torch.nn.functional.scaled_dot_product_attention`;
            "blockwise", PyTorch's operations on one block after the other; "reference", all scores in memory at once;
            "cudnn", "flash" and "efficient", one kernel of sdpa's by itself; "flex", FlexAttention; "compact", ours
            over the keys that padding leaves, put together; "fa2", "fa3" and "fa4", the packages flash-attn,
            flash-attn-3 and flash-attn-4; each serves or raises. "auto": what `fastpeft tune` found to be fastest,
            where that is exact for the call; else sdpa where it is exact, but on a CPU without products in 16 bits not
            for gradients in them; else triton on a GPU that it serves; else blockwise; for few numbers on a CPU the
            reference, and where of few scores some are dropped sdpa with all of them in memory.

    Returns:
        (batch, heads, queries, v_features), laid out so that `.transpose(1, 2)` is contiguous; with `return_lse` also
        (batch, heads, queries) in fp32, or fp64. Gradients flow to q, k, v, relative, bias and sinks, once: a second
        derivative is an error but with "reference". A query that sees no key gives zeros and passes no gradient on.

    Raises:
        TypeError, ValueError: an argument is not as above; the backend that was asked for cannot serve the call.

    Source: FlashAttention-2, Dao 2023, arXiv:2307.08691.
    """
    check_qkv(q, k, v)
    if mask is None:
        mask = Mask()
    else:
        check_mask(mask, q, k)
    check_instance("backend", backend, str)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = Scores(scale, softcap, relative, bias, sinks, dropout, seed)
    check_scores(scores, q, k)
    mask = bounded(mask, q.shape[2], k.shape[2])
    cast = autocast_dtype(q.device)
    if cast is not None and q.dtype != torch.float64:
        q, k, v = q.to(cast), k.to(cast), v.to(cast)
    with autocast_off(q.device):
        out, lse = _compute(q, k, v, mask, scores, return_lse, deterministic, backend)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse.detach()


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor | None:
    """`attention` of valid arguments of one dtype and nothing else, where PyTorch's own is what it takes; else None.

    For callers to whom its looking at arguments matters: it takes the host as long as the attention of a few tokens.

    Returns:
        (batch, queries, heads, v_features), contiguous, or None.
    """
    mask = Mask(right=0 if causal else None)
    scores = Scores(q.shape[3] ** -0.5 if scale is None else scale, dropout=dropout)
    deterministic = torch.are_deterministic_algorithms_enabled()
    if backend_of(q, k, v, mask, scores, False, deterministic) != "sdpa":
        return None
    return sdpa_as_it_lies(q, k, v, mask, scores).transpose(1, 2).contiguous()


def _compute(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores, with_lse: bool, deterministic: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    asked = backend != "auto"
    if not asked:
        backend = backend_of(q, k, v, mask, scores, with_lse, deterministic)
    elif reason := _refusal(backend, q, k, v, mask, scores, with_lse, deterministic):
        raise ValueError(f"backend: {backend!r} was asked for, which cannot serve: {reason}")
    if backend in registry.CANDIDATES:
        try:
            return registry.CANDIDATES[backend].run(Request(q, k, v, mask, scores, with_lse, deterministic)), None
        except NotServedError:
            if asked:
                raise
            return _compute(q, k, v, mask, scores, with_lse, deterministic, "auto")  # it refuses this case by now
    if backend == "dense":
        return attention_dense(q, k, v, mask, scores), None
    if backend == "sdpa":
        return attention_sdpa(q, k, v, mask, scores), None
    if scores.dropout > 0.0 and scores.seed is None:
        scores = replace(scores, seed=draw_seed(q.device))
    if backend == "reference":
        out, lse = attention_reference(q, k, v, mask, scores)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse
    apply = custom_op.apply if as_op() else autograd.apply
    return apply(q, k, v, mask, scores, backend, deterministic)


def _refusal(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scores: Scores,
    with_lse: bool,
    deterministic: bool,
) -> str | None:
    if backend == "sdpa":
        if with_lse:
            return "expected return_lse=False, got True"
        return sdpa_refusal(q, k, v, mask, scores, deterministic)
    if backend in registry.CANDIDATES:
        return registry.refusal(backend, Request(q, k, v, mask, scores, with_lse, deterministic))
    if backend == "triton" and not as_op():
        return triton_refusal(q, k, v, mask, scores)
    return None
