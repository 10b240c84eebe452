"""The definition: what the names mean, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch

from fastpeft_kernels.activation import KINDS
from fastpeft_kernels.activation.reference import ACTIVATIONS, gated_activation_reference

every_kind = pytest.mark.parametrize("kind", KINDS)


def test_every_kind_is_defined() -> None:
    assert tuple(ACTIVATIONS) == KINDS


@every_kind
@pytest.mark.parametrize("gated", (True, False))
def test_gradcheck(kind: str, gated: bool) -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda gate, up: gated_activation_reference(gate if gated else None, up, kind), (gate, up))


def test_against_the_formulas() -> None:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    formulas = {
        "silu": lambda x: x * sigmoid(x),
        "gelu": lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda x: max(x, 0.0),
        "quick_gelu": lambda x: x * sigmoid(1.702 * x),
        "relu2": lambda x: max(x, 0.0) ** 2,
    }
    gate, up = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    for kind, formula in formulas.items():
        want = gate.clone().apply_(formula)
        torch.testing.assert_close(gated_activation_reference(gate, up, kind), want * up)
        torch.testing.assert_close(gated_activation_reference(None, gate, kind), want)


@every_kind
def test_the_names_mean_what_transformers_means(kind: str) -> None:
    activations = pytest.importorskip("transformers.activations")
    name = {"gelu_tanh": "gelu_pytorch_tanh"}.get(kind, kind)
    x = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(gated_activation_reference(None, x, kind), activations.ACT2FN[name](x))
