"""Attention on random numbers, held to the error of the definition in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels.attention.masks import Mask
from fastpeft_kernels.attention.reference import attention_reference
from fastpeft_kernels.attention.scores import Scores
from tests.budget import assert_within_budget

TRAINED = ("relative", "bias", "sinks")


@dataclass
class Case:
    """What attention is called with; q, k, v and what is trained of the scores require gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scores: Scores

    def inputs(self) -> dict[str, Tensor]:
        found = {"q": self.q, "k": self.k, "v": self.v}
        return found | {name: x for name in TRAINED if (x := getattr(self.scores, name)) is not None}

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype, as leaves."""
        leaves = {name: x.detach().to(dtype, copy=True).requires_grad_() for name, x in self.inputs().items()}
        q, k, v = (leaves.pop(name) for name in ("q", "k", "v"))
        return Case(q, k, v, self.mask, replace(self.scores, **leaves))

    def arguments(self) -> dict[str, Any]:
        """Of `attention`, but for q, k and v."""
        names = ("scale", "softcap", *TRAINED, "dropout", "seed")
        return {"mask": self.mask, **{name: getattr(self.scores, name) for name in names}}

    def plain(self, dtype: torch.dtype, dout: Tensor) -> dict[str, Tensor]:
        """What the definition gives in a dtype: out, lse and the gradients."""
        case = self.to(dtype)
        out, lse = attention_reference(case.q, case.k, case.v, case.mask, case.scores)
        return {"out": out, "lse": lse} | gradients(out, dout.to(dtype), case.inputs())


def gradients(out: Tensor, dout: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), dout), strict=True))


def hold(case: Case, attention: Callable[[Case], tuple[Tensor, Tensor | None]]) -> None:
    """Fails unless out, lse and all gradients are within the budget."""
    out, lse = attention(case)
    dout = torch.randn_like(out)
    ours = {"out": out, "lse": lse} | gradients(out, dout, case.inputs())
    same, exact = case.plain(case.q.dtype, dout), case.plain(torch.float64, dout)
    for name, value in ours.items():
        if value is not None:
            assert_within_budget(value, same[name], exact[name], f"{name} of {case.mask}, {case.arguments().keys()}")


def assert_same(case: Case, attention: Callable[[Case], tuple[Tensor, Tensor | None]]) -> None:
    """Fails unless out, lse and all gradients are the definition's to fp64's last digits."""
    out, lse = attention(case)
    dout = torch.randn_like(out)
    ours = {"out": out, "lse": lse} | gradients(out, dout, case.inputs())
    want = case.plain(torch.float64, dout)
    for name, value in ours.items():
        if value is not None:
            torch.testing.assert_close(
                value, want[name], rtol=1e-10, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}"
            )


def make_case(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 19,
    keys: int = 23,
    features: int = 16,
    v_features: int | None = None,
    dtype: torch.dtype = torch.float32,
    mask: Mask | None = None,
    extras: Sequence[str] = (),
) -> Case:
    """q, k and v as projections give them: (batch, tokens, heads, features), transposed.

    Args:
        extras: of "softcap", "relative", "bias", "sinks", "dropout".
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    tensors = {
        "relative": lambda: draw(heads, queries + keys - 1),
        "bias": lambda: draw(heads, 1, keys),
        "sinks": lambda: draw(heads),
    }
    scores = Scores(
        scale=features**-0.5,
        softcap=1.5 if "softcap" in extras else None,
        dropout=0.3 if "dropout" in extras else 0.0,
        seed=torch.tensor([2**40 + 12345]) if "dropout" in extras else None,
        **{name: make().requires_grad_() for name, make in tensors.items() if name in extras},
    )
    q, k, v = (
        draw(batch, tokens, count, size).transpose(1, 2).requires_grad_()
        for tokens, count, size in (
            (queries, heads, features),
            (keys, kv_heads, features),
            (keys, kv_heads, v_features or features),
        )
    )
    return Case(q, k, v, mask or Mask(), scores)


def every_mask(batch: int, heads: int, queries: int, keys: int) -> dict[str, Mask]:
    """One mask of each kind; some of their rows see nothing."""
    start = torch.randint(0, keys, (batch, queries), dtype=torch.int32)
    ordered = torch.randint(0, keys, (1, queries), dtype=torch.int32).sort(1).values
    real = torch.arange(keys)[None] < torch.randint(0, keys + 1, (batch, 1))
    return {
        "all": Mask(),
        "causal": Mask(right=0),
        "window": Mask(left=3, right=0),
        "band": Mask(left=1, right=2),
        "ranges": Mask(start=start, stop=start + torch.randint(-1, 6, (batch, queries), dtype=torch.int32)),
        "ordered": Mask(start=ordered, stop=ordered + 4, right=0),
        "padding": Mask(keys=real),
        "padding_left": Mask(right=0, keys=real.flip(1)),
        "holes": Mask(right=1, keys=torch.rand(1, keys) > 0.4),
        "dense": Mask(dense=torch.rand(heads, queries, keys) > 0.5),
        "everything": Mask(left=9, right=3, start=start, stop=start + 7, keys=real, dense=torch.rand(queries, 1) > 0.2),
    }
