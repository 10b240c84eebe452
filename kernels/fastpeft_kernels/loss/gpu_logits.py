"""Checks that need a CUDA GPU: losses of given logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_verdicts import Verdicts
from .cross_entropy import cross_entropy
from .divergence import kl_divergence
from .divergence_reference import divergence_reference
from .head import Options
from .reference import token_losses_reference

_DEVICE = torch.device("cuda")
_DTYPES = (torch.bfloat16, torch.float32, torch.float16)
_SHAPES = ((40, 32064), (33, 5003), (50, 67))
_BETAS = (0.0, 0.3, 1.0)
_MANY = 2**31


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    from .tiles import CONFIGS

    for dtype in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        yield f"cross-entropy of logits {name}", partial(_check_cross_entropy, dtype)
        for beta in _BETAS:
            yield f"divergence {beta} {name}", partial(_check_divergence, CONFIGS[0], beta, dtype, _SHAPES)
    yield "divergences, infinities, NaN and large values", _check_extremes
    yield "losses of logits, compiled", _check_compiled
    for config in CONFIGS[1:]:
        yield f"divergences {config}", partial(_check_configuration, config)


def huge_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Those that need tens of GB."""
    yield "cross-entropy of more than 2**31 logits", _check_many_logits
    yield "divergence of more than 2**31 logits", _check_many_pairs


def _check_cross_entropy(dtype: torch.dtype) -> dict[str, Any]:
    verdicts = Verdicts()
    for shape, smoothing, z_loss, weighted in product(_SHAPES, (0.0, 0.1), (0.0, 1e-3), (False, True)):
        logits = (3.0 * torch.randn(shape, device=_DEVICE)).to(dtype)
        labels = torch.randint(0, shape[1], shape[:1], device=_DEVICE)
        labels[1] = -100
        weight = torch.rand(shape[1], device=_DEVICE) if weighted else None
        upstream = torch.rand(shape[0], device=_DEVICE) + 0.5
        named: dict[str, Any] = {
            "label_smoothing": smoothing,
            "z_loss": z_loss,
            "class_weight": weight,
            "reduction": "none",
        }
        before = logits.clone()
        fused = partial(cross_entropy, labels=labels, **named, backend="triton")
        ours, twice = (_derived(fused, logits, upstream) for _ in range(2))
        options = Options(label_smoothing=smoothing, z_loss=z_loss)
        plain = partial(_plain, labels, options, weight)
        same, exact = _derived(plain, logits, upstream), _derived(plain, logits.double(), upstream)
        what = f"{shape} {dtype} {smoothing=} {z_loss=} {weighted=}"
        for each in range(2):
            verdicts.within(ours[each], same[each], exact[each], f"{('losses', 'gradient')[each]}, {what}")
            verdicts.equal(ours[each], twice[each], f"not the same twice, {what}")
        verdicts.equal(logits, before, f"wrote into the logits, {what}")
        assert not ours[1][1].any(), f"gradient of an ignored label, {what}"
    return {"largest_share_of_budget": verdicts.settle()}


def _plain(labels: Tensor, options: Options, weight: Tensor | None, x: Tensor) -> Tensor:
    return token_losses_reference(x, labels, options, weight)


def _derived(function: Callable[[Tensor], Tensor], logits: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    values = function(leaf)
    return values.detach(), torch.autograd.grad(values, leaf, upstream.to(values.dtype))[0]


def _check_divergence(
    config: Any, beta: float, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...]
) -> dict[str, Any]:
    verdicts = Verdicts()
    for shape, temperature in product(shapes, (1.0, 2.5)):
        what = f"{shape} {dtype} {temperature=} {beta=} {config}"
        student, teacher = ((2.0 * torch.randn(shape, device=_DEVICE)).to(dtype) for _ in range(2))
        upstream = torch.rand(shape[0], device=_DEVICE) + 0.5
        plain = partial(_divergence, teacher, temperature, beta)
        ours = _ours(config, student, teacher, temperature, beta, upstream)
        twice = _ours(config, student, teacher, temperature, beta, upstream)
        same, exact = _derived(plain, student, upstream), _derived(plain, student.double(), upstream)
        for each in range(2):
            verdicts.within(ours[each], same[each], exact[each], f"{('values', 'gradient')[each]}, {what}")
            verdicts.equal(ours[each], twice[each], f"not the same twice, {what}")
    return {"largest_share_of_budget": verdicts.settle()}


def _divergence(teacher: Tensor, temperature: float, beta: float, student: Tensor) -> Tensor:
    return divergence_reference(student, teacher.to(student.dtype), temperature, beta)


