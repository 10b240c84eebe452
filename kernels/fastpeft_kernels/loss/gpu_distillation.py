"""Checks that need a CUDA GPU: `linear_distillation` as a whole, on Triton's kernels and the library's products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_verdicts import Verdicts
from ..lora.gpu_support import worse
from ..weights import DenseWeight
from .distillation import LinearDistillation, linear_distillation
from .distillation_reference import distillation_reference, top_logits_reference
from .gpu_linear import Case, make, on_cpu
from .head import Head, Teacher, TopLogits
from .reference import logits_reference

_DEVICE = torch.device("cuda")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
_TOKENS, _TEACHER_SIZE, _TOP = 1100, 384, 50
_WAYS: dict[str, dict[str, float]] = {
    "forward": {"temperature": 2.0},
    "reverse": {"beta": 1.0},
    "mixed": {"beta": 0.4, "temperature": 0.8},
    "mixed with labels": {"beta": 0.5, "divergence_weight": 0.7, "cross_entropy_weight": 0.6, "temperature": 1.5},
    "labels alone": {"divergence_weight": 0.0, "cross_entropy_weight": 1.0},
}
_MAPPED: dict[str, Any] = {"bias": True, "rank": 16, "map": {"scale": 0.7, "softcap": 20.0}}
_ALL = ("hidden", "weight", "bias", "s", "b")


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    for name, ways in _WAYS.items():
        yield f"distillation {name} bf16", partial(_check, BF16, ways)
    labels = _WAYS["mixed with labels"]
    yield "distillation, all trained, mapped bf16", partial(_check, BF16, labels, trained=_ALL, **_MAPPED)
    yield "distillation, quantised, mapped bf16", partial(_check, BF16, labels, packed=True, rank=16)
    yield "distillation from the largest logits bf16", partial(_check, BF16, _WAYS["mixed"], top=True)
    for dtype in (F16, F32):
        kind = str(dtype).removeprefix("torch.")
        yield f"distillation, mapped {kind}", partial(_check, dtype, labels, **_MAPPED)
        yield f"distillation, all trained {kind}", partial(_check, dtype, _WAYS["reverse"], trained=_ALL, bias=True)
    yield (
        "distillation from the largest logits, trained fp32",
        partial(_check, F32, _WAYS["forward"], top=True, trained=("hidden", "weight")),
    )
    yield "distillation, tokens of NaN that do not count", _check_ignored
    yield "distillation, compiled", _check_compiled


def _check(dtype: torch.dtype, ways: dict[str, float], *, top: bool = False, **variant: Any) -> dict[str, Any]:
    verdicts, torch_numbers = Verdicts(), {}
    case = make(dtype, tokens=_TOKENS, **variant)
    teacher = _teacher(case, dtype, top)
    upstream = torch.rand(_TOKENS, device=_DEVICE) + 0.5
    ours, twice = (_derived(case, upstream, _fused(case, teacher, ways)) for _ in range(2))
    for name, other in (("same", dtype), ("exact", F64)):
        again = case.to(other)
        torch_numbers[name] = _derived(again, upstream, _defined(again, _cast(teacher, other), ways))
    if dtype == F32:  # how cuBLAS splits a sum depends on the shape, and with it its error
        moved = on_cpu(case)
        found = _derived(moved, upstream.cpu(), _defined(moved, _cast(teacher, F32, "cpu"), ways))
        for name, value in found.items():
            same, exact = torch_numbers["same"][name], torch_numbers["exact"][name]
            torch_numbers["same"][name] = worse(same, value.to(_DEVICE), exact)
    for name, value in ours.items():
        verdicts.within(value, torch_numbers["same"][name], torch_numbers["exact"][name], name)
        verdicts.equal(twice[name], value, f"{name}: not the same twice")
    return {"largest_share_of_budget": verdicts.settle()}


def _teacher(case: Case, dtype: torch.dtype, top: bool) -> Teacher | TopLogits:
    words = case.head().words
    if top:
        order = torch.rand((_TOKENS, words), device=_DEVICE).topk(_TOP, dim=-1).indices
        return TopLogits((3.0 * torch.randn((_TOKENS, _TOP), device=_DEVICE)).to(dtype), order)
    hidden = torch.randn((_TOKENS, _TEACHER_SIZE), device=_DEVICE).to(dtype)
    weight = (2.0 * torch.randn((words, _TEACHER_SIZE), device=_DEVICE) / _TEACHER_SIZE**0.5).to(dtype)
    return Teacher(hidden, Head(weight, softcap=15.0))


def _cast(
    teacher: Teacher | TopLogits, dtype: torch.dtype, device: torch.device | str = _DEVICE
) -> Teacher | TopLogits:
    if isinstance(teacher, TopLogits):
        return TopLogits(teacher.logits.to(device, dtype), teacher.words.to(device))
    assert isinstance(teacher.head.weight, Tensor)
    weight = teacher.head.weight.to(device, dtype)
    return Teacher(teacher.hidden.to(device, dtype), Head(weight, softcap=teacher.head.softcap))


def _fused(case: Case, teacher: Teacher | TopLogits, ways: dict[str, float]) -> LinearDistillation:
    hidden, labels = case.tensors["hidden"], case.labels
    return linear_distillation(hidden, case.head(), teacher, labels=labels, reduction="none", **ways)  # type: ignore[arg-type]


def _defined(case: Case, teacher: Teacher | TopLogits, ways: dict[str, float]) -> LinearDistillation:
    """Of all logits at once."""
    student = logits_reference(case.tensors["hidden"], case.head())
    if isinstance(teacher, TopLogits):
        given = top_logits_reference(teacher.logits, teacher.words, student.shape[1])
    else:
        given = logits_reference(teacher.hidden, teacher.head)
    losses, divergence, nll = distillation_reference(student, given, case.labels, **ways)
    return LinearDistillation(losses, divergence, nll if "cross_entropy_weight" in ways else None)


def _derived(case: Case, upstream: Tensor, found: LinearDistillation) -> dict[str, Tensor]:
    """Values and gradients by name."""
    wanted = {name: case.tensors[name] for name in _ALL if name in case.trained and name in case.tensors}
    gradients = torch.autograd.grad(found.loss, list(wanted.values()), upstream.to(found.loss.dtype))
    values = {name: x.detach() for name, x in found._asdict().items() if x is not None}
    return values | {f"gradient of {name}": x for name, x in zip(wanted, gradients, strict=True)}


def _check_ignored() -> dict[str, Any]:
    """Their loss and gradient are zero, whatever their hidden states are, the teacher's too."""
    case, ways = make(BF16, tokens=_TOKENS), _WAYS["mixed with labels"]
    teacher, ignored = _teacher(case, BF16, False), case.labels == -100
    assert isinstance(teacher, Teacher)
    hidden = case.tensors["hidden"].detach().clone()
    hidden[ignored], teacher.hidden[ignored] = torch.nan, torch.inf
    case.tensors["hidden"] = hidden.requires_grad_()
    loss = _fused(case, teacher, ways).loss
    (gradient,) = torch.autograd.grad(loss.sum(), hidden)
    assert not loss[ignored].any() and not gradient[ignored].any()
    assert loss[~ignored].isfinite().all() and gradient[~ignored].isfinite().all()
    return {}


def _check_compiled() -> dict[str, Any]:
    """In one graph, where all tokens are computed: the same bits where all count."""
    case, ways = make(BF16, tokens=_TOKENS), _WAYS["mixed with labels"]
    teacher, hidden = _teacher(case, BF16, False), case.tensors["hidden"]
    assert isinstance(teacher, Teacher) and isinstance(teacher.head.weight, Tensor)
    teacher = Teacher(teacher.hidden, Head(DenseWeight(teacher.head.weight), softcap=15.0))
    head, labels = case.head(), case.labels.clamp(min=0)

    def loss(x: Tensor) -> Tensor:
        return linear_distillation(x, head, teacher, labels=labels, **ways).loss  # type: ignore[arg-type]

    verdicts, found = Verdicts(), []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(hidden)
        found.append((value.detach(), *torch.autograd.grad(value, hidden)))
    for eager, compiled in zip(*found, strict=True):
        verdicts.equal(compiled, eager, "compiled")
    verdicts.settle()
    return {}
