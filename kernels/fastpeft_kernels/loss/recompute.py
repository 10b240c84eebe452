"""Gradients with the logits made once more: of a trained head, and of label smoothing.

Four products in all where the weight is trained: logits forward, and logits, dX and dW here.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .blocks import choose_blocks
from .choosing import steps_of
from .problem import Needs, Problem, Vocabulary, token_blocks
from .sums import Sums


class Gradients(NamedTuple):
    """None where not wanted; hidden's and the weight's in their dtypes, the others in that of sums or fp64."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    s: Tensor | None
    b: Tensor | None


def recompute(
    problem: Problem,
    needs: Needs,
    top: Tensor,
    inverse: Tensor,
    others: Tensor,
    d_nll: Tensor | None,
    d_lse: Tensor | None,
    d_total: Tensor | None,
) -> Gradients:
    """The gradients of sum_t d_nll nll + d_lse lse + d_total total; see `steps.gradient_step`, of (tokens,) each."""
    # The gradient of a weight in 16 bits is one sum over all tokens: parts of it would be rounded. So the sums of all
    # tokens' hidden states are needed at once, however the chunks are chosen.
    weight_dtype = problem.weight.dtype
    narrow = needs.weight and weight_dtype.itemsize < problem.wide.itemsize
    sizes = problem.sizes(sums=needs.hidden and not narrow, weight_sums=narrow and weight_dtype != problem.dtype)
    blocks = choose_blocks(problem.tokens, problem.words, sizes, problem.device, whole=narrow)
    steps, vocabulary = steps_of(problem.dtype, problem.device), Vocabulary(problem, blocks)
    sums = Sums(problem, needs, blocks, weight_dtype)
    upstream = [None if d is None else d * problem.scale for d in (d_nll, d_lse, d_total)]
    for tokens in token_blocks(problem, blocks):
        place = (tokens.first, tokens.last)
        known = [problem.of(values, *place) for values in (top, inverse, others)]
        d = [None if values is None else problem.of(values, *place) for values in upstream]
        sums.begin(*place)
        for words in vocabulary:
            raw = vocabulary.raw(tokens, words)
            steps.gradient_step(
                raw,
                words.first,
                tokens.labels,
                *known,
                *d,
                bias=words.bias,
                scale=problem.scale,
                softcap=problem.softcap,
                class_weight=words.class_weight,
            )
            sums.add(raw, tokens, words)
        sums.finish()
    return Gradients(sums.hidden, sums.weight, sums.bias, sums.s, sums.b)
