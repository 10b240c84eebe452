"""Checks that need a CUDA GPU: `linear_cross_entropy` as a whole, on Triton's steps and the library's products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_verdicts import Verdicts
from ..lora.gpu_support import worse
from ..quant import encode_4bit
from ..weights import DenseWeight, FourBitWeight
from .api import LinearLoss, linear_cross_entropy
from .head import Head, Options
from .reference import entropy_reference, logits_reference, mean_reference, token_losses_reference

_DEVICE = torch.device("cuda")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
_SIZES = (4500, 256, 20011)  # tokens, features, words: blocks and chunks, the last of each in part
_IGNORED = 7  # every so manieth label
_NAMES = ("hidden", "weight", "bias", "s", "b")


@dataclass(frozen=True, eq=False)
class Case:
    """Tensors by name, those that are trained among them; `packed` in place of a weight."""

    tensors: dict[str, Tensor]
    labels: Tensor
    trained: tuple[str, ...]
    packed: FourBitWeight | None
    map: dict[str, Any]
    options: dict[str, Any]

    def head(self) -> Head:
        get = self.tensors.get
        weight = self.tensors["weight"]
        frozen = DenseWeight(weight) if self.packed is None else self.packed
        return Head(weight if "weight" in self.trained else frozen, get("bias"), get("s"), get("b"), **self.map)

    def to(self, dtype: torch.dtype) -> Case:
        """As leaves in another dtype, the weight dense."""
        tensors = {
            name: x.detach().to(dtype, copy=True).requires_grad_(name in self.trained)
            for name, x in self.tensors.items()
        }
        return replace(self, tensors=tensors, packed=None)


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    everything = {"scale": 0.7, "softcap": 20.0}
    variants: dict[str, dict[str, Any]] = {
        "frozen": {},
        "frozen, mapped": {"bias": True, "map": everything, "options": {"z_loss": 1e-3}},
        "low rank": {"rank": 16},
        "quantised": {"packed": True},
        "quantised, low rank, mapped": {"packed": True, "rank": 16, "map": everything},
        "smoothed": {"options": {"label_smoothing": 0.1}},
        "trained": {"trained": ("hidden", "weight")},
        "trained, all": {"trained": _NAMES, "rank": 16, "bias": True, "map": everything},
        "few tokens": {"tokens": 5},
    }
    for name, variant in variants.items():
        yield f"linear cross-entropy {name} bf16", partial(_check, BF16, **variant)
    for dtype in (F16, F32):
        for name in ("frozen, mapped", "trained, all"):
            kind = str(dtype).removeprefix("torch.")
            yield f"linear cross-entropy {name} {kind}", partial(_check, dtype, tokens=1100, **variants[name])
    for dtype in (BF16, F16, F32):
        for tokens in (_SIZES[0], 200):  # logits of as many as there are features are kept, and of all
            name = f"linear cross-entropy summed, {tokens} tokens, trained, all {str(dtype).removeprefix('torch.')}"
            yield name, partial(_check_summed, dtype, **{**variants["trained, all"], "tokens": tokens})
    yield "linear cross-entropy, ignored labels of NaN states", _check_ignored


def make(
    dtype: torch.dtype,
    tokens: int = _SIZES[0],
    rank: int = 0,
    bias: bool = False,
    packed: bool = False,
    trained: tuple[str, ...] = ("hidden",),
    map: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> Case:
    _, features, words = _SIZES

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, device=_DEVICE)

    weight = (2.0 * rand(words, features) / features**0.5).to(dtype)
    quantised = FourBitWeight(encode_4bit(weight)) if packed else None
    tensors = {
        "hidden": rand(tokens, features),
        "weight": weight if quantised is None else quantised.decode(dtype=dtype),
    }
    if bias:
        tensors["bias"] = rand(words)
    if rank:
        tensors |= {"s": rand(tokens, rank), "b": rand(words, rank) / rank**0.5}
        trained = tuple({*trained, "s"})
    tensors = {name: x.to(dtype).requires_grad_(name in trained) for name, x in tensors.items()}
    labels = torch.randint(0, words, (tokens,), device=_DEVICE)
    case = Case(tensors, labels, trained, quantised, map or {}, options or {})
    with torch.no_grad():  # every third label is a hit
        labels[::3] = logits_reference(tensors["hidden"], case.head()).argmax(-1)[::3]
    labels[1::_IGNORED] = -100
    return case


def _check(dtype: torch.dtype, **variant: Any) -> dict[str, Any]:
    verdicts = Verdicts()
    case = make(dtype, **variant)
    upstream = torch.rand(len(case.labels), device=_DEVICE) + 0.5
    ours, ours_gradients = _derived(case, upstream, _fused(case))
    twice, gradients_twice = _derived(case, upstream, _fused(case))
    same_case, exact_case = case.to(dtype), case.to(F64)
    same, same_gradients = _derived(same_case, upstream, _defined(same_case))
    on_cpu = same_gradients
    if dtype == F32:  # how cuBLAS splits a sum depends on the shape, and with it its error
        on_cpu = {name: x.to(_DEVICE) for name, x in _gradients_on_cpu(same_case, upstream).items()}
    exact, exact_gradients = _derived(exact_case, upstream, _defined(exact_case))
    for name in ("loss", "log_probs", "entropy", "mean_logits"):
        mine, theirs, wanted = (getattr(x, name).detach() for x in (ours, same, exact))
        verdicts.within(mine, theirs, wanted, name)
        verdicts.equal(mine, getattr(twice, name), f"{name}: not the same twice")
    with torch.no_grad():
        verdicts.equal(_fused(case).loss, ours.loss.detach(), "loss: not the same without gradients")
    for name, gradient in ours_gradients.items():
        theirs = worse(same_gradients[name], on_cpu[name], exact_gradients[name])
        verdicts.within(gradient, theirs, exact_gradients[name], f"gradient of {name}")
        verdicts.equal(gradient, gradients_twice[name], f"gradient of {name}: not the same twice")
    hits, hits_of_torch, true_hits = (x.correct for x in (ours, same, exact))
    assert hits is not None and hits_of_torch is not None and true_hits is not None
    differing, allowed = int((hits != true_hits).sum()), 2 * int((hits_of_torch != true_hits).sum()) + 5
    assert differing <= allowed, f"correct: {differing} tokens differ, {allowed} may"
    return {"largest_share_of_budget": verdicts.settle()}


def on_cpu(case: Case) -> Case:
    """The same numbers there, the weight dense."""
    tensors = {name: x.detach().cpu().requires_grad_(x.requires_grad) for name, x in case.tensors.items()}
    return replace(case, tensors=tensors, labels=case.labels.cpu(), packed=None)


def _gradients_on_cpu(case: Case, upstream: Tensor) -> dict[str, Tensor]:
    moved = on_cpu(case)
    return _derived(moved, upstream.cpu(), _defined(moved))[1]


def _fused(case: Case) -> LinearLoss:
    wanted: dict[str, Any] = {"log_probs": True, "entropy": True, "correct": True, "mean_logits": True, **case.options}
    return linear_cross_entropy(case.tensors["hidden"], case.head(), case.labels, reduction="none", **wanted)


def _defined(case: Case) -> LinearLoss:
    """Of all logits at once."""
    labels, counted = case.labels, case.labels != -100
    logits = logits_reference(case.tensors["hidden"], case.head())
    losses = token_losses_reference(logits, labels, Options(**case.options))
    entropy = torch.where(counted, entropy_reference(logits.detach()), 0.0)
    correct = (logits.argmax(-1) == labels) & counted
    mean = torch.where(counted, mean_reference(logits.detach()), 0.0)
    return LinearLoss(losses, -token_losses_reference(logits, labels), entropy, correct, mean)


def _derived(case: Case, upstream: Tensor, found: LinearLoss) -> tuple[LinearLoss, dict[str, Tensor]]:
    """The gradients of the losses and, with another factor, of the log-probabilities."""
    names = [name for name in _NAMES if name in case.trained and name in case.tensors]
    given = upstream.to(found.loss.dtype)
    leaves = [case.tensors[name] for name in names]
    assert found.log_probs is not None
    gradients = torch.autograd.grad([found.loss, found.log_probs], leaves, [given, -0.3 * given])
    return found, dict(zip(names, gradients, strict=True))


def _check_summed(dtype: torch.dtype, **variant: Any) -> dict[str, Any]:
    """Gradients where the loss is one number, and the same where the graph is kept."""
    verdicts, case = Verdicts(), make(dtype, **variant)
    wanted = {"reduction": "sum", **case.options}
    loss = linear_cross_entropy(case.tensors["hidden"], case.head(), case.labels, **wanted).loss
    kept, ours = _gradients(case, loss, True), _gradients(case, loss, False)
    same, exact = (_gradients(other, _defined(other).loss.sum(), False) for other in (case.to(dtype), case.to(F64)))
    if dtype == F32:
        moved = on_cpu(case)
        for name, x in _gradients(moved, _defined(moved).loss.sum(), False).items():
            same[name] = worse(same[name], x.to(_DEVICE), exact[name])
    for name, gradient in ours.items():
        verdicts.within(gradient, same[name], exact[name], f"gradient of {name}")
        verdicts.equal(kept[name], gradient, f"gradient of {name}: not the same where the graph is kept")
    return {"largest_share_of_budget": verdicts.settle()}


def _gradients(case: Case, loss: Tensor, retain_graph: bool) -> dict[str, Tensor]:
    names = [name for name in _NAMES if name in case.trained and name in case.tensors]
    leaves = [case.tensors[name] for name in names]
    return dict(zip(names, torch.autograd.grad(loss, leaves, retain_graph=retain_graph), strict=True))


def _check_ignored() -> dict[str, Any]:
    """Their loss and gradient are zero, whatever their hidden states are."""
    case = make(BF16, tokens=64)
    ignored = case.labels == -100
    hidden = case.tensors["hidden"].detach().clone()
    hidden[ignored] = torch.nan
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, case.head(), case.labels, reduction="none").loss
    (gradient,) = torch.autograd.grad(loss.sum(), hidden)
    assert not loss[ignored].any() and not gradient[ignored].any()
    assert loss[~ignored].isfinite().all() and gradient[~ignored].isfinite().all()
    return {}
