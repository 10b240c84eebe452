"""Hidden states, heads and labels of random numbers, held to the error of the definition in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels.loss import Head, LinearLoss, Options, linear_cross_entropy
from fastpeft_kernels.loss.reference import entropy_reference, logits_reference, mean_reference, token_losses_reference
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.weights import DenseWeight, FourBitWeight, FrozenWeight
from tests.budget import assert_within_budget

HEADS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "bias": {"bias": True},
    "low_rank": {"rank": 3},
    "four_bit": {"storage": "four_bit"},
    "four_bit_low_rank": {"storage": "four_bit", "rank": 2, "bias": True},
    "trained": {"frozen": False},
    "trained_bias": {"frozen": False, "bias": True},
    "trained_low_rank": {"frozen": False, "rank": 3, "bias": True},
    "low_rank_alone": {"storage": "four_bit", "frozen": False, "rank": 3},
    "trained_weight_alone": {"frozen": False, "hidden_trained": False},
}
"""Of `make_case`."""
TRAINED = ("hidden", "weight", "bias", "s", "b", "token_weight")


@dataclass
class Case:
    """A call of `linear_cross_entropy`, its tensors apart.

    Attributes:
        stored: the weight where it is no tensor of `tensors`.
        options: what goes to the call as it is, class_weight among it.
    """

    tensors: dict[str, Tensor]
    labels: Tensor
    stored: FrozenWeight | None = None
    scale: float = 1.0
    softcap: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def head(self) -> Head:
        get = self.tensors.get
        weight = self.stored if self.stored is not None else self.tensors["weight"]
        return Head(weight, get("bias"), get("s"), get("b"), self.scale, self.softcap)

    def call(self, **more: Any) -> LinearLoss:
        tensors, options = self.tensors, {**self.options, **more}
        return linear_cross_entropy(
            tensors["hidden"], self.head(), self.labels, token_weight=tensors.get("token_weight"), **options
        )

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers as leaves in another dtype."""
        return replace(
            self,
            tensors={
                name: x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)
                for name, x in self.tensors.items()
            },
        )

    def logits(self) -> Tensor:
        return logits_reference(self.tensors["hidden"], self.head())

    def definition(self) -> LinearLoss:
        """Losses of each token, and all else, of all logits at once."""
        plain = {name: self.options.get(name, 0.0) for name in ("label_smoothing", "z_loss")}
        class_weight, token_weight = self.options.get("class_weight"), self.tensors.get("token_weight")
        logits = self.logits().flatten(0, -2)
        labels = self.labels.flatten()
        losses = token_losses_reference(logits, labels, Options(**plain), class_weight)
        if token_weight is not None:
            losses = losses * token_weight.flatten()
        counted, shape = labels != -100, self.labels.shape
        entropy = torch.where(counted, entropy_reference(logits.detach()), 0.0)
        return LinearLoss(
            losses.view(shape),
            -token_losses_reference(logits, labels).view(shape),
            entropy.view(shape),
            ((logits.argmax(-1) == labels) & counted).view(shape),
            torch.where(counted, mean_reference(logits.detach()), 0.0).view(shape)
            if self.everything["mean_logits"]
            else None,
        )

    @property
    def everything(self) -> dict[str, bool]:
        """All that may be wanted beside the loss."""
        mean = not ("class_weight" in self.options and self.options.get("label_smoothing"))
        return {"log_probs": True, "entropy": True, "correct": True, "mean_logits": mean}

    def gradients(self, out: LinearLoss, given: Tensor, given_log: Tensor | None) -> dict[str, Tensor]:
        wanted = {name: x for name, x in self.tensors.items() if x.requires_grad}
        outs, gradients = [out.loss], [given.to(out.loss.dtype)]
        if given_log is not None and out.log_probs is not None:
            outs.append(out.log_probs)
            gradients.append(given_log.to(out.loss.dtype))
        return dict(zip(wanted, torch.autograd.grad(outs, list(wanted.values()), gradients), strict=True))


def make_case(
    *lead: int,
    features: int = 16,
    words: int = 24,
    dtype: torch.dtype = torch.float32,
    frozen: bool = True,
    storage: str = "dense",
    rank: int = 0,
    bias: bool = False,
    token_weight: bool = False,
    class_weight: bool = False,
    ignored: float = 0.3,
    hidden_trained: bool = True,
    size: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    **options: Any,
) -> Case:
    """Logits of about `size`.

    Args:
        lead: sizes before the features.
        frozen: only hidden, s and token_weight are trained.
        storage: "dense" or "four_bit" for a frozen weight.
    """
    weight = torch.randn(words, features) * size / features**0.5
    tensors = {"hidden": torch.randn(*lead, features)}
    trained = {"hidden"} if hidden_trained else set()
    stored: FrozenWeight | None = None
    if storage == "four_bit":
        stored = FourBitWeight(encode_4bit(weight.to(torch.float32 if dtype == torch.float64 else dtype)))
    elif frozen:
        stored = DenseWeight(weight.to(dtype))
    else:
        tensors["weight"] = weight
    if bias:
        tensors["bias"] = torch.randn(words)
    if rank:
        tensors |= {"s": torch.randn(*lead, rank), "b": torch.randn(words, rank) / rank**0.5}
        trained.add("s")
    if token_weight:
        tensors["token_weight"] = torch.rand(*lead)
        trained.add("token_weight")
    if not frozen:
        trained |= {"weight", "bias", "b"}
    if class_weight:
        options["class_weight"] = torch.rand(words) + 0.5
    labels = torch.randint(0, words, lead)
    labels[torch.rand(lead) < ignored] = -100
    leaves = {name: x.to(dtype).requires_grad_(name in trained) for name, x in tensors.items()}
    return Case(leaves, labels, stored, scale, softcap, options)


def hold(case: Case) -> None:
    """Fails unless losses, log-probabilities, entropy and all gradients are within the budget, and hits are right."""
    dtype = case.tensors["hidden"].dtype
    copies = {name: x.detach().clone() for name, x in case.tensors.items()}
    given, given_log = torch.randn(case.labels.shape), torch.randn(case.labels.shape)
    kept = given.clone(), given_log.clone()
    out = case.call(reduction="none", **case.everything)
    ours = results(out) | case.gradients(out, given, given_log)
    plain = {}
    for name, other in (("same", dtype), ("exact", torch.float64)):
        again = case.to(other)
        found = again.definition()
        plain[name] = results(found) | again.gradients(found, given, given_log)
    for name, value in ours.items():
        assert_within_budget(value, plain["same"][name], plain["exact"][name], f"{name} of {describe(case)}")
    for name, x in case.tensors.items():
        assert torch.equal(x, copies[name]), f"{name} was written into"
    assert torch.equal(given, kept[0]) and torch.equal(given_log, kept[1]), "a gradient was written into"


def results(out: LinearLoss) -> dict[str, Tensor]:
    found = {"loss": out.loss, "log_probs": out.log_probs, "entropy": out.entropy, "mean_logits": out.mean_logits}
    return {name: x for name, x in found.items() if x is not None}


def describe(case: Case) -> str:
    trained = [name for name, x in case.tensors.items() if x.requires_grad]
    return (
        f"{case.tensors['hidden'].dtype} {tuple(case.tensors['hidden'].shape)}, {case.head().words} words, "
        f"trained {trained}, scale {case.scale}, softcap {case.softcap}, {sorted(case.options)}"
    )
