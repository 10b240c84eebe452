"""Norms with a gate: recognised on the instance, proved, computed in one pass; the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

import fastpeft
from fastpeft.bench.matrix.families import FAMILIES, batch
from fastpeft.layers import norm as norm_layer
from fastpeft.layers.norm import FEW, FastNorm
from fastpeft.layers.norm_proof import proved
from fastpeft.layers.norm_structure import Norm, candidates
from tests.budget import assert_within_budget
from tests.integration.models import with_lora
from tests.integration.steps import assert_step_close, step, truth

WIDTH = 48
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# name: the module, and what it computes: rounding, whether the norm comes first, activation, groups
FORMS: dict[str, tuple[Any, tuple[str, bool, str, int]]] = {
    "qwen3_next": (lambda: Qwen3NextRMSNormGated(WIDTH), ("input", True, "silu", 1)),
    "kimi_linear": (lambda: KimiLinearRMSNormGated(WIDTH), ("once", True, "sigmoid", 1)),
    "mamba2": (lambda: MambaRMSNormGated(WIDTH, 16), ("input", False, "silu", 3)),
    "falcon_h1": (lambda: FalconH1RMSNormGated(WIDTH, n_groups=2, norm_before_gate=False), ("once", False, "silu", 2)),
    "falcon_h1 first": (lambda: FalconH1RMSNormGated(WIDTH, n_groups=4), ("once", True, "silu", 4)),
}
every_form = pytest.mark.parametrize("name", FORMS)
pytestmark = pytest.mark.usefixtures("however_few")


@pytest.fixture
def however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_layer, "FEW_ON_CPU", dict.fromkeys(DTYPES, 0))
    monkeypatch.setattr(norm_layer, "FEW_GATED_ON_CPU", 0)


def norm_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    made: nn.Module = FORMS[name][0]()
    nn.init.normal_(made.weight)  # type: ignore[arg-type]
    return made.to(dtype)


def fast(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return fastpeft.accelerate(nn.ModuleDict({"norm": norm_of(name, dtype)}))["norm"]


def derived(module: Any, x: Tensor, gate: Tensor, dy: Tensor) -> list[Tensor]:
    """The result, and the gradients of x, gate and weight."""
    leaves = [t.clone().requires_grad_() for t in (x, gate)]
    y = module(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *module.parameters()], dy.to(y.dtype))]


@every_form
def test_recognised_by_what_it_computes(name: str) -> None:
    module = norm_of(name, torch.bfloat16)
    found = proved(module, candidates(module))
    rounding, *gate = FORMS[name][1]
    assert isinstance(found, Norm) and found.op == "gated_rms_norm"
    assert (found.norm_before_gate, found.activation, found.groups) == tuple(gate)
    assert found.rounding == rounding or name.startswith("falcon")  # which keeps a product in bf16 somewhere between


@every_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    ours = fast(name, dtype)
    theirs = fastpeft.restore(copy.deepcopy(ours))
    assert isinstance(ours, FastNorm) and not isinstance(theirs, FastNorm)
    wide = copy.deepcopy(theirs).double()
    x, gate, dy = (torch.randn(3, 40, WIDTH).to(dtype) for _ in range(3))
    exact = derived(wide, x.double(), gate.double(), dy.double())  # it rounds to fp32, which is nothing beside 16 bits
    for what, a, b, c in zip(
        ("y", "dx", "dgate", "dweight"), derived(ours, x, gate, dy), derived(theirs, x, gate, dy), exact, strict=True
    ):
        if dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=what)
        else:
            assert_within_budget(a, b, c.double(), what)
    assert ours.fastpeft_calls == {"fused": 1}


def test_calls_that_are_left_to_the_module() -> None:
    module = fast("mamba2")
    x = torch.randn(4, WIDTH)
    torch.testing.assert_close(module(x), fastpeft.restore(copy.deepcopy(module))(x))
    module(x, gate=x)
    module(x, None)
    module(x, x.double())
    module(x, x.bfloat16())
    assert module.fastpeft_calls == {
        "called with other arguments than x and gate": 2,
        "an input of type NoneType": 1,
        "a gate of (4, 48) in torch.float64": 1,
        "fused": 1,
    }


def test_few_numbers_on_a_cpu_are_the_module_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    module = fast("mamba2")
    module(*torch.randn(2, 4, WIDTH))
    assert module.fastpeft_calls == {FEW: 1}


@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpointing(reentrant: bool) -> None:
    module = fast("qwen3_next")
    x, gate = (torch.randn(4, WIDTH, requires_grad=True) for _ in range(2))
    wanted = torch.autograd.grad(module(x, gate).square().sum(), [x, gate, module.weight])
    checkpoint(module, x, gate, use_reentrant=reentrant).square().sum().backward()
    for got, want in zip((x.grad, gate.grad, module.weight.grad), wanted, strict=True):
        assert torch.equal(got, want)


def test_compiled_it_is_the_module_s_own() -> None:
    module = fast("qwen3_next")
    x, gate = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, gate), Qwen3NextRMSNormGated.forward(module, x, gate))
    assert not hasattr(module, "fastpeft_calls")


@pytest.mark.parametrize("name", ("qwen3_next", "bamba"))
def test_whole_models(name: str) -> None:
    base: Any = FAMILIES[name].build()
    getattr(base, "set_experts_implementation", lambda name: None)("eager")  # the others multiply in no fp64
    model = with_lora(base, None)
    given = batch(base)
    theirs, exact = step(model, given), truth(model, given)
    fastpeft.accelerate(model)
    assert_step_close(step(model, given), theirs, exact)
    rows = [row for row in fastpeft.report(model).rows if row.op == "gated_rms_norm"]
    assert rows and {row.note for row in rows} == {""}
    assert fastpeft.verify(model).passed
    assert not [m for m in fastpeft.restore(model).modules() if isinstance(m, FastNorm)]
