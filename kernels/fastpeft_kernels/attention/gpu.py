"""Checks that need a CUDA GPU: the Triton kernels within their budget, in every tile and with every kind of mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.device import device_capability, holds_huge_tensors
from ..common.gpu_verdicts import Verdicts
from .gradients import Gradients
from .problems import MASKS, SCORES, Problem, Shape, problem
from .tiles import Tiles, tiles_for

_DEVICE = torch.device("cuda")
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_CROSS = Shape(queries=190, keys=333)
_HEADS = ((128, 128), (64, 64), (256, 256), (96, 96), (80, 80), (192, 128), (32, 32), (72, 72), (112, 112), (16, 48))
_SIZES = (
    *(Shape(1, 1, 1, 1, 1, 1, 1), Shape(1, 1, 1, 1, 300, 64, 64), Shape(3, 5, 1, 257, 1, 64, 64)),
    *(Shape(2, 6, 3, 129, 127, 64, 64), Shape(1, 2, 2, 64, 128, 64, 64), Shape(2, 4, 4, 333, 190, 64, 64)),
)
_TOGETHER: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "as Gemma 2": (("window", "padding"), ("softcap",)),
    "as T5": (("padding",), ("relative", "dropout")),
    "as gpt-oss": (("window", "documents"), ("sinks",)),
    "documents and dropout": (("documents",), ("dropout",)),
    "all at once": (("both sides", "any intervals", "padding", "dense"), tuple(SCORES)),
}


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError. What is used most comes first."""
    capability = device_capability(_DEVICE)
    assert capability is not None
    for head in _HEADS[:3]:
        shape = Shape(features=head[0], v_features=head[1])
        for tiles in tiles_for(capability, _BF16, *head):
            yield (
                f"attention causal {head[0]} bf16 {tiles.label}",
                partial(_check, shape, _BF16, ("causal",), (), tiles),
            )
        for tiles in tiles_for(capability, _BF16, *head, added=1):
            for score in ("relative", "softcap", "bias"):
                name = f"attention {score} {head[0]} bf16 {tiles.label}"
                yield name, partial(_check, shape, _BF16, (), (score,), tiles)
    for name in MASKS:
        if name != "causal":
            yield f"attention mask {name}", partial(_check, Shape(), _BF16, (name,), ())
    for name in SCORES:
        if name != "plain":
            yield f"attention scores {name}", partial(_check, Shape(), _BF16, ("causal",), (name,))
    for name, (masks, scores) in _TOGETHER.items():
        yield f"attention {name}", partial(_check, _CROSS, _BF16, masks, scores)
    for head in _HEADS[3:]:
        shape = Shape(features=head[0], v_features=head[1])
        yield f"attention heads of {head[0]} and {head[1]}", partial(_check, shape, _BF16, ("causal",), ())
    for head in _HEADS[:3]:
        shape = Shape(features=head[0], v_features=head[1])
        yield f"attention causal {head[0]} fp16", partial(_check, shape, _FP16, ("causal",), ())
    yield "attention sizes", _check_sizes
    yield "attention causal 64 fp32", partial(_check, Shape(), _FP32, ("causal",), ())
    yield "attention 128, all at once, fp32", partial(_check, _wide(), _FP32, *_TOGETHER["all at once"])
    yield "attention strides", _check_strides
    yield "attention empty", _check_empty
    yield "attention documents that change in place", _check_changes
    yield "attention masks nothing but NaN", _check_hidden
    yield "attention with a negative scale", partial(_check, Shape(), _BF16, ("causal",), (), None, -0.2)
    if holds_huge_tensors():
        yield "attention, more than 2**31 elements", _check_many


def _wide() -> Shape:
    return _CROSS._replace(features=128, v_features=128)


