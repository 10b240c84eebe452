"""Checks that need a CUDA GPU: the Triton kernels within their budgets, in every configuration, on any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..common.device import holds_huge_tensors
from ..common.gpu_verdicts import Verdicts
from . import gpu_distillation, gpu_linear, gpu_logits, steps
from .steps import Running

_DEVICE = torch.device("cuda")
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
_SHAPES = ((64, 8208), (37, 1003), (25, 130), (50, 67))  # several blocks, the last in part; odd; one block; part of one
_EXTRAS = {"tilted": True, "best": True, "total": True}
_QUICK = ((BF16, False, True), (BF16, True, False), (F32, True, True), (F16, False, False))


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    from .tiles import CONFIGS

    yield "loss steps, each kernel once", partial(_check_steps, CONFIGS[0], ((BF16, False, True),), _SHAPES[:1])
    yield "loss rescale", _check_rescale
    yield "loss steps, infinities, NaN and large values", _check_extremes
    yield from gpu_linear.checks()
    yield from gpu_distillation.checks()
    yield from gpu_logits.checks()
    for dtype in (BF16, F32, F16):
        every = tuple(product((dtype,), (True, False), (True, False)))
        yield f"loss steps {str(dtype).removeprefix('torch.')}", partial(_check_steps, CONFIGS[0], every, _SHAPES)
    for config in CONFIGS[1:]:
        yield f"loss steps {config}", partial(_check_steps, config, _QUICK, _SHAPES[:2])
    if holds_huge_tensors():
        yield from gpu_logits.huge_checks()


def _check_steps(
    config: Any, combinations: tuple[tuple[torch.dtype, bool, bool], ...], shapes: tuple[tuple[int, int], ...]
) -> dict[str, Any]:
    verdicts = Verdicts()
    for (dtype, mapped, write), shape in product(combinations, shapes):
        what = f"{dtype} {mapped=} {write=} {shape} {config}"
        raw, labels, given = _draw(dtype, mapped, shape)
        _statistics(verdicts, config, raw, labels, given, write, what)
        _gradients(verdicts, config, raw, labels, given, what)
    return {"largest_share_of_budget": verdicts.settle()}


def _draw(dtype: torch.dtype, mapped: bool, shape: tuple[int, int]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Products, labels (one of no word), and the map onto logits, all or nothing of it."""
    tokens, words = shape
    raw = (3.0 * torch.randn(shape, device=_DEVICE)).to(dtype)
    labels = torch.randint(0, words, (tokens,), device=_DEVICE)
    labels[1] = -100
    bias = torch.randn(words, device=_DEVICE).to(dtype)
    given = {"bias": bias, "scale": 0.7, "softcap": 5.0, "class_weight": torch.rand(words, device=_DEVICE)}
    return raw, labels, given if mapped else {}


def _walk(
    module: Any, raw: Tensor, labels: Tensor, given: dict[str, Any], write: bool, **others: Any
) -> tuple[Running, Tensor]:
    """The statistics after two chunks, the second wider than the first; and what the steps have left in raw."""
    words = raw.shape[1]
    first = words // 3 // 16 * 16
    running = Running.start(len(raw), torch.promote_types(raw.dtype, F32), raw.device, **_EXTRAS)
    left = raw.clone()
    for begin, end in ((0, first), (first, words)):
        if begin < end:
            own = _of_words(given, begin, end, raw.dtype)
            module.online_step(left[:, begin:end], begin, labels, running, **own, write=write, **others)
            if begin and write:  # what was written before belongs to an earlier reference point
                left[:, :begin] = (left[:, :begin].to(running.factor.dtype) * running.factor[:, None]).to(left.dtype)
    return running, left


def _of_words(given: dict[str, Any], first: int, last: int, dtype: torch.dtype) -> dict[str, Any]:
    own = {name: x[first:last] if isinstance(x, Tensor) else x for name, x in given.items()}
    return {name: x.double() if dtype == F64 and isinstance(x, Tensor) else x for name, x in own.items()}


def _statistics(
    verdicts: Verdicts, config: Any, raw: Tensor, labels: Tensor, given: dict[str, Any], write: bool, what: str
) -> None:
    from . import triton_steps

    ours, left = _walk(triton_steps, raw, labels, given, write, config=config)
    again, left_again = _walk(triton_steps, raw, labels, given, write, config=config)
    same, same_left = _walk(steps, raw, labels, given, write)
    exact, exact_left = _walk(steps, raw.double(), labels, given, write)
    verdicts.equal(left, left_again, f"not the same twice, {what}")
    verdicts.equal(ours.others, again.others, f"others are not the same twice, {what}")
    assert ours.best is not None and exact.best is not None
    verdicts.equal(ours.best, exact.best, f"best, {what}")
    results = [_known(running) for running in (ours, same, exact)]
    for name in results[0]:
        mine, theirs, true = (result[name] for result in results)
        verdicts.within(mine, theirs, true, f"{name}, {what}")
    if write:
        verdicts.within(left, same_left, exact_left, f"written, {what}")
    else:
        verdicts.equal(left, raw, f"wrote into raw, {what}")


