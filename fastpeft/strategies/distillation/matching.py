"""Inner states: a student's layers are to give what layers of the teacher give (TinyBERT, arXiv 1909.10351)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError

from .options import DistillationOptions

KEY = "strategy.options"


class Matching:
    """Mean squared errors between hidden states, and between attention probabilities, of pairs of layers.

    Where a student's hidden states are smaller or larger than the teacher's, one matrix that all layers share, and that
    is trained beside the adapter, takes them to the teacher's size.

    Args:
        options: with at least one of the weights.
        student, teacher: transformers' configurations.
        seed: of the matrix's first values.

    Attributes:
        pairs: (layer of the student, layer of the teacher), counted from 0.
        projection: from the student's size to the teacher's; None where they are the same.

    Raises:
        UserError: a map that does not fit, or another number of heads.
    """

    def __init__(self, options: DistillationOptions, student: Any, teacher: Any, seed: int) -> None:
        ours, theirs = (config.get_text_config() for config in (student, teacher))
        self._hidden, self._attention = options.hidden_weight, options.attention_weight
        layers = layer_map(options.layer_map, ours.num_hidden_layers, theirs.num_hidden_layers)
        self.pairs = list(enumerate(layers))
        if self._attention and ours.num_attention_heads != theirs.num_attention_heads:
            raise UserError(
                f"{KEY}.attention_weight: expected a teacher with {ours.num_attention_heads} attention heads, as the "
                f"student has, got {theirs.num_attention_heads}; hidden_weight does without"
            )
        self.projection: nn.Linear | None = None
        if self._hidden and ours.hidden_size != theirs.hidden_size:
            self.projection = nn.utils.skip_init(nn.Linear, ours.hidden_size, theirs.hidden_size, bias=False)
            nn.init.orthogonal_(self.projection.weight, generator=torch.Generator().manual_seed(seed))

    @property
    def wanted(self) -> dict[str, bool]:
        """Keywords of a model's call."""
        return {"output_hidden_states": bool(self._hidden), "output_attentions": bool(self._attention)}

    def loss(self, student: Any, teacher: Any, mask: Tensor | None) -> Tensor:
        """0-d, a mean over tokens and pairs of layers, weighted.

        Args:
            student, teacher: what the models' calls gave; hidden_states (layers + 1) of (batch, tokens, hidden_size),
                the first of them the embeddings; attentions (layers) of (batch, heads, tokens, tokens).
            mask: (batch, tokens), 1 for tokens that are no padding; None for all.
        """
        total: Any = 0.0
        if self._hidden:
            total = total + self._hidden * self._mean(self._hidden_error, student, teacher, mask)
        if self._attention:
            total = total + self._attention * self._mean(self._attention_error, student, teacher, mask)
        return total  # type: ignore[no-any-return]

    def _mean(self, error: Any, student: Any, teacher: Any, mask: Tensor | None) -> Tensor:
        return torch.stack([error(student, teacher, ours, theirs, mask) for ours, theirs in self.pairs]).mean()

    def _hidden_error(self, student: Any, teacher: Any, ours: int, theirs: int, mask: Tensor | None) -> Tensor:
        state, wanted = student.hidden_states[ours + 1].float(), teacher.hidden_states[theirs + 1].float()
        if self.projection is not None:
            state = nn.functional.linear(state, self.projection.weight)
        return _mean_of((state - wanted).square().mean(-1), mask)

    def _attention_error(self, student: Any, teacher: Any, ours: int, theirs: int, mask: Tensor | None) -> Tensor:
        errors = (student.attentions[ours].float() - teacher.attentions[theirs].float()).square()
        return _mean_of(errors.mean((1, 3)), mask)


def layer_map(given: list[int] | None, ours: int, theirs: int) -> list[int]:
    """The teacher's layer for each of the student's, counted from 0; the last for the last where nothing is given.

    Raises:
        UserError: another number of layers than the student has, or one that the teacher has not.
    """
    if given is None:
        return [max(0, (number + 1) * theirs // ours - 1) for number in range(ours)]
    if len(given) != ours:
        raise UserError(
            f"{KEY}.layer_map: expected {ours} of the teacher's layers, one for each of the student's, got {len(given)}"
        )
    if wrong := [number for number in given if not 0 <= number < theirs]:
        raise UserError(f"{KEY}.layer_map: expected layers from 0 to {theirs - 1} of the teacher, got {wrong[0]}")
    return given


def _mean_of(values: Tensor, mask: Tensor | None) -> Tensor:
    """Over the tokens (batch, tokens) that are no padding."""
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)
