"""A batch's loss token by token, without logits where the model is accelerated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.data.chat import IGNORED
from fastpeft.layers.head import logits_for_a_loss
from fastpeft.layers.lazy_logits import LazyLogits, plain
from fastpeft_kernels.loss import Head, Teacher, kl_divergence, linear_distillation

TASKS = ("causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification", "token-classification")
"""Whose loss is a cross-entropy of labels."""


class Tokens(NamedTuple):
    """Of one batch, (tokens,) each; a text's class counts as one token.

    Attributes:
        nll: minus the logarithm of each label's probability; zero where there is none. Differentiable.
        counted: whether there is a label.
        rows: number of the row that it belongs to, of packed rows the number of the text.
        divergence: KL(starting model || model), zero where there is no label; None unless asked for. Differentiable.
    """

    nll: Tensor
    counted: Tensor
    rows: Tensor
    divergence: Tensor | None = None

    def row_losses(self) -> Tensor:
        """(rows,) mean of each row's tokens, without a graph; rows without a label have 0."""
        count = int(self.rows.max()) + 1
        sums, counts = (
            torch.zeros(count, dtype=torch.float32, device=self.nll.device).index_add_(0, self.rows, values.float())
            for values in (self.nll.detach(), self.counted)
        )
        return sums / counts.clamp(min=1)


def token_losses(model: Any, inputs: dict[str, Any], task: str, *, anchored: bool = False) -> Tokens:
    """What a model's own loss is the mean of.

    Of an accelerated model, cross-entropy and divergence are `linear_cross_entropy` and `linear_distillation`.

    Args:
        model: a PEFT model, in training mode.
        inputs: of its forward, with labels.
        task: one of TASKS.
        anchored: the divergence from the base is wanted too.
    """
    inputs = dict(inputs)
    labels, shifted = inputs.pop("labels"), inputs.pop("shift_labels", None)
    inputs.pop("num_items_in_batch", None)
    if task == "causal-lm":
        inputs["use_cache"] = False
        labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if shifted is None else shifted
    elif task == "seq2seq-lm":
        inputs.setdefault("decoder_input_ids", _shifted_right(model, labels))
    wanted = labels.reshape(-1)
    with logits_for_a_loss(model):
        logits = _flat(model(**inputs).logits, wanted)
        nll = F.cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORED)
        divergence = _divergence(model, inputs, logits, wanted) if anchored else None
    return Tokens(nll, wanted != IGNORED, _rows(labels, inputs), divergence)


def _flat(logits: Tensor, labels: Tensor) -> Tensor:
    """(tokens, words) in fp32, as models compute their loss."""
    return logits.reshape(labels.numel(), logits.shape[-1]).float()


def _rows(labels: Tensor, inputs: dict[str, Any]) -> Tensor:
    if labels.dim() == 1:
        return torch.arange(len(labels), device=labels.device)
    positions = inputs.get("position_ids")
    if positions is not None and labels.shape[0] == 1:  # packed, without padding
        return (positions.reshape(-1) == 0).cumsum(0) - 1
    return torch.arange(len(labels), device=labels.device).repeat_interleave(labels.shape[1])


def _shifted_right(model: Any, labels: Tensor) -> Tensor:
    base = model.get_base_model()
    prepare = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    return base._shift_right(labels) if prepare is None else prepare(labels=labels)


def _divergence(model: Any, inputs: dict[str, Any], logits: Tensor, labels: Tensor) -> Tensor:
    counted, training = labels != IGNORED, model.training
    model.eval()  # the base drops nothing, and draws no random numbers
    try:
        with torch.no_grad(), _adapter_off(model):
            teacher = _flat(model(**inputs).logits, labels)
    finally:
        model.train(training)
    if isinstance(logits, LazyLogits) and isinstance(teacher, LazyLogits) and _lazy(logits) and _lazy(teacher):
        hidden, head = _hidden_and_head(logits)
        given = Teacher(*_hidden_and_head(teacher))
        return linear_distillation(hidden, head, given, mask=counted, reduction="none").loss
    return kl_divergence(plain(logits), plain(teacher).detach(), mask=counted, reduction="none")


@contextmanager
def _adapter_off(model: Any) -> Iterator[None]:
    """PEFT's `disable_adapter` leaves all adapters trained, frozen ones too."""
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with model.disable_adapter():
        yield
    for parameter, trained in parameters:
        parameter.requires_grad_(trained)


def _lazy(logits: LazyLogits) -> bool:
    return logits.family.lazy and logits.trail.serves


def _hidden_and_head(logits: LazyLogits) -> tuple[Tensor, Head]:
    """(tokens, hidden_size) and what maps them onto these logits."""
    call, trail = logits.family.call, logits.trail
    bias = call.bias
    for added in trail.biases:
        more = added.tensor.reshape(call.words)
        bias = more if bias is None else bias + more
    s = None if call.s is None else trail.rows_of(call.s)
    return trail.rows_of(call.hidden), Head(call.weight, bias, s, call.b, trail.head_scale, trail.softcap)
