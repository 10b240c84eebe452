"""Times on a CUDA GPU: the steps, whole rows of logits, and the fused loss beside its products.

8192 tokens, 4096 features and 128256 words in bf16, as in Llama 3.1 8B: the logits in fp32 would take 4.2 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_clock import median_us
from ..weights import DenseWeight
from .api import linear_cross_entropy
from .blocks import Sizes, choose_blocks
from .head import Head
from .products import add_product
from .steps import Running, known

_DEVICE = torch.device("cuda")
TOKENS, FEATURES, WORDS = 8192, 4096, 128256
_CHUNK = (2048, 4096)  # tokens and words of a step
BF16 = torch.bfloat16


def speed_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named measurements, in microseconds, TFLOP/s, GB/s and shares."""
    from .tiles import CONFIGS

    yield "speed linear cross-entropy frozen", partial(_measure_linear, False)
    yield "speed linear cross-entropy products", _measure_products
    yield "speed linear cross-entropy trained", partial(_measure_linear, True)
    for config in CONFIGS:
        yield f"speed loss steps {config}", partial(_measure_steps, config)
        yield f"speed loss of logits {config}", partial(_measure_logits, config)
    for config in CONFIGS[:4]:
        yield f"speed divergences {config}", partial(_measure_divergences, config)


def _inputs(trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)  # so that all losses are the same
    hidden = torch.randn((TOKENS, FEATURES), device=_DEVICE, dtype=BF16).requires_grad_()
    weight = torch.randn((WORDS, FEATURES), device=_DEVICE, dtype=BF16).mul_(FEATURES**-0.5).requires_grad_(trained)
    return hidden, weight, torch.randint(0, WORDS, (TOKENS,), device=_DEVICE)


def _measure_linear(trained: bool) -> dict[str, Any]:
    hidden, weight, labels = _inputs(trained)
    head = Head(weight if trained else DenseWeight(weight))
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    return measured(lambda: linear_cross_entropy(hidden, head, labels).loss, wanted, 3 if trained else 2)


def measured(loss: Callable[[], Tensor], wanted: list[Tensor], products: int) -> dict[str, Any]:
    """Forward and backward: time, the rate over the products of the definition, and memory beside the gradients."""

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(), wanted)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = step()
    peak = torch.cuda.max_memory_allocated() - before - sum(gradient.nbytes for gradient in gradients)
    del gradients
    us = median_us(step)
    return {
        "loss": float(loss()),
        "step_us": us,
        "step_tflops": products * product_operations() / us / 1e6,
        "peak_mib": peak / 2**20,
        "peak_share_of_fp32_logits": peak / (4 * TOKENS * WORDS),
    }


def product_operations() -> float:
    return 2.0 * TOKENS * FEATURES * WORDS


def _measure_products() -> dict[str, Any]:
    """The two products of a frozen head alone: in the blocks of the fused loss, and whole."""
    hidden, weight, _ = _inputs(False)
    x = hidden.detach()
    sizes = Sizes(logit=2, token=4 * FEATURES, word=0)
    blocks = choose_blocks(TOKENS, WORDS, sizes, _DEVICE)
    sums = torch.empty((blocks.tokens, FEATURES), device=_DEVICE)
    raw = torch.empty(blocks.tokens * blocks.words, device=_DEVICE, dtype=BF16)

    def chunked(logits: bool, gradient: bool) -> None:
        for rows in x.split(blocks.tokens):
            for first in range(0, WORDS, blocks.words):
                words = weight[first : first + blocks.words]
                chunk = raw[: len(rows) * len(words)].view(len(rows), len(words))
                if logits:
                    torch.mm(rows, words.t(), out=chunk)
                if gradient:
                    add_product(sums[: len(rows)], chunk, words, first == 0)

    every = torch.empty((TOKENS, WORDS), device=_DEVICE, dtype=BF16)
    figures: dict[str, Any] = {
        "tokens_of_a_block": blocks.tokens,
        "words_of_a_chunk": blocks.words,
        "chunked_us": median_us(lambda: chunked(True, True)),
        "chunked_logits_us": median_us(lambda: chunked(True, False)),
        "chunked_gradient_us": median_us(lambda: chunked(False, True)),
        "whole_logits_us": median_us(lambda: torch.mm(x, weight.t(), out=every)),
        "whole_gradient_us": median_us(lambda: torch.mm(every, weight)),
    }
    for name in ("chunked_logits", "chunked_gradient", "whole_logits", "whole_gradient"):
        figures[f"{name}_tflops"] = product_operations() / figures[f"{name}_us"] / 1e6
    return figures


