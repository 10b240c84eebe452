"""One call of a head: all that its logits, or a loss over them, are computed from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft_kernels.common.device import autocast_dtype, autocast_off, product_dtype
from fastpeft_kernels.common.shapes import kind_of
from fastpeft_kernels.loss import Head, linear_cross_entropy
from fastpeft_kernels.weights import FrozenWeight

if TYPE_CHECKING:
    from .lazy_steps import Trail

FEW = "few on a CPU"
FEW_ON_CPU = 1 << 19
"""Logits up to which a model's step takes less time on a CPU with them than without."""
FEW_SLOW_ON_CPU = 1 << 15
"""Likewise in 16 bits, where the CPU has no instructions to multiply these: ours are products in fp32."""

logger = logging.getLogger("fastpeft")

SAMPLE = 4096
"""Elements of a trained parameter that are kept to see whether it has been trained on: fused optimizers and writes
through `.data` leave no other sign."""


class LossCalls:
    """Hooks on a model that tell its head whether labels came, and what became of the head's calls since.

    Holds no module, so that a copy of the head alone takes nothing else along.

    Attributes:
        labelled: how many calls with labels are going on.
        outcomes: number of calls by outcome, "fused" or why all logits were made.
        records: gets what each loss is computed from, where somebody keeps it.
        compiled: whether torch.compile traced a call with labels, which makes logits and is not counted.
        entropy_is_trained: whether a gradient of an entropy was asked for, which ours computes by another function.
    """

    def __init__(self) -> None:
        self.labelled = 0
        self.outcomes: dict[str, int] = {}
        self.noted = False
        self.compiled = False
        self.records: list[Recorded] | None = None
        self.entropy_is_trained = False

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if kwargs.get("labels") is None:
            return
        if not torch.compiler.is_compiling():
            self.labelled += 1
        elif not kwargs.get("fused_lm_head"):  # else TRL's own function, without logits
            self.compiled = True

    def leave(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook, called after an exception too."""
        if not torch.compiler.is_compiling() and kwargs.get("labels") is not None and self.labelled:
            self.labelled -= 1

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def served(self) -> None:
        """A loss was computed without logits."""
        self.count("fused")

    def asked_for(self, asked_by: str, served: bool) -> None:
        """Somebody reads logits: after their loss, or in its place."""
        if served and "fused" in self.outcomes:
            self.outcomes["fused"] -= 1
        self.count(f"logits asked for {'after' if served else 'before'} a loss, by {asked_by}")
        self._note(f"logits of a call with labels are made, asked for by {asked_by}")

    def hooked_late(self, what: str) -> None:
        """A hook on logits whose loss is computed."""
        self._note(f"{what}: no gradient reaches these logits, their loss was computed from the hidden states")

    def _note(self, text: str) -> None:
        if not self.noted:
            self.noted = True
            logger.info("%s; fastpeft.accelerate(model, loss=False) makes logits in every call", text)


@dataclass(eq=False)
class HeadCall:
    """A head's input and its parts, as they are at its call.

    Attributes:
        hidden: (..., hidden_size) in the dtype of the product.
        weight: (words, hidden_size); a parameter where it is trained.
        bias: (words,) or None.
        s, b: (..., rank) and (words, rank), the adapters' update s b^T; both or neither.
        out: dtype of the logits.
        calls: told what becomes of this one.
    """

    hidden: Tensor
    weight: FrozenWeight | Tensor
    bias: Tensor | None
    s: Tensor | None
    b: Tensor | None
    out: torch.dtype
    calls: LossCalls
    _seen: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._seen = self._signs()

    @property
    def words(self) -> int:
        return int(self.weight.shape[0])

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What may want a gradient."""
        weight = None if isinstance(self.weight, FrozenWeight) else self.weight
        return self.hidden, weight, self.bias, self.s, self.b

    def logits(self) -> Tensor:
        """(..., words) in `out`, without a graph.

        Raises:
            RuntimeError: the head is no longer what it was when it was called.
        """
        self.check_unchanged()
        with torch.no_grad(), autocast_off(self.device):
            h, bias = self.hidden, self.bias
            y = self.weight.linear(h.flatten(0, -2)) if isinstance(self.weight, FrozenWeight) else None
            if y is None:
                y = F.linear(h, self.values(h.dtype), None if bias is None else bias.to(h.dtype))
            else:
                y = y.view(*h.shape[:-1], self.words)
                y = y if bias is None else y + bias
            if self.s is not None and self.b is not None:
                y = y + F.linear(self.s, self.b.to(self.s.dtype))
            return y.to(self.out)

    def gradients(
        self, dlogits: Tensor, saved: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Of `inputs`, given that of the logits (..., words)."""
        hidden, weight, bias, s, b = saved
        assert hidden is not None
        dz = dlogits.reshape(-1, self.words)
        dh: Tensor | None = None
        with autocast_off(self.device):
            if needed[0]:
                d = dz.to(hidden.dtype)
                dh = self.weight.linear_t(d) if isinstance(self.weight, FrozenWeight) else None
                dh = d @ self.values(hidden.dtype) if dh is None else dh
                dh = dh.view(hidden.shape)
            dw = (dz.to(hidden.dtype).t() @ hidden.reshape(-1, hidden.shape[-1])) if needed[1] else None
            db = ds = None
            if s is not None and b is not None:
                d = dz.to(s.dtype)
                ds = (d @ b.to(s.dtype)).view(s.shape) if needed[3] else None
                db = d.t() @ s.reshape(-1, s.shape[-1]) if needed[4] else None
            return (
                dh,
                None if dw is None or weight is None else dw.to(weight.dtype),
                dz.sum(0).to(bias.dtype) if bias is not None and needed[2] else None,
                ds,
                None if db is None or b is None else db.to(b.dtype),
            )

    def loss(self, trail: Trail, labels: Tensor, **options: Any) -> Tensor:
        """F.cross_entropy of what `trail` has made of the logits, (tokens, words), in its dtype or autocast's.

        Args:
            trail: what was done with the logits.
            labels: (tokens,) int64.
            options: keywords of `linear_cross_entropy`.

        Raises:
            RuntimeError: as in `logits`, for losses after the model's call.
        """
        if not self.calls.labelled:
            self.check_unchanged()
        if self.calls.records is not None:
            self.calls.records.append(Recorded(self, trail, labels, options))
        dtype = _loss_dtype(self.device.type, trail.like.dtype, autocast_dtype(self.device))
        hidden, head = self.parts(trail)
        with autocast_off(self.device):
            return linear_cross_entropy(hidden, head, labels, **options).loss.to(dtype)

    def parts(self, trail: Trail) -> tuple[Tensor, Head]:
        """Hidden states (..., hidden_size) and head of what `trail` has made of the logits; differentiable."""
        bias = self.bias
        for added in trail.biases:
            more = added.tensor.reshape(self.words)
            bias = more if bias is None else bias + more
        with autocast_off(self.device):
            s = None if self.s is None else trail.rows_of(self.s)
            return trail.rows_of(self.hidden), Head(self.weight, bias, s, self.b, trail.head_scale, trail.softcap)

    def values(self, dtype: torch.dtype) -> Tensor:
        """(words, hidden_size), without a graph."""
        if isinstance(self.weight, FrozenWeight):
            return self.weight.decode(dtype=dtype)
        return self.weight.detach().to(dtype)

    def _signs(self) -> tuple[Any, ...]:
        weight, parameters = self.weight, self._parameters()
        return (
            weight.stamp() if isinstance(weight, FrozenWeight) else None,
            _version(self.hidden),
            [None if p is None else (p.data_ptr(), _version(p)) for p in parameters],
            [_sample(p) for p in parameters if p is not None and p.requires_grad],
        )

    def check_unchanged(self) -> None:
        """Raise RuntimeError if the head is no longer what it was when it was called."""
        if not self._is_unchanged():
            raise RuntimeError(
                "logits: expected to be read before the head or its input changes, got a change between; "
                "read them earlier, or call fastpeft.accelerate(model, loss=False)"
            )

    def _is_unchanged(self) -> bool:
        frozen = self.weight.flatten()[0] if isinstance(self.weight, FrozenWeight) else ()
        memory = [each for each in (*frozen, *self._parameters()) if each is not None]
        if any(each.untyped_storage().nbytes() == 0 < each.numel() for each in memory):  # FSDP2 frees after backward
            return False
        *signs, samples = self._signs()
        *seen, sampled = self._seen
        return signs == seen and all(torch.equal(now, then) for now, then in zip(samples, sampled, strict=True))

    def _parameters(self) -> Sequence[Tensor | None]:
        return self.bias, self.b, None if isinstance(self.weight, FrozenWeight) else self.weight


@dataclass(frozen=True)
class Recorded:
    """One loss, and what it is computed from; `options` are keywords of `linear_cross_entropy`."""

    call: HeadCall
    trail: Trail
    labels: Tensor
    options: dict[str, Any]

    def again(self, hidden: Tensor) -> Tensor:
        """The same loss of other hidden states (..., hidden_size)."""
        return replace(self.call, hidden=hidden, calls=LossCalls()).loss(self.trail, self.labels, **self.options)


def few_on_cpu(logits: int, x: Tensor) -> bool:
    """Whether so many logits of hidden states are better made."""
    if kind_of(x.device) != "cpu":
        return False
    dtype = autocast_dtype(x.device) or x.dtype
    return logits <= (FEW_ON_CPU if product_dtype(dtype, x.device) == dtype else FEW_SLOW_ON_CPU)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)].clone()


@lru_cache
def _loss_dtype(device: str, dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """What F.cross_entropy returns for logits of a dtype in the present autocast state: tried once."""
    with torch.no_grad():
        label = torch.zeros(1, dtype=torch.int64, device=device)
        return F.cross_entropy(torch.zeros((1, 2), dtype=dtype, device=device), label).dtype
