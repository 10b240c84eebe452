"""Times on a CUDA GPU of what PyTorch's own attention cannot do without queries x keys, beside what can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..common.gpu_clock import median_us
from .api import attention
from .masks import Mask, dense_mask
from .problems import Problem, Shape, problem
from .ranges import packed

_DEVICE = torch.device("cuda")
_LLAMA = Shape(batch=4, heads=32, kv_heads=8, queries=4096, keys=4096, features=128, v_features=128)
_T5 = Shape(batch=4, heads=16, kv_heads=16, queries=2048, keys=2048, features=64, v_features=64)
_WINDOW, _SOFTCAP, _DOCUMENTS = 1024, 50.0, 8


@dataclass(frozen=True)
class _Case:
    """One way to attend: the problem, and how FlexAttention is told of it; None where it has no gradient for it."""

    make: Callable[[], Problem]
    flex_mask: Callable[[Problem], Callable[..., Tensor]] | None = None
    flex_score: Callable[..., Tensor] | None = None


def speed_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named measurements, bf16, in microseconds."""
    for name, case in _CASES.items():
        yield f"speed attention, {name}", partial(_measure, case)


def _measure(case: _Case) -> dict[str, Any]:
    it = case.make()
    leaves = {n: getattr(it, n).detach().requires_grad_() for n in ("q", "k", "v")}
    added = {n: t.detach().requires_grad_() for n in ("relative", "bias") if (t := getattr(it.scores, n)) is not None}
    settings: dict[str, Any] = {"scale": it.scores.scale, "softcap": it.scores.softcap, **added}
    ways: dict[str, Callable[[], Any]] = {
        "": lambda: attention(*leaves.values(), mask=it.mask, backend="triton", **settings)
    }
    if case.flex_mask is not None:
        ways["flex_"] = _flex(case, it, tuple(leaves.values()))
    if it.mask.keys is not None:
        ways["compact_"] = lambda: attention(*leaves.values(), mask=it.mask, backend="compact", **settings)
    if it.scores.softcap is None:
        ways["sdpa_"] = lambda: _sdpa(it, tuple(leaves.values()), added)
    figures: dict[str, Any] = {}
    inputs = [*leaves.values(), *added.values()]
    with torch.enable_grad():
        for way, run in ways.items():
            try:
                out = run()
                backward = partial(torch.autograd.grad, out, inputs, it.dout, retain_graph=True)
                figures |= {f"{way}forward_us": median_us(run), f"{way}backward_us": median_us(backward)}
            except (RuntimeError, torch.OutOfMemoryError) as error:
                figures[f"{way}left_out"] = f"{type(error).__name__}: {error}"[:200]
    print({key: value if isinstance(value, str) else round(value, 1) for key, value in figures.items()}, flush=True)
    return figures


def _sdpa(it: Problem, leaves: tuple[Tensor, ...], added: dict[str, Tensor]) -> Tensor:
    """With mask and bias as queries x keys, made in every call, as a model makes them."""
    queries, keys = it.q.shape[2], it.k.shape[2]
    bias = added.get("bias")
    if "relative" in added:
        place = torch.arange(keys, device=_DEVICE) - torch.arange(queries, device=_DEVICE)[:, None] + queries - 1
        bias = added["relative"][:, place][None]
    seen = dense_mask(it.mask, queries, keys, _DEVICE)
    given = seen if bias is None else bias if seen is None else bias.masked_fill(~seen, -torch.inf)
    if given is not None and given.dim() < 4:
        given = given.view((1,) * (4 - given.dim()) + given.shape)
    q, k, v = leaves
    return scaled_dot_product_attention(
        q, k, v, attn_mask=given, scale=it.scores.scale, enable_gqa=it.q.shape[1] != it.k.shape[1]
    )


def _flex(case: _Case, it: Problem, leaves: tuple[Tensor, ...]) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert case.flex_mask is not None
    sizes = (it.q.shape[0], None, it.q.shape[2], it.k.shape[2])
    blocks = create_block_mask(case.flex_mask(it), *sizes, device=_DEVICE)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    grouped = it.q.shape[1] != it.k.shape[1]
    settings = {"block_mask": blocks, "score_mod": case.flex_score, "scale": it.scores.scale, "enable_gqa": grouped}
    return lambda: compiled(*leaves, **settings)


def _with(shape: Shape, mask: Callable[[], Mask], scores: tuple[str, ...] = (), **changes: Any) -> Problem:
    it = problem(shape, torch.bfloat16, _DEVICE, (), scores)
    return replace(it, mask=mask(), scores=replace(it.scores, **changes) if changes else it.scores)


_LENGTHS = (4096, 3000, 2000, 1000)


def _padded() -> Mask:
    """Rows of such lengths, padded on the right, as models are given it: in the intervals of keys."""
    lengths = torch.tensor(_LENGTHS, device=_DEVICE)
    stop = torch.minimum(torch.arange(1, 4097, device=_DEVICE), lengths[:, None])
    return Mask(start=torch.zeros_like(stop, dtype=torch.int32), stop=stop.to(torch.int32))


def _padded_anywhere() -> Mask:
    """The same as a mark a key, which serves padding with holes."""
    lengths = torch.tensor(_LENGTHS, device=_DEVICE)
    return Mask(right=0, keys=torch.arange(4096, device=_DEVICE) < lengths[:, None])


def _documents() -> Mask:
    edges = torch.arange(_DOCUMENTS + 1, device=_DEVICE, dtype=torch.int32) * (4096 // _DOCUMENTS)
    return packed(edges, 4096)


_CASES: dict[str, _Case] = {
    "padding": _Case(
        lambda: _with(_LLAMA, _padded),
        lambda it: lambda b, h, i, j: j < it.mask.stop[b, i],  # type: ignore[index]
    ),
    "padding, a mark a key": _Case(lambda: _with(_LLAMA, _padded_anywhere)),
    "documents": _Case(
        lambda: _with(_LLAMA, _documents),
        lambda it: lambda b, h, i, j: (i >= j) & (i // (4096 // _DOCUMENTS) == j // (4096 // _DOCUMENTS)),
    ),
    "window": _Case(
        lambda: _with(_LLAMA, lambda: Mask(left=_WINDOW - 1, right=0)),
        lambda it: lambda b, h, i, j: (i >= j) & (i - j < _WINDOW),
    ),
    "softcap": _Case(
        lambda: _with(_LLAMA, lambda: Mask(right=0), softcap=_SOFTCAP),
        lambda it: lambda b, h, i, j: i >= j,
        lambda score, b, h, i, j: _SOFTCAP * torch.tanh(score / _SOFTCAP),
    ),
    "bias by distance": _Case(lambda: _with(_T5, Mask, ("relative",))),
    "trained bias": _Case(lambda: _with(_T5, Mask, ("bias",))),
}
