"""How many tokens and how many words are worked on at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..common.shapes import kind_of

SHARE = 0.02
"""Of the bytes of all logits in fp32: what the working memory may take."""
_LEAST_BYTES = 80 << 20
"""What it may take on a GPU whatever the share says: a chunk costs the host four launches, and a slow one took longer
for these than an H200 for the products of 1024 tokens of 2048 features with 8192 words."""
_NUMBERS = 80
"""Bytes of each token beside: statistics, results and indices."""
_WIDTHS = (8192, 4096, 1984, 1024)
"""Not 2048, with which blocks of 4096 tokens of 4096 features miss 2 % of 8192 x 128,256 logits by their indices."""
_ON_CPU = (512, 1024)
"""Logits of 2 MiB in fp32 stay in the caches between the product that makes them and the one that reads them."""
_WHOLE_ROWS = (256 << 20, 512)
"""Bytes of rows of logits over all words, and the tokens that they hold at least: fewer read the weight too often."""
_WHOLE_ROWS_ON_CPU = (16 << 20, 64)
_DECODED = {"cpu": 1024, "cuda": 8192}


class Blocks(NamedTuple):
    tokens: int
    words: int


class Sizes(NamedTuple):
    """Bytes of working memory.

    Attributes:
        logit: for each token and word of a block.
        token: for each token of a block: sums as wide as the hidden states.
        word: for each word of a chunk: a decoded row of the weight.
    """

    logit: int
    token: int
    word: int

    def of(self, blocks: Blocks) -> int:
        return blocks.tokens * blocks.words * self.logit + blocks.tokens * self.token + blocks.words * self.word


NOTHING = Sizes(0, 0, 0)


def choose_blocks(tokens: int, words: int, sizes: Sizes, device: torch.device) -> Blocks:
    """Blocks whose working memory is within SHARE, or the least that is worth while.

    For each chunk the sums over words are read and written once, 8 bytes a token and feature beside C multiplications,
    so wide chunks matter more than large blocks of tokens; each block reads the weight once more.
    """
    if kind_of(device) == "cpu":
        height = _even(tokens, _ON_CPU[0])
        return Blocks(height, _even(words, max(1, _ON_CPU[0] * _ON_CPU[1] // height)))
    wanted = [Blocks(_even(tokens, height), _even(words, width)) for width in _WIDTHS for height in (4096, 2048, 1024)]
    limit = _limit(tokens, words)
    return next((blocks for blocks in wanted if sizes.of(blocks) <= limit), wanted[-1])


def choose_chunks(tokens: int, words: int, sizes: Sizes, sums: int, device: torch.device) -> Blocks:
    """The same for sums over tokens, a chunk of words after the other; best with all tokens in one block.

    Args:
        sums: bytes more for each word of a chunk where the blocks are several, whose sums then lie apart and are read
            and written once for each block, so that large blocks matter more than wide chunks.
    """
    if kind_of(device) == "cpu":
        return choose_blocks(tokens, words, sizes, device)
    heights, apart = (max(tokens, 1), 8192, 4096, 2048, 1024), sizes._replace(word=sizes.word + sums)
    wanted = [Blocks(_even(tokens, height), _even(words, width)) for height in heights for width in _WIDTHS]
    limit = _limit(tokens, words)
    fitting = (blocks for blocks in wanted if (sizes if blocks.tokens >= tokens else apart).of(blocks) <= limit)
    return next(fitting, wanted[-1])


def _limit(tokens: int, words: int) -> int:
    return max(int(SHARE * 4 * tokens * words), _LEAST_BYTES) - _NUMBERS * tokens


def worth_sums(tokens: int, words: int, columns: int) -> bool:
    """Whether fp32 sums (tokens, columns) may lie beside a CPU's blocks: half of SHARE, or those of one block."""
    return tokens <= _ON_CPU[0] or 2 * columns <= SHARE * words


def choose_whole_rows(tokens: int, words: int, row: int, device: torch.device, *, decoded: bool) -> Blocks:
    """Blocks of tokens whose logits of all words lie in memory at once.

    Args:
        row: bytes of a token's logits.
        decoded: whether the weight is decoded, a chunk of words at a time.
    """
    on_cpu = kind_of(device) == "cpu"
    most, least = _WHOLE_ROWS_ON_CPU if on_cpu else _WHOLE_ROWS
    width = _DECODED["cpu" if on_cpu else "cuda"] if decoded else words
    return Blocks(_even(tokens, max(most // row, least)), min(width, words))


def _even(count: int, most: int) -> int:
    """The size of parts of `count`, about equal, of at most `most`; a multiple of 64 where there are several."""
    if count <= most:
        return max(count, 1)
    size = -(-count // -(-count // most))
    return min(most, -(-size // 64) * 64)
