"""Which keys a query of a case sees, and what happens to the scores."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch

_DOCUMENTS = (2, 4, 8, 8)
"""Of which parts of a row the documents are that are packed in it."""


class Kind(NamedTuple):
    """The mask and the scores of a case.

    Attributes:
        left, right: how many keys before and behind its own position a query sees; None for all.
        padded: rows of different length, padded on the right, the last to nearly twice its tokens.
        holes: a run of padding within each row too, the last row's the longest.
        documents: several packed in each row.
        softcap: bound of the scores.
        added: to the scores, and trained: "relative" by distance, for each head, as T5 has it; "bias" for each head,
            query and key.
    """

    name: str
    left: int | None = None
    right: int | None = None
    padded: bool = False
    holes: bool = False
    documents: bool = False
    softcap: float | None = None
    added: str | None = None

    @property
    def plain(self) -> bool:
        """Whether all is seen, or all that is causal, and nothing else happens."""
        return not (self.padded or self.documents or self.softcap or self.added) and self.left is None

    def mask(self, batch: int, tokens: int, device: str) -> Any:
        """The `Mask` of fastpeft_kernels, of padding as models that our mask function serves hand it on."""
        from fastpeft_kernels.attention import Mask, packed

        from ...integrations.attention_masks import decoded, encoded

        if self.padded and self.right is not None:
            stop = torch.arange(tokens, device=device)[None] + self.right + 1
            made = encoded(torch.zeros_like(stop), stop, self.seen(batch, tokens, device), batch, tokens)
            return decoded(made, tokens, tokens)[0]
        if self.padded:
            return Mask(keys=self.seen(batch, tokens, device))
        if self.documents:
            return packed(torch.tensor(boundaries(tokens), device=device, dtype=torch.int32), tokens)
        return Mask(self.left, self.right)

    def seen(self, batch: int, tokens: int, device: str = "cpu") -> torch.Tensor:
        """bool (batch, tokens), False for padding. The first token of each row is none."""
        if not self.padded:
            return torch.ones((batch, tokens), dtype=torch.bool, device=device)
        place = torch.arange(tokens, device=device)
        seen = place < torch.tensor(lengths(batch, tokens), device=device)[:, None]
        if self.holes:
            hole = (place - tokens // 4)[None]
            longest = torch.arange(1, batch + 1, device=device)[:, None] * (tokens // (8 * batch))
            seen &= (hole < 0) | (hole >= longest)
        return seen

    def pairs(self, batch: int, tokens: int) -> int:
        """Query and key that see one another, in all rows."""
        place = torch.arange(tokens)
        first = torch.zeros_like(place) if self.left is None else (place - self.left).clamp(min=0)
        stop = torch.full_like(place, tokens) if self.right is None else (place + self.right + 1).clamp(max=tokens)
        if self.documents:
            edges = torch.tensor(boundaries(tokens))
            document = torch.bucketize(place, edges[1:], right=True)
            first, stop = torch.maximum(first, edges[document]), torch.minimum(stop, edges[document + 1])
        before = torch.nn.functional.pad(self.seen(batch, tokens).cumsum(1), (1, 0))
        return int((before[:, stop] - before[:, first]).sum())

    def added_shape(self, heads: int, tokens: int) -> tuple[int, ...]:
        return (heads, 2 * tokens - 1) if self.added == "relative" else (1, heads, tokens, tokens)

    def added_elements(self, heads: int, tokens: int) -> int:
        return prod(self.added_shape(heads, tokens)) if self.added else 0


def lengths(batch: int, tokens: int) -> list[int]:
    """Of padded rows: the first is full."""
    return [tokens - tokens * row // (2 * batch) for row in range(batch)]


def boundaries(tokens: int) -> list[int]:
    """Where each packed document begins, and the end of the last."""
    edges = [0]
    for part in _DOCUMENTS[:-1]:
        edges.append(edges[-1] + tokens // part)
    return [*edges, tokens]


def window(keys: int, both: bool = False) -> Kind:
    """Each query sees so many keys at the most, the last of them its own; or as many on both sides of its own."""
    return Kind(f"window of {keys}{' each way' if both else ''}", left=keys - 1, right=keys - 1 if both else 0)


CAUSAL = Kind("causal", right=0)
PADDED = Kind("padded", padded=True)
PADDED_CAUSAL = Kind("causal, padded", right=0, padded=True)
HOLES = Kind("causal, padded with holes", right=0, padded=True, holes=True)
DOCUMENTS = Kind("documents", right=0, documents=True)
SOFTCAP = Kind("causal, soft cap 50", right=0, softcap=50.0)
RELATIVE = Kind("bias by distance", added="relative")
BIAS = Kind("trained bias", added="bias")
