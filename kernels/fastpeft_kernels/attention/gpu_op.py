"""Checks that need a CUDA GPU: attention as it is called, by every implementation, without a wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ..common.gpu_clock import median_us
from ..common.gpu_verdicts import Verdicts
from . import ranges
from .api import attention
from .choosing import own_backend, triton_refusal
from .masks import Mask
from .problems import MASKS, SCORES, Problem, Shape, problem
from .scores import Scores

_DEVICE = torch.device("cuda")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PLAIN = Shape(queries=300, keys=300)
_TRAINED = ("relative", "bias", "sinks")


Cases = list[tuple[Shape, tuple[str, ...], tuple[str, ...]]]


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    for name, dtype in _DTYPES.items():
        yield f"attention in blocks, {name}", partial(_check_blockwise, dtype)
    for name, dtype in _DTYPES.items():
        if dtype != torch.float32:  # in which the order of PyTorch's sums is as good as its eager one's by chance alone
            yield f"attention by PyTorch's own, {name}", partial(_check_sdpa, dtype)
            yield f"attention as chosen, {name}", partial(_check_chosen, dtype)
    yield "attention waits for nothing", _check_no_wait
    yield "attention in a CUDA graph", _check_graph
    yield "attention compiled", _check_compiled
    yield "attention checkpointed with dropout", _check_checkpointing
    yield "attention's memory", _check_memory


def speed_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named measurements, in microseconds."""
    yield "speed attention of one query", _measure_one_query
    for tokens in (2048, 8192):
        yield (
            f"speed attention causal {tokens}",
            partial(_measure, tokens, Mask(right=0), ("sdpa", "auto", "blockwise")),
        )
    window = Mask(left=1023, right=0)
    yield "speed attention window of 1024 in 8192", partial(_measure, 8192, window, ("auto", "blockwise"))


def _check_blockwise(dtype: torch.dtype) -> dict[str, Any]:
    # More than one block of queries and keys, of which the second is seen in part
    cases: Cases = [(_PLAIN, (mask,), ()) for mask in MASKS] + [(_PLAIN, ("causal",), (kind,)) for kind in SCORES]
    large = Shape(1, 4, 2, 1100, 1300, 64, 48)
    cases += [(large, ("both sides", "padding"), ("softcap", "sinks", "relative", "dropout")), (large, ("causal",), ())]
    return check_cases(cases, dtype, "blockwise")


def _check_sdpa(dtype: torch.dtype) -> dict[str, Any]:
    shapes = [_PLAIN._replace(features=size, v_features=size, kv_heads=4) for size in (64, 128, 80)]
    shapes.append(_PLAIN._replace(queries=1, kv_heads=4))
    cases: Cases = [(shape, (mask,), ()) for shape in shapes for mask in ("everything", "causal")]
    cases += [(shape, ("keys",), ()) for shape in shapes]
    cases += [(_PLAIN, ("causal",), ()), (_PLAIN._replace(queries=1), ("keys",), ())]
    return check_cases(cases, dtype, "sdpa")


def _check_chosen(dtype: torch.dtype) -> dict[str, Any]:
    cases: Cases = [(_PLAIN, (mask,), ()) for mask in MASKS]
    cases += [(_PLAIN, ("causal",), (kind,)) for kind in SCORES]
    figures = check_cases(cases, dtype, "auto")
    it = problem_of(_PLAIN, dtype, ("causal",), ("softcap",))
    args = (it.q, it.k, it.v, it.mask, it.scores)
    return {**figures, "ours": own_backend(*args), "triton_refusal": triton_refusal(*args)}


def problem_of(shape: Shape, dtype: torch.dtype, masks: tuple[str, ...], scores: tuple[str, ...]) -> Problem:
    """`problems.problem`; "keys" is padding without causality, and the last of the batch has nothing to see."""
    if masks != ("keys",):
        return problem(shape, dtype, _DEVICE, masks, scores)
    it = problem(shape, dtype, _DEVICE, ("padding",), scores)
    return replace(it, mask=Mask(keys=it.mask.keys))


