"""The forward pass: sums over words of each token, and on request the gradients of nll in its row along with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import choose_blocks
from .choosing import steps_of
from .kept_logits import KeptLogits
from .online import RowGradients
from .problem import Needs, Problem, Tokens, Vocabulary, Wants, token_blocks
from .steps import Known, Running, cap_slope, entropy, known


@dataclass(slots=True)
class Result:
    """Of all tokens, zero where one is not computed; (tokens,) each, in the dtype of sums unless it says otherwise.

    Attributes:
        nll, lse, total, entropy: see `steps`; total (also for a mean) and entropy None unless wanted.
        correct: bool, or None.
        top, inverse, others: see `steps.gradient_step`.
        slope: scale * cap' at the label's logit.
        rows: gradients of each token's nll in hidden and s, as `RowGradients` gives them.
    """

    nll: Tensor
    lse: Tensor
    top: Tensor
    inverse: Tensor
    others: Tensor
    slope: Tensor
    total: Tensor | None
    entropy: Tensor | None
    correct: Tensor | None
    rows: RowGradients


def forward(problem: Problem, wants: Wants, needs: Needs, kept: KeptLogits | None = None) -> Result:
    """One product for each block of tokens and chunk of words, and a second where `needs` has hidden.

    Args:
        needs: hidden and s may be set; no others are looked at.
        kept: where raw logits go too.
    """
    # Trainers compare a pass without gradients with one that has them: blocks and order of sums are the same in both.
    blocks = choose_blocks(problem.tokens, problem.words, problem.sizes(sums=True), problem.device)
    steps, vocabulary = steps_of(problem.dtype, problem.device), Vocabulary(problem, blocks)
    rows = RowGradients(problem, needs, blocks)
    result = _room(problem, wants, rows)
    for tokens in token_blocks(problem, blocks):
        count = tokens.last - tokens.first
        running = Running.start(
            count, problem.wide, problem.device, tilted=wants.entropy, best=wants.correct, total=wants.sums
        )
        rows.begin(tokens)
        for words in vocabulary:
            raw = vocabulary.raw(tokens, words)
            if kept is not None:
                kept.put(raw, tokens, words.first)
            steps.online_step(
                raw,
                words.first,
                tokens.labels,
                running,
                bias=words.bias,
                scale=problem.scale,
                softcap=problem.softcap,
                class_weight=words.class_weight,
                write=True,
            )
            rows.add(raw, words, running.factor, steps.rescale)
        found = known(running)
        slope = problem.scale * cap_slope(found.label, problem.softcap)
        rows.finish(found, slope, vocabulary.room())
        _put(problem, result, tokens, running, found, slope)
    return result


def _room(problem: Problem, wants: Wants, rows: RowGradients) -> Result:
    wide = problem.wide
    nll, lse, top, inverse, others, slope = (problem.empty(dtype=wide) for _ in range(6))
    return Result(
        nll,
        lse,
        top,
        inverse,
        others,
        slope,
        problem.empty(dtype=wide) if wants.sums else None,
        problem.empty(dtype=wide) if wants.entropy else None,
        problem.empty(dtype=torch.bool) if wants.correct else None,
        rows,
    )


def _put(problem: Problem, result: Result, tokens: Tokens, running: Running, found: Known, slope: Tensor) -> None:
    pairs = [
        (result.nll, found.nll),
        (result.lse, found.lse),
        (result.top, found.top),
        (result.inverse, found.inverse),
        (result.others, found.others),
        (result.slope, slope),
    ]
    if result.total is not None and running.total is not None:
        pairs.append((result.total, running.total))
    if result.entropy is not None:
        pairs.append((result.entropy, entropy(running)))
    if result.correct is not None and running.best is not None:
        pairs.append((result.correct, (running.best == tokens.labels) & ~found.lse.isnan()))
    for values, rows in pairs:
        problem.put(values, tokens.first, rows)
