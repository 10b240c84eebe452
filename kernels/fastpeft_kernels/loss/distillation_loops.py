"""A student's distance from its teacher and the gradient of it: what lies between hidden states and both.

Forward, the logits of some tokens under all words lie in memory at once: the gradient needs both distributions' sums
over all words, and softmax's numerators cannot stand for its probabilities until then, as in `online`, because q - p
would be the difference of two sums of rounded numbers. So three products are all where the head is frozen: both logits,
and the gradient of hidden. For the gradients of a trained head both logits are made once more in backward, and the
gradient in the student's as far as `kept_logits` has none of forward: four to six products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import divergence_op
from .blocks import Blocks, choose_whole_rows
from .divergence_op import KEPT
from .hard_labels import HardLabels
from .kept_logits import KeptLogits
from .logit_map import LogitMap
from .problem import Needs, Problem, Vocabulary, token_blocks
from .recompute import repeated_blocks, word_blocks
from .statistics import statistics
from .sums import TokenSums, WordSums
from .teachers import Given, TeacherHead


class Soft(NamedTuple):
    """loss = divergence_weight * divergence + cross_entropy_weight * nll; temperature and beta as `kl_divergence`."""

    temperature: float
    beta: float
    divergence_weight: float
    cross_entropy_weight: float


@dataclass(slots=True)
class Result:
    """Of all tokens, zero where one is not computed or does not count; (tokens,) each, in the dtype of sums.

    Attributes:
        nll: None without a weight of the cross-entropy.
        known: (5 or 8, computed tokens): `divergence_op.compute`'s, and with labels top, inverse and others of `steps`.
        sums: the gradients of each token's loss in hidden and s.
    """

    divergence: Tensor
    nll: Tensor | None
    known: Tensor
    sums: TokenSums


def distil(
    student: Problem,
    teacher: Given | TeacherHead,
    counted: Tensor | None,
    soft: Soft,
    needs: Needs,
    memory: Tensor | None,
) -> Result:
    """Forward, and where `needs` has hidden or s, which alone are looked at, their gradients.

    Args:
        counted: (tokens,) bool where all are computed and not all count, or None.
        memory: of `KeptLogits`, or None: of its tokens the gradients in the student's raw logits are kept.
    """
    row = student.words * (student.dtype.itemsize + teacher.dtype.itemsize)
    decoded = teacher.sizes.word > 0 or not student.weight.is_ready(student.dtype)
    blocks = choose_whole_rows(student.tokens, student.words, row, student.device, decoded=decoded)
    vocabulary, room = Vocabulary(student, blocks, whole=True), teacher.room(blocks, student.words, whole=True)
    maps = (student.map_of(0, student.words), teacher.map_of(0, student.words))
    result = _room(student, teacher, blocks, soft, needs)
    kept = _kept(student, teacher, needs, memory)
    for tokens in token_blocks(student, blocks):
        place = slice(tokens.first, tokens.last)
        raw, teacher_raw = vocabulary.rows(tokens), room.rows(tokens.first, tokens.last)
        known, counts = result.known[:, place], None if counted is None else counted[place]
        ways = (soft.temperature, soft.beta, "auto", *maps)
        values, known[:KEPT] = divergence_op.compute(raw, teacher_raw, counts, *ways)
        student.put(result.divergence, tokens.first, values)
        if result.nll is not None:
            found = statistics(raw, tokens.labels, -1, None, False, "auto", maps[0])
            known[KEPT:] = torch.stack([found.top, found.inverse, found.others])
            student.put(result.nll, tokens.first, found.nll if counts is None else torch.where(counts, found.nll, 0.0))
        keeps = kept is not None and kept.count(tokens) > 0
        if needs.of_tokens or keeps:
            ones = torch.ones_like(values) if counts is None else counts.to(values.dtype)
            _to_gradient(raw, teacher_raw, maps, student.scale, soft, tokens.labels, 0, known, ones)
        if kept is not None and keeps:
            kept.put(raw, tokens, 0)
        if needs.of_tokens:
            result.sums.begin(tokens)
            for words in vocabulary:
                result.sums.add(raw[:, words.first : words.last], words)
            result.sums.finish()
    return result


def distil_again(
    student: Problem,
    teacher: Given | TeacherHead,
    counted: Tensor | None,
    soft: Soft,
    needs: Needs,
    known: Tensor,
    d_losses: Tensor,
    memory: Tensor | None,
    spend: bool,
) -> WordSums:
    """The gradients of sum_t d_losses losses in weight, bias and b, with both logits made once more.

    Args:
        known: of `Result`.
        d_losses: (tokens,).
        memory, spend: see `recompute.word_gradients`.
    """
    blocks = word_blocks(student, needs, teacher.sizes)
    vocabulary, room = Vocabulary(student, blocks), teacher.room(blocks, student.words, whole=False)
    kept, sums = _kept(student, teacher, needs, memory), WordSums(student, needs, blocks, memory if spend else None)
    factors = (d_losses if counted is None else torch.where(counted, d_losses, 0.0)).to(known.dtype)
    factors = student.of(factors, 0, student.tokens)
    again = repeated_blocks(student, blocks)
    for words, teacher_logits in zip(vocabulary, room, strict=True):
        maps = (student.map_of(words.first, words.last), teacher.map_of(words.first, words.last))
        for tokens in again():
            raw, count = vocabulary.raw(tokens, words, kept), 0 if kept is None else kept.count(tokens)
            rest = slice(tokens.first + count, tokens.last)
            if count:
                raw[:count].mul_(factors[tokens.first : rest.start, None])
            if rest.start < rest.stop:
                of_rest = (tokens.labels[count:], words.first, known[:, rest], factors[rest])
                teacher_raw = teacher_logits(rest.start, rest.stop)
                _to_gradient(raw[count:], teacher_raw, maps, student.scale, soft, *of_rest)
            sums.add(raw, tokens, words)
        sums.finish(words)
    return sums


def _kept(student: Problem, teacher: Given | TeacherHead, needs: Needs, memory: Tensor | None) -> KeptLogits | None:
    return None if memory is None else KeptLogits(memory, student, word_blocks(student, needs, teacher.sizes).words)


def _to_gradient(
    raw: Tensor,
    teacher_raw: Tensor,
    maps: tuple[LogitMap, LogitMap],
    scale: float,
    soft: Soft,
    labels: Tensor,
    first: int,
    known: Tensor,
    factors: Tensor,
) -> None:
    """Overwrites raw (T, C), of the words from `first` on, with the gradient of sum_t factors losses in it."""
    hard = None
    if soft.cross_entropy_weight:
        top, inverse, others = known[KEPT:]
        hard = HardLabels(first, labels, top, inverse, others, factors * (soft.cross_entropy_weight * scale))
    dvalues, ways = factors * (soft.divergence_weight * scale), (soft.temperature, soft.beta, "auto")
    divergence_op.compute_backward(dvalues, raw, teacher_raw, None, known[:KEPT], *ways, *maps, hard, out=raw)


def wide_dtype(dtype: torch.dtype, teacher_dtype: torch.dtype) -> torch.dtype:
    """Of divergences of logits in these: fp32, or fp64 where one of them is."""
    return torch.promote_types(torch.promote_types(dtype, teacher_dtype), torch.float32)


def known_rows(soft: Soft) -> int:
    """How many numbers `Result.known` has of a token."""
    return KEPT + (3 if soft.cross_entropy_weight else 0)


def _room(student: Problem, teacher: Given | TeacherHead, blocks: Blocks, soft: Soft, needs: Needs) -> Result:
    wide = wide_dtype(student.dtype, teacher.dtype)
    return Result(
        divergence=student.empty(dtype=wide),
        nll=student.empty(dtype=wide) if soft.cross_entropy_weight else None,
        known=torch.empty((known_rows(soft), student.tokens), dtype=wide, device=student.device),
        sums=TokenSums(student, needs, blocks.tokens, waiting=True),
    )