def _known(running: Running) -> dict[str, Tensor]:
    """What is made of the statistics; of the token without a label nothing that a label belongs to."""
    known, entropy = steps.known(running), steps.entropy(running)
    assert running.total is not None
    nll = known.nll[torch.arange(len(entropy), device=_DEVICE) != 1]
    return {"nll": nll, "lse": known.lse, "entropy": entropy, "total": running.total}


def _gradients(verdicts: Verdicts, config: Any, raw: Tensor, labels: Tensor, given: dict[str, Any], what: str) -> None:
    from . import triton_steps

    known = steps.known(_walk(steps, raw.double(), labels, given, False)[0])
    upstream = [torch.randn(len(raw), device=_DEVICE, dtype=F64) for _ in range(3)]
    for row in upstream:
        row[2] = 0.0
    for wanted in ((True, True, True), (True, False, False)):
        chosen = [d if flag else None for d, flag in zip(upstream, wanted, strict=True)]
        rows: list[Any] = [known.top, known.inverse, known.others, *chosen]
        narrow: list[Any] = [None if row is None else row.float() for row in rows]
        ours, same, exact = raw.clone(), raw.clone(), raw.double()
        triton_steps.gradient_step(ours, 0, labels, *narrow, **given, config=config)
        steps.gradient_step(same, 0, labels, *narrow, **given)
        steps.gradient_step(exact, 0, labels, *rows, **_of_words(given, 0, raw.shape[1], F64))
        verdicts.within(ours, same, exact, f"gradient of {wanted}, {what}")
        apart = torch.full_like(raw, torch.nan)
        before = raw.clone()
        triton_steps.gradient_step(raw, 0, labels, *narrow, **given, out=apart, config=config)
        verdicts.equal(apart, ours, f"gradient elsewhere, {what}")
        verdicts.equal(raw, before, f"wrote into raw, {what}")


def _check_rescale() -> dict[str, Any]:
    from .triton_steps import rescale

    verdicts = Verdicts()
    for columns in (4096, 1003, 1):
        acc = torch.randn((70, columns + 5), device=_DEVICE)
        factor = torch.where(torch.arange(70, device=_DEVICE) % 3 == 0, 1.0, torch.rand(70, device=_DEVICE))
        wanted = acc.clone()
        wanted[:, :columns] *= factor[:, None]
        rescale(acc[:, :columns], factor)
        verdicts.equal(acc, wanted, f"{columns} columns")
    verdicts.settle()
    return {}


def _check_extremes() -> dict[str, Any]:
    """Masked words, a whole row of them, huge logits, a confident label; NaN and inf spoil their own rows alone."""
    from . import triton_steps

    words = 9000
    for write in (True, False):
        raw = torch.randn((7, words), device=_DEVICE) * 3
        raw[0, ::2] = -torch.inf
        raw[1] = -torch.inf
        raw[2] *= 1e4
        raw[3, 300] = 60.0
        raw[4, 7] = torch.nan
        raw[5, words - 1] = torch.inf
        raw[6] += torch.arange(words, device=_DEVICE) * 0.1  # the reference point moves with every block
        labels = torch.tensor([1, 4, 5, 300, 9, 3, words - 9], device=_DEVICE)
        ours, left = _walk(triton_steps, raw, labels, {}, write)
        same, theirs = _walk(steps, raw, labels, {}, write)
        sound = [0, 2, 3, 6]
        for name in ("nll", "lse", "others"):
            x, y = (getattr(steps.known(running), name) for running in (ours, same))
            both = f"{name} {write=}: {x.tolist()}, {y.tolist()}"
            assert torch.allclose(x[sound], y[sound], rtol=2e-5, atol=0.0), both
            assert not x[4].isfinite() and not x[5].isfinite(), both
        assert 0 < steps.known(ours).nll[3] < 1e-15
        torch.testing.assert_close(steps.entropy(ours)[sound], steps.entropy(same)[sound], rtol=2e-5, atol=1e-5)
        if write:
            torch.testing.assert_close(left[[1, *sound]], theirs[[1, *sound]], rtol=2e-5, atol=1e-30)
    return {}
