"""The definition: its gradients, and what transformers' classes compute, to the bit."""

from __future__ import annotations

import pytest
import torch

from fastpeft_kernels.norm.form import gated_form, rms_form
from fastpeft_kernels.norm.reference import norm_reference
from tests.budget import assert_within_budget

from .conftest import KINDS, Case, make_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    case = make_case(kind, (3, 5), torch.float64).leaves()
    names = list(case.tensors())
    assert torch.autograd.gradcheck(
        lambda *given: Case(kind, **{"bias": None, **dict(zip(names, given, strict=True))}).plain(),
        tuple(case.tensors().values()),
    )


@pytest.mark.parametrize(
    ("module", "name", "offset", "rounding"),
    [
        ("llama", "LlamaRMSNorm", 0.0, "input"),
        ("qwen3", "Qwen3RMSNorm", 0.0, "input"),
        ("t5", "T5LayerNorm", 0.0, "weight"),
        ("olmo2", "Olmo2RMSNorm", 0.0, "once"),
        ("gpt_oss", "GptOssRMSNorm", 0.0, "once"),
        ("gemma", "GemmaRMSNorm", 1.0, "once"),
        ("gemma3", "Gemma3RMSNorm", 1.0, "once"),
    ],
)
def test_the_bits_of_transformers(module: str, name: str, offset: float, rounding: str) -> None:
    models = pytest.importorskip("transformers.models")
    norm = getattr(getattr(models, module), f"modeling_{module}").__dict__[name](24)
    norm.weight.data.normal_()
    for weight in DTYPES:
        norm.to(weight)
        for dtype in DTYPES:
            x = torch.randn(5, 24).to(dtype)
            form = rms_form(dtype, weight, 1e-6, offset, rounding)
            assert torch.equal(norm(x), norm_reference(x, norm.weight, None, form))


@pytest.mark.parametrize(
    ("module", "name", "given", "norm_before_gate", "activation", "groups"),
    [
        ("qwen3_next", "Qwen3NextRMSNormGated", (24,), True, "silu", 1),
        ("mamba2", "MambaRMSNormGated", (24, 8), False, "silu", 3),
        ("kimi_linear", "KimiLinearRMSNormGated", (24,), True, "sigmoid", 1),
    ],
)
def test_the_bits_of_transformers_gated_ones(
    module: str, name: str, given: tuple[int, ...], norm_before_gate: bool, activation: str, groups: int
) -> None:
    models = pytest.importorskip("transformers.models")
    norm = getattr(getattr(models, module), f"modeling_{module}").__dict__[name](*given)
    norm.weight.data.normal_()
    rounding = "once" if activation == "sigmoid" else "input"
    for weight in DTYPES:
        norm.to(weight)
        for dtype in DTYPES:
            x, gate = (torch.randn(2, 5, 24).to(dtype) for _ in range(2))
            form = gated_form(dtype, weight, norm.variance_epsilon, rounding, norm_before_gate, activation, groups)
            ours = norm_reference(x, norm.weight, None, form, gate)
            if activation == "sigmoid":  # of a weight in 16 bits its product is in fp32
                exact = form._replace(middle=None, out=torch.float64)
                wide = norm_reference(x.double(), norm.weight.double(), None, exact, gate.double())
                assert_within_budget(ours, norm(x, gate), wide)
            else:
                assert torch.equal(ours, norm(x, gate))