def _check(
    shape: Shape,
    dtype: torch.dtype,
    masks: tuple[str, ...],
    scores: tuple[str, ...],
    tiles: Tiles | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    verdicts = Verdicts()
    _judge(problem(shape, dtype, _DEVICE, masks, scores, scale), f"{shape}", verdicts, tiles)
    return {"largest_share_of_budget": verdicts.settle()}


def _judge(it: Problem, what: str, verdicts: Verdicts, tiles: Tiles | None = None) -> None:
    """Output, lse and every gradient within budget, and the same bits twice."""
    out, lse, gradients = _ours(it, tiles)
    twice = _ours(it, tiles)
    same, exact = it.plain(), it.to(torch.float64).plain()
    verdicts.equal(out, twice[0], f"{what}: out is not the same twice")
    verdicts.within(out, same[0], exact[0], f"{what}: out")
    blind = exact[1] == -torch.inf
    verdicts.equal(lse == -torch.inf, blind, f"{what}: which rows see nothing")
    figures = [t.masked_fill(blind, 0.0) for t in (lse, same[1], exact[1])]
    verdicts.within(figures[0], figures[1], figures[2], f"{what}: lse")
    for name in Gradients._fields if it.q.dtype != _FP32 else ():  # refused for its gradients
        ours, again, theirs, oracle = (getattr(g, name) for g in (gradients, twice[2], same[2], exact[2]))
        if theirs is not None:
            verdicts.equal(ours, again, f"{what}: d{name} is not the same twice")
            if it.k.shape[2] == 1 and name in ("q", "k"):  # zero, but for what two sums of the same terms differ by
                assert float(ours.abs().max()) <= 1e-4, f"{what}: d{name} of one key"
                continue
            verdicts.within(ours, theirs, oracle, f"{what}: d{name}")


def _ours(it: Problem, tiles: Tiles | None = None) -> tuple[Tensor, Tensor, Gradients]:
    """By the kernels, in memory that was filled with NaN."""
    from .backward import attention_backward_triton
    from .forward import attention_triton

    filled = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # what fills uninitialised memory
    try:
        out, lse = attention_triton(it.q, it.k, it.v, it.mask, it.scores, tiles)
        tensors = it.dout, it.q, it.k, it.v, out, lse
        return out, lse, attention_backward_triton(*tensors, it.mask, it.scores, it.needs, True, tiles)
    finally:
        torch.use_deterministic_algorithms(filled[0], warn_only=filled[1])


def _check_sizes() -> dict[str, Any]:
    """Sizes are arguments: nothing is compiled anew but for a head of one feature."""
    verdicts = Verdicts()
    for shape in _SIZES:
        for mask in ("everything", "causal"):
            _judge(problem(shape, _BF16, _DEVICE, (mask,)), f"{shape} {mask}", verdicts)
    return {"largest_share_of_budget": verdicts.settle()}


def _check_strides() -> dict[str, Any]:
    """Any layout gives the very result of the usual one; but one without descriptors is read by other code."""
    it = problem(Shape(), _BF16, _DEVICE, ("causal",))
    verdicts = Verdicts()
    wanted = _ours(it)
    apart = [torch.stack([t, t], dim=-1)[..., 0] for t in (it.q, it.k, it.v, it.dout)]
    odd = [torch.nn.functional.pad(t, (3, 2))[..., 3:-2] for t in (it.q, it.k, it.v, it.dout)]
    turned = [t.contiguous() for t in (it.q, it.k, it.v, it.dout)]
    q, k, v, dout = odd
    _judge(Problem(q, k, v, it.mask, it.scores, dout), "odd", verdicts)
    for name, (q, k, v, dout) in {"apart": apart, "turned": turned}.items():
        out, lse, gradients = _ours(Problem(q, k, v, it.mask, it.scores, dout))
        for ours, want, of in zip((out, lse, *gradients[:3]), (*wanted[:2], *wanted[2][:3]), "olqkv", strict=True):
            assert ours is not None and want is not None
            verdicts.equal(ours, want, f"{name}: {of}")
    q, k, v = (t[:, :1].expand_as(t) for t in (it.q, it.k, it.v))
    _judge(Problem(q, k, v, it.mask, it.scores, it.dout[..., :1].expand_as(it.dout)), "expanded", verdicts)
    return {"largest_share_of_budget": verdicts.settle()}


def _check_empty() -> dict[str, Any]:
    for sizes in ({"batch": 0}, {"queries": 0}, {"keys": 0}):
        it = problem(Shape()._replace(**sizes), _BF16, _DEVICE, ("causal",), ("sinks",))
        out, lse, gradients = _ours(it)
        wanted = it.plain()
        assert torch.equal(out, wanted[0]), f"{sizes}: out"
        torch.testing.assert_close(lse, wanted[1], msg=f"{sizes}: lse")
        for name in ("q", "k", "v", "sinks"):
            ours, want = getattr(gradients, name), getattr(wanted[2], name)
            assert torch.equal(ours, want), f"{sizes}: d{name}"
    return {}


def _check_changes() -> dict[str, Any]:
    """What is remembered of a mask's intervals goes with the next write to them."""
    it, verdicts = problem(Shape(), _BF16, _DEVICE, ("documents",)), Verdicts()
    _judge(it, "documents", verdicts)
    assert it.mask.start is not None
    it.mask.start.zero_()
    _judge(it, "the first key of each is the first of all", verdicts)
    return {"largest_share_of_budget": verdicts.settle()}


def _check_hidden() -> dict[str, Any]:
    """Keys in blocks that nobody sees may hold anything."""
    it = problem(Shape(), _BF16, _DEVICE, ("causal",))
    clean = problem(Shape(keys=600, queries=300), _BF16, _DEVICE)
    k, v = clean.k.clone(), clean.v.clone()
    k[:, :, :200], v[:, :, :200] = torch.nan, torch.inf
    mask = type(it.mask)(left=30, right=0)
    out, _, gradients = _ours(Problem(clean.q, k, v, mask, it.scores, clean.dout))
    want, _, wanted = _ours(Problem(clean.q, clean.k, clean.v, mask, it.scores, clean.dout))
    assert torch.equal(out, want), "out"
    for name in ("q", "k", "v"):
        assert torch.equal(getattr(gradients, name), getattr(wanted, name)), f"d{name}"
    return {}


def _check_many() -> dict[str, Any]:
    """Many batch entries; each is what it is by itself."""
    shape = Shape(batch=2**31 // (256 * 16 * 64) + 2, heads=16, kv_heads=16, queries=256, keys=256)
    it = problem(shape, _BF16, _DEVICE, ("causal",))
    out, lse, gradients = _ours(it)
    verdicts = Verdicts()
    for entry in (0, 2**30 // (256 * 16 * 64), shape.batch - 1):
        part = slice(entry, entry + 1)
        alone = Problem(it.q[part], it.k[part], it.v[part], it.mask, it.scores, it.dout[part])
        own = _ours(alone)
        verdicts.equal(out[part], own[0], f"out of {entry}")
        verdicts.equal(lse[part], own[1], f"lse of {entry}")
        for name in ("q", "k", "v"):
            verdicts.equal(getattr(gradients, name)[part], getattr(own[2], name), f"d{name} of {entry}")
    verdicts.settle()
    return {"elements": it.q.numel()}
