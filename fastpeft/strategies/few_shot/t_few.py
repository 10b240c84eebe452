"""T-Few: answers of several tokens, ranked; what is wrong is made unlikely (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .pattern_tuning import PatternTuning
from .worded import answer_log_probabilities, mean_of


class TFew(PatternTuning):
    """Language-modelling, unlikelihood and length-normalised losses, summed, over (IA)³."""

    tasks: ClassVar[tuple[str, ...]] = ("seq2seq-lm", "causal-lm")
    whole: ClassVar[bool] = True
    adapter: ClassVar[str] = "ia3"

    def loss(self, model: Any, tokenizer: Any, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        task, tokens = self.classifier.pattern.task, self.classifier.tokens
        found, mask = answer_log_probabilities(model, tokenizer, batch, tokens, task)
        return t_few_loss(found, mask, labels)


def t_few_loss(log_probabilities: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """The mean over rows of T-Few's loss.

    The right answer's cross-entropy a token; -log(1 - p) of the wrong answers' tokens, a token; and the cross-entropy
    of the softmax over answers of their mean log-probabilities a token.

    Args:
        log_probabilities: (rows, answers, tokens).
        mask: (answers, tokens), true where an answer has a token.
        labels: (rows,) numbers of the right answers.
    """
    means = mean_of(log_probabilities, mask)
    right = -means.gather(1, labels[:, None]).squeeze(1)
    wrong = mask & (torch.arange(mask.shape[0], device=labels.device) != labels[:, None])[..., None]
    unlikely = torch.log1p(-log_probabilities.exp().clamp(max=1 - 1e-6)).masked_fill(~wrong, 0)
    unlikelihood = -unlikely.sum((1, 2)) / wrong.sum((1, 2)).clamp(min=1)
    normalised = torch.nn.functional.cross_entropy(means, labels, reduction="none")
    return (right + unlikelihood + normalised).mean()
