"""Log-probabilities that TRL's trainers ask a model for, by our op: TRL's own numbers, as near to fp64 as TRL's."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.integrations import trl
from tests.budget import assert_within_budget
from tests.integration.models import batch, make, make_base, trained
from tests.integration.test_loss import loss_row

pytest.importorskip("trl.kernels", reason="older versions of TRL have another head")

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
PREFERENCES = (*OUTPUTS, "log_sum_sq_probs")


def with_trl(model: Any, outputs: tuple[str, ...] = OUTPUTS, **options: Any) -> Any:
    from trl.trainer.utils import add_fused_lm_head

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    add_fused_lm_head(base, outputs=outputs, **options)
    return model


def asked(model: nn.Module, inputs: dict[str, Tensor], entropy: float = 0.0) -> dict[str, Tensor]:
    """What TRL reads of a model, and the gradients of all that is trained; `entropy` is its weight in the loss."""
    model.zero_grad()
    out = model(**inputs, fused_lm_head=True)
    weights = torch.linspace(0.5, 1.5, out.log_probs.numel()).view(out.log_probs.shape).to(out.log_probs.dtype)
    loss = -(out.log_probs * weights).sum()
    (loss - entropy * out.entropy.sum() if entropy else loss).backward()
    found = {name: getattr(out, name).detach() for name in OUTPUTS}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) > 5
    return found | {"loss": out.loss.detach()} | gradients


def defined(model: nn.Module, inputs: dict[str, Tensor], entropy: float = 0.0, temperature: float = 1.0) -> Any:
    """The same of all logits of a model in fp64, in which TRL computes in fp32."""
    model.zero_grad()
    labels = inputs["labels"][:, 1:]
    counted = labels != -100
    z = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1] / temperature
    log_p = z.log_softmax(-1)
    of_label = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    found = {
        "log_probs": of_label.where(counted, 0.0),
        "entropy": -(log_p.exp() * log_p).sum(-1).where(counted, 0.0),
        "mean_logits": z.mean(-1).where(counted, 0.0),
        "is_top1": (z.argmax(-1) == labels) & counted,
    }
    weights = torch.linspace(0.5, 1.5, labels.numel()).view(labels.shape).double()
    (-(found["log_probs"] * weights).sum() - entropy * found["entropy"].sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    loss = -found["log_probs"].sum() / counted.sum()
    return {name: x.detach() for name, x in found.items()} | {"loss": loss.detach()} | gradients


def fused(model: nn.Module) -> int:
    """How many of its calls were served."""
    (calls,) = {id(c): c for m in model.modules() if (c := m.__dict__.get("fastpeft_loss"))}.values()
    return calls.outcomes.get("fused", 0)


def hold(plain: nn.Module, theirs: nn.Module, fast: nn.Module, entropy: float = 0.0, temperature: float = 1.0) -> None:
    """`plain` is what TRL has not touched: copies of a model that it has share the forward of the first."""
    inputs = batch(plain)
    exact = defined(copy.deepcopy(plain).double(), inputs, entropy, temperature)
    trls, ours = asked(theirs, inputs, entropy), asked(fast, inputs, entropy)
    assert ours.keys() == trls.keys()
    for name, mine in ours.items():
        if mine.dtype == torch.bool:
            assert torch.equal(mine, exact[name])
        else:
            assert_within_budget(mine, trls[name], exact[name], name)


@pytest.mark.parametrize("when", ["accelerated before", "accelerated after"])
@pytest.mark.parametrize("entropy", [0.0, 0.3])
def test_all_that_trl_reads_and_every_gradient(when: str, entropy: float) -> None:
    start = trained(make())
    if when == "accelerated before":
        fast = with_trl(fastpeft.accelerate(copy.deepcopy(start)))
    else:
        fast = fastpeft.accelerate(with_trl(copy.deepcopy(start)))
    hold(start, with_trl(copy.deepcopy(start)), fast, entropy)
    assert fused(fast) == 1 == fused(copy.deepcopy(fast))
    assert loss_row(fast).op and not loss_row(fast).note


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gemma2", {}),
        ("llama", {"temperature": 0.7}),
        pytest.param("llama", {"cast_lm_head_to_fp32": True}, marks=pytest.mark.full),
    ],
)
def test_caps_scales_and_temperatures(name: str, options: dict[str, Any]) -> None:
    start = trained(make(name))
    fast = fastpeft.accelerate(with_trl(copy.deepcopy(start), **options))
    hold(start, with_trl(copy.deepcopy(start), **options), fast, temperature=options.get("temperature", 1.0))
    assert fused(fast) == 1


def test_a_trained_head_of_a_model_without_adapters() -> None:
    start = make_base("llama").train().requires_grad_()
    fast = fastpeft.accelerate(with_trl(copy.deepcopy(start)))
    hold(start, with_trl(copy.deepcopy(start)), fast, 0.2)
    assert fused(fast) == 1


def test_the_same_numbers_with_gradients_and_without() -> None:
    """Trainers of TRL compare the two."""
    model = fastpeft.accelerate(with_trl(trained(make())))
    inputs = batch(model)
    asked(model, inputs)
    with torch.no_grad():
        quiet = model(**inputs, fused_lm_head=True)
    loud = model(**inputs, fused_lm_head=True)
    for name in OUTPUTS:
        assert torch.equal(getattr(quiet, name), getattr(loud, name)), name
    assert fused(model) == 3


def test_the_same_numbers_whatever_else_is_asked_for() -> None:
    """A policy's ratio to its reference model, of which TRL asks for less, begins at 1."""
    start = trained(make())
    inputs, found = batch(start), []
    for outputs in (OUTPUTS, ("log_probs",)):
        model = fastpeft.accelerate(with_trl(copy.deepcopy(start), outputs))
        with torch.no_grad():
            found.append(model(**inputs, fused_lm_head=True).log_probs)
    assert torch.equal(*found)