def _measure_steps(config: Any) -> dict[str, Any]:
    """A step right after the product that makes its chunk, less the product alone; and from memory."""
    from .triton_steps import gradient_step, online_step, rescale

    tokens, words = _CHUNK
    x = torch.randn((tokens, FEATURES), device=_DEVICE, dtype=BF16)
    w = torch.randn((words, FEATURES), device=_DEVICE, dtype=BF16).mul_(FEATURES**-0.5)
    raw, labels = torch.mm(x, w.t()), torch.randint(0, words, (tokens,), device=_DEVICE)
    running = Running.start(tokens, torch.float32, _DEVICE)
    online_step(raw.clone(), 0, labels, running)
    found, d = known(running), torch.rand(tokens, device=_DEVICE)
    steps: dict[str, Callable[[], None]] = {
        "online": lambda: online_step(raw, 0, labels, running, write=True, config=config),
        "capped": lambda: online_step(raw, 0, labels, running, softcap=30.0, write=True, config=config),
        "unwritten": lambda: online_step(raw, 0, labels, running, config=config),
        "gradient": lambda: gradient_step(
            raw, 0, labels, found.top, found.inverse, found.others, d, None, None, config=config
        ),
    }
    product = median_us(lambda: torch.mm(x, w.t(), out=raw))
    figures = {"product_us": product}
    for name, step in steps.items():

        def both(step: Callable[[], None] = step) -> None:
            torch.mm(x, w.t(), out=raw)
            step()

        figures[f"{name}_after_product_us"] = median_us(both) - product
        figures[f"{name}_from_memory_us"] = median_us(step)
    sums, ones = torch.zeros((tokens, FEATURES), device=_DEVICE), torch.ones(tokens, device=_DEVICE)
    figures["rescale_by_one_us"] = median_us(lambda: rescale(sums, ones))
    return figures


def _measure_logits(config: Any) -> dict[str, Any]:
    """Statistics and gradient of whole rows."""
    from .triton_steps import gradient_step, online_step

    logits = torch.randn((TOKENS, WORDS), device=_DEVICE, dtype=BF16)
    out, labels = torch.empty_like(logits), torch.randint(0, WORDS, (TOKENS,), device=_DEVICE)
    running = Running.start(TOKENS, torch.float32, _DEVICE)
    forward = median_us(lambda: online_step(logits, 0, labels, running, config=config))
    found, d = known(running), torch.rand(TOKENS, device=_DEVICE)
    rows = (found.top, found.inverse, found.others, d, None, None)
    backward = median_us(lambda: gradient_step(logits, 0, labels, *rows, out=out, config=config))
    return {
        "forward_us": forward,
        "forward_gb_s": logits.nbytes / forward / 1e3,
        "backward_us": backward,
        "backward_gb_s": 2 * logits.nbytes / backward / 1e3,
    }


def _measure_divergences(config: Any) -> dict[str, Any]:
    from .divergence_triton import divergence_backward_triton, divergence_triton

    student, teacher = (torch.randn((TOKENS, WORDS), device=_DEVICE, dtype=BF16) for _ in range(2))
    values, kept = (torch.empty((*n, TOKENS), device=_DEVICE) for n in ((), (5,)))
    gradient, d = torch.empty_like(student), torch.rand(TOKENS, device=_DEVICE)
    figures: dict[str, Any] = {}
    for name, beta in (("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5)):
        forward = partial(divergence_triton, student, teacher, None, 1.0, beta, values, kept, config)
        backward = partial(divergence_backward_triton, d, student, teacher, kept, 1.0, beta, gradient, config)
        figures |= {f"{name}_us": median_us(forward), f"{name}_backward_us": median_us(backward)}
        reads = 4 if name == "jsd" else 2
        figures[f"{name}_gb_s"] = reads * student.nbytes / figures[f"{name}_us"] / 1e3
        figures[f"{name}_backward_gb_s"] = 3 * student.nbytes / figures[f"{name}_backward_us"] / 1e3
    return figures