def _ours(
    config: Any, student: Tensor, teacher: Tensor, temperature: float, beta: float, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Into memory filled with NaN."""
    from .divergence_triton import divergence_backward_triton, divergence_triton

    values, kept = (torch.full((*n, len(student)), torch.nan, device=_DEVICE) for n in ((), (5,)))
    gradient = torch.full_like(student, torch.nan)
    divergence_triton(student, teacher, None, temperature, beta, values, kept, config)
    divergence_backward_triton(upstream, student, teacher, kept, temperature, beta, gradient, config)
    return values, gradient


def _check_configuration(config: Any) -> dict[str, Any]:
    shares = [
        _check_divergence(config, beta, torch.bfloat16, _SHAPES[:2])["largest_share_of_budget"] for beta in _BETAS
    ]
    return {"largest_share_of_budget": max(shares)}


def _check_extremes() -> dict[str, Any]:
    """Words that both mask; a row of NaN, counted and not; logits far from zero; equal distributions."""
    for beta in _BETAS:
        student, teacher = (2.0 * torch.randn((5, 9001), device=_DEVICE) for _ in range(2))
        student[0, ::2] = teacher[0, ::2] = -torch.inf
        student[1], student[4, 8000] = torch.nan, torch.nan
        student[2] += 3e3
        teacher[3] = student[3] - 7.0
        mask = torch.tensor([True, False, True, True, True], device=_DEVICE)
        results = []
        for backend in ("triton", "torch"):
            leaf = student.clone().requires_grad_()
            values = kl_divergence(leaf, teacher, beta=beta, mask=mask, reduction="none", backend=backend)
            results.append((values.detach(), torch.autograd.grad(values.sum(), leaf)[0]))
        sound = [0, 1, 2, 3]
        for ours, theirs in zip(*results, strict=True):
            apart = (ours[sound] - theirs[sound]).abs().max()
            assert torch.allclose(ours[sound], theirs[sound], rtol=1e-4, atol=2e-6), f"{beta}: up to {apart} apart"
            assert ours[4].isnan().any(), f"{beta}: {ours[4]}"
    one, labels = torch.randn((5, 1), device=_DEVICE), torch.zeros(5, dtype=torch.int64, device=_DEVICE)
    assert cross_entropy(one, labels).abs() < 1e-6, "one word"
    return {}


def _check_compiled() -> dict[str, Any]:
    """One graph each, and the same numbers."""
    logits, teacher = (torch.randn((6, 1003), device=_DEVICE) for _ in range(2))
    labels, upstream = torch.randint(0, 1003, (6,), device=_DEVICE), torch.rand(6, device=_DEVICE)

    def both(x: Tensor) -> Tensor:
        loss = cross_entropy(x, labels, reduction="none", label_smoothing=0.1)
        return loss + kl_divergence(x, teacher, 2.0, beta=0.3, reduction="none")

    traced = _derived(torch.compile(both, fullgraph=True), logits, upstream)
    torch.testing.assert_close(traced, _derived(both, logits, upstream))
    return {}


def _check_many_logits() -> dict[str, Any]:
    words = 131080
    rows = _MANY // words + 70
    logits = torch.randn((rows, words), dtype=torch.bfloat16, device=_DEVICE).requires_grad_()
    labels = torch.randint(0, words, (rows,), device=_DEVICE)
    losses = cross_entropy(logits, labels, reduction="none", backend="triton")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    for part in _parts(rows, words):
        leaf = logits[part].detach().clone().requires_grad_()
        wanted = cross_entropy(leaf, labels[part], reduction="none", backend="triton")
        assert torch.equal(losses[part], wanted), f"losses, rows {part}"
        assert torch.equal(gradient[part], torch.autograd.grad(wanted.sum(), leaf)[0]), f"gradient, rows {part}"
    return {"elements": rows * words}


def _check_many_pairs() -> dict[str, Any]:
    words = 131080
    rows = _MANY // words + 70
    student = torch.randn((rows, words), dtype=torch.bfloat16, device=_DEVICE).requires_grad_()
    teacher = torch.randn((rows, words), dtype=torch.bfloat16, device=_DEVICE)
    values = kl_divergence(student, teacher, beta=0.5, reduction="none", backend="triton")
    (gradient,) = torch.autograd.grad(values.sum(), student)
    for part in _parts(rows, words):
        leaf = student[part].detach().clone().requires_grad_()
        wanted = kl_divergence(leaf, teacher[part], beta=0.5, reduction="none", backend="triton")
        assert torch.equal(values[part], wanted), f"values, rows {part}"
        assert torch.equal(gradient[part], torch.autograd.grad(wanted.sum(), leaf)[0]), f"gradient, rows {part}"
    return {"elements": rows * words}


def _parts(rows: int, words: int) -> list[slice]:
    """The first rows, those around element 2**31, the last."""
    middle = _MANY // words
    return [slice(0, 8), slice(middle - 8, middle + 8), slice(rows - 8, rows)]