def test_an_entropy_with_a_gradient_is_trl_s_from_then_on() -> None:
    model = fastpeft.accelerate(with_trl(trained(make())))
    inputs = batch(model)
    asked(model, inputs, 0.3)
    asked(model, inputs, 0.3)
    with torch.no_grad():
        model(**inputs, fused_lm_head=True)
    assert fused(model) == 2 and "1 of 3 calls by TRL's own function: the entropy has" in loss_row(model).note


def test_a_forward_that_is_wrapped_is_told() -> None:
    from accelerate.utils import convert_outputs_to_fp32

    model = with_trl(fastpeft.accelerate(make_base("llama").train().requires_grad_()))
    model.forward = MethodType(convert_outputs_to_fp32(model.forward.__func__), model)  # as accelerate prepares it
    model(**batch(model), fused_lm_head=True)
    assert "by TRL's own function: its forward is another, or wrapped" in loss_row(model).note


def test_a_forward_that_is_wrapped_later_is_served() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model = fastpeft.accelerate(with_trl(make_base("llama").train().requires_grad_()))
    AcceleratorState._reset_state(True)
    try:
        Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    finally:
        AcceleratorState._reset_state(True)
    model(**batch(model), fused_lm_head=True)
    assert fused(model) == 1 and loss_row(model).note == ""


def test_no_label_that_counts() -> None:
    model = fastpeft.accelerate(with_trl(trained(make())))
    inputs = batch(model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    out = model(**inputs, fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0 and not out.entropy.any()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_what_only_trl_computes_is_left_to_it() -> None:
    start = with_trl(trained(make()), PREFERENCES)
    fast = fastpeft.accelerate(copy.deepcopy(start))
    inputs = batch(start)
    theirs, ours = (model(**inputs, fused_lm_head=True) for model in (start, fast))
    torch.testing.assert_close(ours.log_sum_sq_probs, theirs.log_sum_sq_probs)
    assert fused(fast) == 0 and loss_row(fast).note == "1 of 1 calls by TRL's own function: asked for log_sum_sq_probs"
    capped = fastpeft.accelerate(with_trl(trained(make("gemma2")), temperature=0.7))
    capped(**inputs, fused_lm_head=True)
    assert fused(capped) == 0, "the temperature comes after the cap"


def test_undone_and_left_out() -> None:
    model = with_trl(trained(make()))
    base = model.get_base_model()
    theirs = base.forward.__func__
    fastpeft.accelerate(model)
    assert base.forward.__func__ is not theirs
    fastpeft.accelerate(model)
    assert base.forward.__func__.fastpeft_theirs is theirs, "bound once"
    fastpeft.restore(model)
    assert base.forward.__func__ is theirs
    fastpeft.accelerate(model, loss=False)
    model(**batch(model), fused_lm_head=True)
    assert base.forward.__func__ is theirs


def test_forwards_that_look_otherwise_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_trl(trained(make()))
    base = model.get_base_model()
    monkeypatch.setattr(trl, "_OUTPUTS", ("entropy",))
    theirs = base.forward.__func__
    fastpeft.accelerate(model)
    model(**batch(model), fused_lm_head=True)
    assert base.forward.__func__ is theirs
