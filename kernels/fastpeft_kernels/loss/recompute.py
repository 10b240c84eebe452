"""Gradients with the logits made once more: of what is trained of the head; and under label smoothing.

With the sums over tokens a chunk of words is done before the next one comes, so that nothing as large as all tokens'
hidden states or all words' weights is summed in memory of its own: one product for the logits, as far as `kept_logits`
has none, and one for each gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from ..common.shapes import kind_of
from .blocks import NOTHING, Blocks, Sizes, choose_blocks, choose_chunks, worth_sums
from .choosing import steps_of
from .kept_logits import KeptLogits
from .problem import Needs, Problem, Tokens, Vocabulary, Words, room_of_block, token_blocks
from .sums import TokenSums, WordSums


class Known(NamedTuple):
    """Of all tokens what `steps.gradient_step` asks for, (tokens,) each."""

    top: Tensor
    inverse: Tensor
    others: Tensor
    d_nll: Tensor | None
    d_lse: Tensor | None
    d_total: Tensor | None


def token_gradients(problem: Problem, needs: Needs, known: Known) -> tuple[Tensor | None, Tensor | None]:
    """Of hidden and s: the gradients of sum_t d_nll nll + d_lse lse + d_total total."""
    blocks = choose_blocks(problem.tokens, problem.words, problem.sizes(sums=True), problem.device)
    sums = TokenSums(problem, needs, blocks.tokens)
    vocabulary, gradient = Vocabulary(problem, blocks), _step(problem, known)
    for tokens in token_blocks(problem, blocks):
        sums.begin(tokens)
        for words in vocabulary:
            sums.add(gradient(vocabulary.raw(tokens, words), tokens, words), words)
        sums.finish()
    return sums.hidden, sums.s


def word_gradients(
    problem: Problem,
    needs: Needs,
    known: Known,
    memory: Tensor | None,
    spend: bool,
    of_tokens: TokenSums | None = None,
) -> WordSums:
    """Of weight, bias and b, as `token_gradients`.

    Args:
        of_tokens: of all tokens, filled along with them; or None.
        memory: of `KeptLogits`, or None.
        spend: whether it may be overwritten: then it is where the gradient of the weight lies.
    """
    blocks = word_blocks(problem, needs)
    kept = None if memory is None else KeptLogits(memory, problem, blocks.words)
    vocabulary, gradient = Vocabulary(problem, blocks), _step(problem, known)
    sums = WordSums(problem, needs, blocks, memory if spend else None)
    again = repeated_blocks(problem, blocks)
    for words in vocabulary:
        for tokens in again():
            raw = gradient(vocabulary.raw(tokens, words, kept), tokens, words)
            sums.add(raw, tokens, words)
            if of_tokens is not None:
                of_tokens.begin(tokens)
                of_tokens.add(raw, words)
        sums.finish(words)
    if of_tokens is not None:
        for tokens in again():
            of_tokens.begin(tokens)
            of_tokens.finish()
    return sums


def one_walk(problem: Problem, needs: Needs) -> bool:
    """Whether `word_gradients` may fill sums of all tokens too: not on a GPU, where nobody measured it."""
    if kind_of(problem.device) != "cpu":
        return False
    columns = 0 if problem.sums_in_place or not needs.hidden else problem.hidden.shape[1]
    columns += problem.s.shape[1] if needs.s and problem.s is not None else 0
    return worth_sums(problem.tokens, problem.words, columns)


def word_blocks(problem: Problem, needs: Needs, others: Sizes = NOTHING) -> Blocks:
    """Those of `word_gradients`.

    Args:
        others: working memory of others in the same loop.
    """
    sizes = Sizes(*(mine + more for mine, more in zip(problem.sizes(sums=False), others, strict=True)))
    sums = problem.hidden.shape[1] * problem.wide.itemsize if needs.weight else 0
    return choose_chunks(problem.tokens, problem.words, sizes, sums, problem.device)


def repeated_blocks(problem: Problem, blocks: Blocks) -> Callable[[], Iterable[Tokens]]:
    """`token_blocks` as often as it is called; a single one is made once."""
    if blocks.tokens < problem.tokens:
        room = room_of_block(problem, blocks)
        return lambda: token_blocks(problem, blocks, room)
    single = list(token_blocks(problem, blocks))
    return lambda: single


def _step(problem: Problem, known: Known) -> Callable[[Tensor, Tokens, Words], Tensor]:
    """Overwrites raw with the gradient in it, and gives it back."""
    step = steps_of(problem.dtype, problem.device).gradient_step
    factors = (None if d is None else d * problem.scale for d in known[3:])
    computed = [None if x is None else problem.of(x, 0, problem.tokens) for x in (*known[:3], *factors)]

    def gradient(raw: Tensor, tokens: Tokens, words: Words) -> Tensor:
        step(
            raw,
            words.first,
            tokens.labels,
            *(None if x is None else x[tokens.first : tokens.last] for x in computed),
            bias=words.bias,
            scale=problem.scale,
            softcap=problem.softcap,
            class_weight=words.class_weight,
        )
        return raw

    return gradient
