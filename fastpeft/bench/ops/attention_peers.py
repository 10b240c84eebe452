"""Who computes attention: fastpeft, transformers' eager code, and each of PyTorch's and others' kernels by its name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..left_out import NotHereError
from .attention_kinds import Kind, boundaries
from .case import Forward, Inputs, Peer
from .making import package
from .peers import compiled

_MOST_SCORES = {torch.float64: 2**28}  # elements of the scores that are in memory at once
_MANY = 2**31


def _scores_to_values(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, added: Tensor | None, softcap: float | None
) -> Tensor:
    """As transformers' `eager_attention_forward` for Llama and Gemma 2, with the softmax in fp32 at least."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if added is not None:
        scores = scores + added
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    weights = F.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return weights @ v


def eager(inputs: Inputs) -> Forward:
    """The definition; over 2^31 scores (2^28 in fp64) by blocks of queries, each computed again in backward."""
    kind, q = _kind(inputs), inputs.tensors["q"]
    seen, tokens = _dense(inputs), q.shape[2]
    blocks = -(-q.shape[0] * q.shape[1] * tokens**2 // _MOST_SCORES.get(q.dtype, _MANY))

    def forward() -> Sequence[Tensor]:
        _, k, v = (inputs.tensors[name] for name in "qkv")
        added = _added(inputs)
        if blocks == 1:
            return (_scores_to_values(q, k, v, seen, added, kind.softcap),)
        rows = -(-tokens // blocks)
        parts = []
        for i in range(0, tokens, rows):
            some = None if seen is None else seen[..., i : i + rows, :] if seen.shape[-2] > 1 else seen
            more = None if added is None else added[..., i : i + rows, :]
            part = q[:, :, i : i + rows]
            parts.append(checkpoint(_scores_to_values, part, k, v, some, more, kind.softcap, use_reentrant=False))
        return (torch.cat(parts, 2),)

    return forward


def _fastpeft(inputs: Inputs) -> Forward:
    from fastpeft_kernels.attention import attention

    return lambda: (attention(**inputs.tensors, mask=inputs.extra["mask"], softcap=_kind(inputs).softcap),)  # type: ignore[arg-type, return-value]


def _sdpa(backend: str, inputs: Inputs) -> Forward:
    """PyTorch's `scaled_dot_product_attention` by one kernel alone, with a mask as a matrix where it needs one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind, (q, k, v) = _kind(inputs), (inputs.tensors[name] for name in "qkv")
    if not q.is_cuda and backend != "FLASH_ATTENTION":
        raise NotHereError("needs a GPU")
    if kind.softcap is not None:
        raise NotHereError("knows no soft cap")
    causal = kind.plain and kind.right == 0
    seen = None if causal else _dense(inputs)
    grouped = q.shape[1] != k.shape[1]
    expand = q.shape[1] // k.shape[1] if grouped and backend == "EFFICIENT_ATTENTION" else 1  # which knows no groups

    def forward() -> Sequence[Tensor]:
        keys, values = (k.repeat_interleave(expand, 1), v.repeat_interleave(expand, 1)) if expand > 1 else (k, v)
        mask = _added(inputs) if kind.added else seen
        with sdpa_kernel(getattr(SDPBackend, backend)):
            options: dict[str, Any] = {"attn_mask": mask, "is_causal": causal, "enable_gqa": grouped and expand == 1}
            return (F.scaled_dot_product_attention(q, keys, values, **options),)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            forward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            said = (str(warning.message).partition(" (Triggered")[0] for warning in caught)
            why = [line for line in said if not line.endswith("because:") and "disabled" not in line]
            raise NotHereError("; ".join(why) or str(error)) from error
    return forward


def _flex(inputs: Inputs) -> Forward:
    """FlexAttention, compiled; its block mask is made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    kind, mask, (q, k, v) = _kind(inputs), inputs.extra["mask"], (inputs.tensors[name] for name in "qkv")
    if not q.is_cuda:
        raise NotHereError("needs a GPU")
    tokens, added = q.shape[2], inputs.tensors.get(kind.added or "")

    keys = kind.seen(q.shape[0], tokens, str(q.device)) if kind.padded else None

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found = j >= 0
        if kind.left is not None:
            found = found & (j >= i - kind.left)
        if kind.right is not None:
            found = found & (j <= i + kind.right)
        if kind.documents:
            found = found & (j >= mask.start[0, i]) & (j < mask.stop[0, i])
        return found if keys is None else found & keys[b, j]

    def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if kind.softcap is not None:
            value = kind.softcap * torch.tanh(value / kind.softcap)
        if kind.added == "relative":
            value = value + added[h, j - i + tokens - 1]  # type: ignore[index]
        return value + added[0, h, i, j] if kind.added == "bias" else value  # type: ignore[index]

    blocks = None
    if kind.right is not None or kind.padded:
        batch = q.shape[0] if kind.padded else None
        make = torch.compile(create_block_mask, dynamic=False)  # else it makes all of queries x keys
        blocks = make(seen, batch, None, tokens, tokens, device=str(q.device))
    run = torch.compile(flex_attention, dynamic=False)
    changed = score if kind.softcap is not None or kind.added else None
    grouped = q.shape[1] != k.shape[1]
    return lambda: (run(q, k, v, score_mod=changed, block_mask=blocks, enable_gqa=grouped),)


def _flash(inputs: Inputs) -> Forward:
    """The flash-attn package's functions, which take (batch, tokens, heads, head_dim)."""
    kind, q = _kind(inputs), inputs.tensors["q"]
    library = package("flash_attn", inputs)
    if kind.padded or kind.added:
        raise NotHereError("knows no mask of keys" if kind.padded else "knows no bias")
    bound = tuple(-1 if x is None else x for x in (kind.left, kind.right))
    options: dict[str, Any] = {"causal": kind.right == 0, "window_size": bound, "softcap": kind.softcap or 0.0}
    rows = [inputs.tensors[name].transpose(1, 2) for name in "qkv"]
    if not kind.documents:
        return lambda: (library.flash_attn_func(*rows, **options).transpose(1, 2),)
    if q.shape[0] != 1:
        raise NotHereError("one row of documents alone is measured")
    edges = torch.tensor(boundaries(q.shape[2]), device=q.device, dtype=torch.int32)
    for side in "qk":
        options |= {f"cu_seqlens_{side}": edges, f"max_seqlen_{side}": int(edges.diff().max())}
    return lambda: (library.flash_attn_varlen_func(*(x[0] for x in rows), **options)[None].transpose(1, 2),)


def _kind(inputs: Inputs) -> Kind:
    return inputs.extra["kind"]  # type: ignore[no-any-return]


def _dense(inputs: Inputs) -> Tensor | None:
    """The mask as bool, broadcastable to (batch, heads, queries, keys)."""
    from fastpeft_kernels.attention.masks import dense_mask

    q = inputs.tensors["q"]
    seen = dense_mask(inputs.extra["mask"], q.shape[2], q.shape[2], q.device)
    return None if seen is None else seen[(None,) * (4 - seen.dim())]


def _added(inputs: Inputs) -> Tensor | None:
    """What is added to the scores, as a matrix of queries x keys."""
    relative = inputs.tensors.get("relative")
    if relative is None:
        return inputs.tensors.get("bias")
    tokens = inputs.tensors["q"].shape[2]
    place = torch.arange(tokens, device=relative.device)
    return relative[:, place - place[:, None] + tokens - 1][None]


PEERS: dict[str, Peer] = {
    "fastpeft": _fastpeft,
    "torch.compile": compiled(eager),
    "sdpa flash": partial(_sdpa, "FLASH_ATTENTION"),
    "sdpa efficient": partial(_sdpa, "EFFICIENT_ATTENTION"),
    "sdpa cudnn": partial(_sdpa, "CUDNN_ATTENTION"),
    "flex": _flex,
    "flash-attn": _flash,
}
