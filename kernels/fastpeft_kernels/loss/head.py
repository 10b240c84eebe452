"""What a loss over a vocabulary is computed from: the head, and how its logits become a loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..weights import FrozenWeight


@dataclass(frozen=True, eq=False, slots=True)
class Head:
    """The linear map onto words: z = cap(scale * (h W^T + s B^T + bias)), with cap(x) = softcap * tanh(x / softcap).

    The low-rank update comes as a product of its own, s B^T, so that whatever makes s of the hidden states (an
    adapter's A, its scaling, its dropout; several adapters side by side) is the caller's, and its gradients autograd's.

    Attributes:
        weight: (words, hidden_size): a FrozenWeight, which gets no gradient, or a floating tensor, which gets one where
            it requires it.
        bias: (words,) or None; may be trained.
        s: (..., rank), as the hidden states but for the last size, any floating dtype; or None without an update.
        b: (words, rank), multiplied in the dtype of s; None when, and only when, s is.
        scale: factor of the logits before the cap (Cohere's and Granite's models have one).
        softcap: bound of the logits (Gemma 2: 30), or None.
    """

    weight: FrozenWeight | Tensor
    bias: Tensor | None = None
    s: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def words(self) -> int:
        return int(self.weight.shape[0])


@dataclass(frozen=True, eq=False, slots=True)
class Teacher:
    """Whose distribution a student is to have: hidden states under a head. Neither gets a gradient.

    Attributes:
        hidden: (..., teacher_size), one for each of the student's hidden states, any floating dtype.
        head: onto the student's words.
    """

    hidden: Tensor
    head: Head


@dataclass(frozen=True, eq=False, slots=True)
class TopLogits:
    """A teacher of which only the largest logits of each token are stored: its probabilities are theirs, and sum to 1.

    All other words have probability zero. Adding a number to all logits of a token changes nothing, so logarithms of
    probabilities serve too.

    Attributes:
        logits: (..., k), floating, k in [1, words].
        words: (..., k) int64, the words that they belong to; those of one token distinct.
    """

    logits: Tensor
    words: Tensor


@dataclass(frozen=True, slots=True)
class Options:
    """How the logits z of one token and its label y become its loss, all in fp32 (fp64 in fp64).

        loss = (1 - e) c[y] (lse - z[y]) + e / words * sum_v c[v] (lse - z[v]) + z_loss * lse^2

    with e = label_smoothing, c = class_weight (ones where None) and lse = logsumexp(z).

    Attributes:
        ignore_index: label of tokens without a loss; theirs is zero, and so is their gradient.
        label_smoothing: e, in [0, 1].
        z_loss: factor of lse^2, >= 0 (PaLM).
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
