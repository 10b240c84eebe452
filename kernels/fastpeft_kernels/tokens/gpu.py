"""Checks that need a CUDA GPU: embeddings and heads with trained rows against fp64, and in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_verdicts import Verdicts
from ..lora.gpu_support import BF16, DEVICE, F16, F32, F64, dtype_name, moved, rand, worse
from .api import token_embedding, token_linear
from .reference import token_embedding_reference, token_linear_reference

VOCABULARY, FEATURES = 5000, 384
TOKENS = (4999, 7, 0, 321)
IDS = ((4, 1000), (1, 1), (0, 3))
"""PyTorch's gradient of an embedding takes another way from 3072 ids on."""


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    for dtype in (BF16, F16, F32):
        yield f"correct {dtype_name(dtype)}", partial(_check, dtype)
    yield "the same in a CUDA graph", _check_graph


def _check(dtype: torch.dtype) -> dict[str, Any]:
    verdicts = Verdicts()
    for shape in IDS:
        ids, inputs, dys = _inputs(shape, dtype)
        ours = _derive(token_embedding, token_linear, ids, inputs, dys)
        here, there, exact = (
            [
                t.to(DEVICE)
                for t in _derive(
                    token_embedding_reference,
                    token_linear_reference,
                    ids.to(device),
                    [moved(t, device, wide) for t in inputs],
                    [moved(t, device, wide) for t in dys],
                )
            ]
            for device, wide in ((DEVICE, None), (torch.device("cpu"), None), (DEVICE, F64))
        )
        names = ("embedding", "its rows' gradient", "head", "x's gradient", "the head's rows' gradient")
        for name, mine, one, other, truth in zip(names, ours, here, there, exact, strict=True):
            verdicts.within(mine, worse(one, other, truth), truth, f"{name} of {shape}")
    return {"share_of_budget": verdicts.settle()}


def _check_graph() -> dict[str, Any]:
    """Nothing waits for the GPU, and other numbers give other results."""
    ids, inputs, dys = _inputs(IDS[0], BF16)
    run = partial(_derive, token_embedding, token_linear, ids, inputs, dys)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    ids.copy_(ids.flip(0))
    for t in (*inputs, *dys):
        t.copy_(t.flip(-1))
    graph.replay()
    verdicts = Verdicts()
    for i, (mine, wanted) in enumerate(zip(found, run(), strict=True)):
        verdicts.equal(mine, wanted, f"result {i}")
    verdicts.settle()
    return {}


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """ids, half of which have a trained row; x, weight and rows; the gradients of both results."""
    ids = torch.randint(0, VOCABULARY, shape, device=DEVICE)
    trained = torch.tensor(TOKENS, device=DEVICE)[torch.randint(0, len(TOKENS), shape, device=DEVICE)]
    ids = torch.where(torch.rand(shape, device=DEVICE) < 0.5, trained, ids)
    weight = rand(VOCABULARY, FEATURES, dtype=dtype) / FEATURES**0.5
    inputs = [rand(*shape, FEATURES, dtype=dtype), weight, rand(len(TOKENS), FEATURES) / FEATURES**0.5]
    return ids, inputs, [rand(*shape, FEATURES, dtype=dtype), rand(*shape, VOCABULARY, dtype=dtype)]


def _derive(
    embedding: Callable[..., Tensor],
    linear: Callable[..., Tensor],
    ids: Tensor,
    inputs: list[Tensor],
    dys: list[Tensor],
) -> list[Tensor]:
    """Both results, each followed by its gradients."""
    x, weight, rows = (t.detach() for t in inputs)
    x, rows = x.requires_grad_(), rows.requires_grad_()
    y, z = embedding(ids, weight, rows, TOKENS), linear(x, weight, rows, TOKENS)
    of_y, of_z = torch.autograd.grad(y, rows, dys[0]), torch.autograd.grad(z, (x, rows), dys[1])
    return [y.detach(), *of_y, z.detach(), *of_z]
