"""Logits of the forward pass that take no memory of their own: they lie where the weight's gradient will be."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..common.shapes import kind_of
from .problem import Problem, Tokens, Words

_rooms: WeakValueDictionary[Any, Tensor] = WeakValueDictionary()
"""By the weight's stamp, while it is there."""


class KeptLogits:
    """Raw logits of as many tokens as there is room for: the weight's hidden_size where both are in one dtype.

    Backward needs them once more, chunk by chunk, and of a chunk it is done with them before its rows of the gradient
    are written. So the rows of each chunk of the gradient's memory hold that chunk's logits until then. Distillation,
    which has all of a token's logits at once in forward, keeps the gradients in them.
    """

    def __init__(self, memory: Tensor, problem: Problem, words: int) -> None:
        """
        Args:
            memory: of `room`.
            words: of a chunk of backward.
        """
        self._elements = memory.view(-1).view(problem.dtype)
        self._of_word = memory.shape[1] * memory.dtype.itemsize // problem.dtype.itemsize
        self._words, self._step = memory.shape[0], words
        self.tokens = min(problem.tokens, self._of_word)

    @staticmethod
    def room(problem: Problem) -> Tensor | None:
        """(words, hidden_size) in the weight's dtype, or None.

        That is without tokens, and on a GPU without a quarter as many as features; where no row of it is a row of
        logits' numbers; while a CUDA graph is captured, whose backward may be repeated and spends nothing; while
        another call's is there, since many losses may be made before one backward; and where saved tensors go through
        hooks: what they bring elsewhere or make again, as activation checkpointing does, would lie beside this.
        """
        weight, hooks = problem.weight, torch._C._autograd._top_saved_tensors_default_hooks(True)
        if kind_of(problem.device) != "cpu" and 4 * problem.tokens < weight.shape[1]:
            return None
        if not problem.tokens or weight.shape[1] * weight.dtype.itemsize % problem.dtype.itemsize:
            return None
        if hooks is not None or (problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return None
        stamp = weight.stamp()
        if stamp in _rooms:
            return None
        _rooms[stamp] = room = torch.empty(weight.shape, dtype=weight.dtype, device=problem.device)
        return room

    def put(self, raw: Tensor, tokens: Tokens, word: int) -> None:
        """Keeps raw (T, C) of the words from `word` on, as far as there is room for its tokens."""
        count, last = self.count(tokens), word + raw.shape[1]
        for first in range(word // self._step * self._step, last, self._step) if count else ():
            chunk = self._chunk(first, min(first + self._step, self._words))
            start, end = max(first, word), min(first + self._step, last)
            place = chunk[tokens.first : tokens.first + count, start - first : end - first]
            place.copy_(raw[:count, start - word : end - word])

    def take(self, raw: Tensor, tokens: Tokens, words: Words) -> int:
        """Puts back into raw (T, C) what was kept of a chunk of backward: so many of its first tokens."""
        count = self.count(tokens)
        if count:
            raw[:count].copy_(self._chunk(words.first, words.last)[tokens.first : tokens.first + count])
        return count

    def count(self, tokens: Tokens) -> int:
        """How many of a block's tokens it has, the first ones."""
        return max(0, min(tokens.last, self.tokens) - tokens.first)

    def _chunk(self, first: int, last: int) -> Tensor:
        """(tokens, last - first), in the rows first..last - 1 of the memory."""
        elements = self._elements[first * self._of_word :][: self.tokens * (last - first)]
        return elements.view(self.tokens, last - first)