def check_cases(cases: Cases, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """Output and every gradient of a backend within budget."""
    verdicts = Verdicts()
    for shape, masks, scores in cases:
        it = problem_of(shape, dtype, masks, scores)
        what = f"{shape} {masks} {scores}"
        out, ours = _run(it, backend)
        assert out.transpose(1, 2).is_contiguous(), what
        same, _, same_gradients = it.plain()
        exact, _, exact_gradients = it.to(torch.float64).plain()
        verdicts.within(out, same, exact, f"out, {what}")
        for name, value in ours.items():
            theirs, wide = getattr(same_gradients, name), getattr(exact_gradients, name)
            verdicts.within(value, theirs, wide, f"gradient of {name}, {what}")
    return {"largest_share_of_budget": verdicts.settle()}


def _run(it: Problem, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The result, and the gradients of all inputs by name."""
    given = {name: getattr(it.scores, name) for name in _TRAINED}
    inputs = {"q": it.q, "k": it.k, "v": it.v, **{name: x for name, x in given.items() if x is not None}}
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = _call(leaves, it.mask, it.scores, backend)
    return out.detach(), dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), it.dout), strict=True))


def _call(leaves: dict[str, Tensor], mask: Mask, scores: Scores, backend: str) -> Tensor:
    settings: dict[str, Any] = {name: getattr(scores, name) for name in ("scale", "softcap", "dropout", "seed")}
    q, k, v, *_ = leaves.values()
    added: dict[str, Any] = {name: leaves.get(name) for name in _TRAINED}
    out = attention(q, k, v, mask=mask, **added, **settings, backend=backend)
    assert isinstance(out, Tensor)
    return out


@contextmanager
def no_wait() -> Iterator[None]:
    """Within it a wait for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _check_no_wait() -> dict[str, Any]:
    cu_seqlens = torch.tensor([0, 100, 100, 290], dtype=torch.int32, device=_DEVICE)
    position_ids = (torch.arange(300, device=_DEVICE) % 70)[None]
    length = torch.tensor([5, 90], device=_DEVICE)
    plain = problem(_PLAIN, torch.bfloat16, _DEVICE)
    made = problem(_PLAIN, torch.bfloat16, _DEVICE, ("padding",), ("softcap", "sinks", "dropout"))
    for backend in ("auto", "blockwise"):
        for it in (plain, made):
            _run(it, backend)  # what is compiled, or measured of the device, at first
    with no_wait():
        masks = [
            ranges.packed(cu_seqlens, 300, window=(50, None)),
            ranges.packed_by_position(position_ids),
            ranges.packed_by_index(position_ids // 50),
            ranges.chunked(64, 300, 300, first=length),
            ranges.prefix(length, 300, 300),
            ranges.padding(position_ids > 3),
        ]
        for backend in ("auto", "blockwise"):
            _run(made, backend)
            for mask in (Mask(), Mask(right=0), *masks):
                _run(replace(plain, mask=mask), backend)
    return {}


def _check_graph() -> dict[str, Any]:
    it = problem(_PLAIN, torch.bfloat16, _DEVICE, ("documents",), ("softcap", "dropout"))
    _run(it, "auto")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _run(it, "auto")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, gradients = _run(it, "auto")
    for tensor in (it.q, it.k, it.v, it.dout):
        tensor.copy_(torch.randn_like(tensor))
    assert it.scores.seed is not None
    it.scores.seed.add_(17)
    graph.replay()
    want, wanted = _run(it, "auto")
    verdicts = Verdicts()
    for name, ours, theirs in [("out", out, want), *((name, gradients[name], wanted[name]) for name in wanted)]:
        verdicts.equal(ours, theirs, f"{name}: a replay gives others than a call")
    verdicts.settle()
    return {}


def _check_compiled() -> dict[str, Any]:
    it = problem(_PLAIN, torch.bfloat16, _DEVICE, ("window",), ("softcap", "sinks", "dropout"))
    leaves = [x.detach().requires_grad_() for x in (it.q, it.k, it.v, it.scores.sinks) if x is not None]

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return _call({"q": q, "k": k, "v": v, "sinks": sinks}, it.mask, it.scores, "auto")

    want = call(*leaves)
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    verdicts = Verdicts()
    verdicts.equal(out.detach(), want.detach(), "out, compiled")
    found, wanted = (torch.autograd.grad(y, leaves, it.dout) for y in (out, want))
    for name, ours, theirs in zip(("q", "k", "v", "sinks"), found, wanted, strict=True):
        verdicts.equal(ours, theirs, f"gradient of {name}, compiled")
    verdicts.settle()
    return {}


def _check_checkpointing() -> dict[str, Any]:
    it = problem(_PLAIN, torch.bfloat16, _DEVICE, ("causal",))
    leaves = [x.detach().requires_grad_() for x in (it.q, it.k, it.v)]

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v, mask=it.mask, dropout=0.3)
        assert isinstance(out, Tensor)
        return out

    verdicts = Verdicts()
    for reentrant in (True, False):
        results = []
        for call in (block, partial(checkpoint, block, use_reentrant=reentrant)):
            torch.cuda.manual_seed(7)
            out = call(*leaves)
            for leaf in leaves:
                leaf.grad = None
            out.backward(it.dout)
            results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
        for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
            verdicts.equal(ours, theirs, f"result {i}, {reentrant=}: recomputed with other random numbers")
    verdicts.settle()
    return {}


def _check_memory() -> dict[str, Any]:
    figures = {}
    for backend in ("auto", "blockwise"):
        for tokens in (8192, 16384):
            shape = Shape(1, 8, 8, tokens, tokens, 64, 64)
            it = problem(shape, torch.bfloat16, _DEVICE, ("causal",), ("softcap",))
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _run(it, backend)
            figures[f"{backend}_{tokens}_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        # 8 heads of scores in bf16 would be 4.3 GB
        assert figures[f"{backend}_16384_mb"] < 1500, figures
    return figures


def _measure_one_query() -> dict[str, Any]:
    it = problem(Shape(8, 32, 8, 1, 2048, 128, 128), torch.bfloat16, _DEVICE)
    mask = Mask(right=0)
    with torch.no_grad():
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda: attention(it.q, it.k, it.v, mask=mask),
            "sdpa": lambda: scaled_dot_product_attention(it.q, it.k, it.v, enable_gqa=True),
        }
        device = {f"{name}_us": median_us(call) for name, call in calls.items()}
        return {**device, **{f"{name}_host_us": _host_us(call) for name, call in calls.items()}}


def _host_us(call: Callable[[], object]) -> float:
    """Until the call returns."""
    torch.cuda.synchronize()
    begin = perf_counter()
    for _ in range(200):
        call()
    found = 1e6 * (perf_counter() - begin) / 200
    torch.cuda.synchronize()
    return found


def _measure(tokens: int, mask: Mask, backends: Sequence[str]) -> dict[str, Any]:
    it = replace(problem(Shape(1, 32, 8, tokens, tokens, 128, 128), torch.bfloat16, _DEVICE), mask=mask)
    figures = {}
    for backend in backends:
        with torch.no_grad():
            figures[f"{backend}_forward_us"] = median_us(
                lambda backend=backend: attention(it.q, it.k, it.v, mask=mask, backend=backend)  # type: ignore[misc]
            )
        figures[f"{backend}_both_us"] = median_us(partial(_run, it, backend))
    return figures
