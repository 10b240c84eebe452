"""Times on a CUDA GPU: every tile of the attention kernels, beside PyTorch's own attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..common.device import device_capability
from ..common.gpu_clock import median_us
from .gradients import Needs
from .problems import Problem, Shape, problem
from .tiles import Tiles, tiles_for

_DEVICE = torch.device("cuda")
_TOKENS = 16384
_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION")


def _shape(features: int, tokens: int) -> Shape:
    """That of a model of 8 billion parameters; the heads twice as many where they are half as wide."""
    heads = 32 * 128 // features
    return Shape(_TOKENS // tokens, heads, heads // 4, tokens, tokens, features, features)


def speed_checks(depth: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named measurements, causal, bf16, in microseconds and TFLOP/s of what is seen."""
    capability = device_capability(_DEVICE)
    assert capability is not None
    for features in (128, 64):
        shape = _shape(features, 4096)
        for tiles in tiles_for(capability, torch.bfloat16, features, features):
            yield f"speed attention {features} 4096 tokens, {tiles.label}", partial(_measure, shape, tiles)
        for backend in _BACKENDS:
            yield f"speed attention {features} 4096 tokens, {backend}", partial(_measure_torch, shape, backend)
    yield "speed attention 128 4096 tokens, FlexAttention", partial(_measure_flex, _shape(128, 4096))
    yield (
        "speed attention 64 4096 tokens, documents",
        partial(_measure, _shape(64, 4096), None, ("documents", "causal")),
    )
    for features, masks, score in ((64, (), "relative"), (64, (), "bias"), (128, ("causal",), "softcap")):
        for tiles in tiles_for(capability, torch.bfloat16, features, features, added=1):
            name = f"speed attention {features} 4096 tokens, {score}, {tiles.label}"
            yield name, partial(_measure, _shape(features, 4096), tiles, masks, (score,))
    if depth != "quick":
        for features in (128, 64):
            for tokens in (1024, 16384):
                shape = _shape(features, tokens)
                yield f"speed attention {features} {tokens} tokens", partial(_measure, shape, None)
                for backend in _BACKENDS:
                    name = f"speed attention {features} {tokens} tokens, {backend}"
                    yield name, partial(_measure_torch, shape, backend)


def _measure(
    shape: Shape, tiles: Tiles | None, masks: tuple[str, ...] = ("causal",), scores: tuple[str, ...] = ()
) -> dict[str, Any]:
    from .backward import attention_backward_triton
    from .forward import attention_triton

    it = problem(shape, torch.bfloat16, _DEVICE, masks, scores)
    out, lse = attention_triton(it.q, it.k, it.v, it.mask, it.scores, tiles)

    def backward(needs: Needs) -> None:
        tensors = it.dout, it.q, it.k, it.v, out, lse
        attention_backward_triton(*tensors, it.mask, it.scores, needs, False, tiles)

    none = Needs(False, False, False)
    times = {
        "forward_us": median_us(lambda: attention_triton(it.q, it.k, it.v, it.mask, it.scores, tiles)),
        "backward_us": median_us(lambda: backward(it.needs)),
        "backward_queries_us": median_us(lambda: backward(none._replace(q=True))),
        "backward_keys_us": median_us(lambda: backward(none._replace(k=True, v=True))),
        "backward_rows_us": median_us(lambda: backward(none)),
    }
    return _figures(it, times)


def _measure_torch(shape: Shape, backend: str) -> dict[str, Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    it = problem(shape, torch.bfloat16, _DEVICE, ("causal",))
    q, k, v = (t.detach().requires_grad_() for t in (it.q, it.k, it.v))
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return _autograd_times(
            it, lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), (q, k, v)
        )


def _measure_flex(shape: Shape) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    it = problem(shape, torch.bfloat16, _DEVICE, ("causal",))
    q, k, v = (t.detach().requires_grad_() for t in (it.q, it.k, it.v))
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, shape.queries, shape.keys, device=_DEVICE)
    flex = torch.compile(flex_attention, dynamic=False)
    return _autograd_times(it, lambda: flex(q, k, v, block_mask=mask, enable_gqa=True), (q, k, v))


def _autograd_times(it: Problem, forward: Callable[[], Any], leaves: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    with torch.enable_grad():
        out = forward()
        times = {
            "forward_us": median_us(forward),
            "backward_us": median_us(lambda: torch.autograd.grad(out, leaves, it.dout, retain_graph=True)),
        }
    return _figures(it, times)


def _figures(it: Problem, times: dict[str, float]) -> dict[str, Any]:
    """Seven products of which two are the forward's and five the backward's, of half the scores where causal."""
    batch, heads, queries, features = it.q.shape
    product = 2 * batch * heads * queries * it.k.shape[2] * features / (2 if it.mask.right == 0 else 1)
    rates = {"forward_tflops": 2 * product / times["forward_us"] / 1e6}
    rates["backward_tflops"] = 5 * product / times["backward_us"] / 1e6
    print({name: round(value, 1) for name, value in {**times, **rates}.items()}, flush=True)
    return {**times, **rates}
