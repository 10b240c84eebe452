"""Attention on random numbers: one problem for each thing that a mask or the scores may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gradients import Gradients, Needs
from .masks import Mask
from .reference import attention_reference
from .scores import Scores


class Shape(NamedTuple):
    """Sizes of a problem."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    queries: int = 300
    keys: int = 300
    features: int = 64
    v_features: int = 64


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs, and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scores: Scores
    dout: Tensor

    @property
    def needs(self) -> Needs:
        added = (self.scores.relative, self.scores.bias, self.scores.sinks)
        return Needs(True, True, True, *(t is not None for t in added))

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype."""
        scores = self.scores
        added = {name: getattr(scores, name) for name in ("relative", "bias", "sinks")}
        scores = replace(scores, **{name: None if t is None else t.to(dtype) for name, t in added.items()})
        return Problem(*(t.to(dtype) for t in (self.q, self.k, self.v)), self.mask, scores, self.dout.to(dtype))

    def plain(self) -> tuple[Tensor, Tensor, Gradients]:
        """Output, lse and gradients by `attention_reference` and autograd."""
        scores = self.scores
        inputs = {"q": self.q, "k": self.k, "v": self.v}
        inputs |= {"relative": scores.relative, "bias": scores.bias, "sinks": scores.sinks}  # type: ignore[dict-item]
        leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items() if t is not None}
        added = {name: leaves[name] for name in ("relative", "bias", "sinks") if name in leaves}
        with torch.enable_grad():
            out, lse = attention_reference(
                leaves["q"], leaves["k"], leaves["v"], self.mask, replace(scores, **added)  # type: ignore[arg-type]
            )
            gradients = torch.autograd.grad(out, list(leaves.values()), self.dout)
        return out.detach(), lse.detach(), Gradients(**dict(zip(leaves, gradients, strict=True)))


Maker = Callable[[Shape, torch.device], dict[str, Any]]


def _documents(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Each of about a third; the same cuts in queries and keys, from which causality is counted from the end."""
    cuts = [0, shape.keys // 3, shape.keys * 2 // 3 - 1, shape.keys]
    place = torch.arange(shape.queries, device=device) * shape.keys // max(shape.queries, 1)
    document = torch.bucketize(place, torch.tensor(cuts[1:], device=device), right=True)
    edges = torch.tensor(cuts, dtype=torch.int32, device=device)
    return {"start": edges[document][None], "stop": edges[document + 1][None]}


def _intervals(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Anything: empty ones, ones that move backward, bounds outside the keys."""
    size = (shape.batch, shape.queries)
    ends = [torch.randint(-9, shape.keys + 9, size, dtype=torch.int32, device=device) for _ in range(2)]
    return {"start": ends[0], "stop": ends[1]}


def _padding(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Keys here and there; where there are several batch entries the last has none at all."""
    keys = torch.rand((shape.batch, shape.keys), device=device) > 0.3
    if shape.batch > 1:
        keys[-1] = False
    return {"keys": keys, "right": 0}


def _bias(*kinds: str) -> Maker:
    """One for each of those kinds. Where that is none of the keys, sinks beside it: else it changes nothing."""

    def make(shape: Shape, device: torch.device) -> dict[str, Any]:
        sizes = [getattr(shape, kind) if kind in kinds else 1 for kind in ("batch", "heads", "queries", "keys")]
        while sizes[0] == 1 and len(sizes) > 1:
            del sizes[0]
        made = {"bias": torch.randn(sizes, device=device)}
        return made if "keys" in kinds else {**made, "sinks": torch.randn(shape.heads, device=device)}

    return make


MASKS: dict[str, Maker] = {
    "everything": lambda shape, device: {},
    "causal": lambda shape, device: {"right": 0},
    "window": lambda shape, device: {"left": shape.keys // 4, "right": 0},
    "both sides": lambda shape, device: {"left": shape.keys // 5, "right": shape.keys // 7},
    "far from the diagonal": lambda shape, device: {"left": -(shape.keys // 4), "right": shape.keys},
    "documents": lambda shape, device: {**_documents(shape, device), "right": 0},
    "any intervals": _intervals,
    "padding": _padding,
    "dense": lambda shape, device: {
        "dense": torch.rand((shape.batch, 1, shape.queries, shape.keys), device=device) > 0.5
    },
}
SCORES: dict[str, Maker] = {
    "plain": lambda shape, device: {},
    "softcap": lambda shape, device: {"softcap": 2.0},
    "relative": lambda shape, device: {"relative": torch.randn(shape.heads, shape.queries + shape.keys - 1, device=device)},
    "bias of heads": _bias("heads"),
    "bias of queries": _bias("heads", "queries"),
    "bias of keys": _bias("batch", "keys"),
    "bias": _bias("heads", "queries", "keys"),
    "sinks": lambda shape, device: {"sinks": torch.randn(shape.heads, device=device)},
    "dropout": lambda shape, device: {"dropout": 0.2, "seed": torch.tensor([-(2**61) + 7], device=device)},
}


def problem(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    masks: tuple[str, ...] = (),
    scores: tuple[str, ...] = (),
    scale: float | None = None,
) -> Problem:
    """A problem with those parts of MASKS and SCORES; its tensors are laid out (batch, tokens, heads, features)."""

    def tensor(heads: int, tokens: int, features: int) -> Tensor:
        return torch.randn((shape.batch, tokens, heads, features), device=device).to(dtype).transpose(1, 2)

    q = tensor(shape.heads, shape.queries, shape.features)
    k = tensor(shape.kv_heads, shape.keys, shape.features)
    v = tensor(shape.kv_heads, shape.keys, shape.v_features)
    dout = tensor(shape.heads, shape.queries, shape.v_features)
    seen = {key: value for name in masks for key, value in MASKS[name](shape, device).items()}
    added = {key: value for name in scores for key, value in SCORES[name](shape, device).items()}
    added = {key: t.to(dtype) if key in ("relative", "bias", "sinks") else t for key, t in added.items()}
    scale = shape.features**-0.5 if scale is None else scale
    return Problem(q, k, v, Mask(**seen), Scores(scale, **added), dout)
