"""Every architecture: the numbers of plain PEFT, the siblings that belong together, and back again without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM
from transformers.pytorch_utils import Conv1D

import fastpeft
from tests.integration.models import ARCHITECTURES, batch, checkpointed, make, with_lora
from tests.integration.reports import mlp_rows, notes, shape_of, siblings
from tests.integration.steps import assert_accelerated_close, assert_step_close, step, truth


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_peft(name: str) -> None:
    model = make(name)
    inputs = batch(model)
    assert_accelerated_close(model, inputs, truth(model, inputs))
    assert not notes(model)


@pytest.mark.parametrize("bias", [False, True])
def test_falcon_s_own_linear_layers_are_served(bias: bool) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bias": bias}
    config = FalconConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0, pad_token_id=0)
    model = with_lora(FalconForCausalLM(config)).train()
    inputs = batch(model)
    assert_accelerated_close(model, inputs, truth(model, inputs))
    assert not notes(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_projections_of_one_input_are_found(name: str) -> None:
    model = fastpeft.accelerate(make(name))
    with torch.no_grad():
        model(**batch(model))
    assert siblings(model) == {frozenset(names.split()) for names in ARCHITECTURES[name].siblings}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_restore_leaves_no_trace(name: str) -> None:
    model = make(name)
    inputs = batch(model)
    before, shape = step(model, inputs), shape_of(model)
    fastpeft.accelerate(model)
    step(model, inputs)
    assert fastpeft.restore(model) is model
    assert shape_of(model) == shape
    assert step(model, inputs).equals(before)


def test_restore_before_the_first_forward_leaves_no_trace() -> None:
    model = make("t5")
    shape = shape_of(model)
    assert shape_of(fastpeft.restore(fastpeft.accelerate(model))) == shape
    assert shape_of(fastpeft.restore(model)) == shape


def test_accelerating_again_after_restore() -> None:
    model = make("llama")
    inputs = batch(model)
    peft, exact = step(model, inputs), truth(model, inputs)
    for _ in range(2):
        fastpeft.accelerate(model)
        assert_step_close(step(model, inputs), peft, exact)
        fastpeft.restore(model)


def test_accelerating_twice_changes_nothing() -> None:
    model = make("llama")
    inputs = batch(model)
    once = step(fastpeft.accelerate(model), inputs)
    groups = siblings(model)
    again = step(fastpeft.accelerate(model), inputs)
    assert again.equals(once) and siblings(model) == groups


def test_a_conv1d_of_another_class_is_left_alone_and_named(caplog: pytest.LogCaptureFixture) -> None:
    class Other(Conv1D):
        """May compute anything."""

    model = make("gpt2")
    for module in model.modules():
        if type(module) is Conv1D:
            module.__class__ = Other
    inputs = batch(model)
    before, shape = step(model, inputs), shape_of(model)
    fastpeft.accelerate(model, attention=False, norms=False, loss=False)
    assert "nothing was replaced" in caplog.text
    report = fastpeft.report(model)
    left = {row.note for row in report.left if row.kind not in ("attention", "norms", "loss")}
    assert not report.accelerated and left == {"no op for a base layer of type Other"}
    assert step(model, inputs).equals(before)
    assert shape_of(fastpeft.restore(model)) == shape


def test_gpt2_s_mlps_are_one_op() -> None:
    model = make("gpt2", target_modules=["c_attn", "c_fc", "c_proj"])
    inputs = batch(model)
    assert_accelerated_close(model, inputs, truth(model, inputs))
    assert len(mlp_rows(model)) == 2 and all(row.accelerated and not row.note for row in mlp_rows(model))


def test_merging_over_conv1d() -> None:
    peft = make("gpt2").eval()
    ours, inputs = fastpeft.accelerate(copy.deepcopy(peft)), batch(peft)
    with torch.no_grad():
        for change in ("merge_adapter", "unmerge_adapter"):
            for model in (ours, peft):
                getattr(model, change)()
            torch.testing.assert_close(ours(**inputs).logits, peft(**inputs).logits)


CHECKPOINTED = [
    "llama",
    pytest.param("gemma2", marks=pytest.mark.full),
    "bert",
    "t5",
    pytest.param("bart", marks=pytest.mark.full),
]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_with_activation_checkpointing(name: str, use_reentrant: bool) -> None:
    model = checkpointed(make(name), use_reentrant)
    inputs = batch(model)
    peft, exact = step(model, inputs), truth(model, inputs)
    fastpeft.accelerate(model)
    for _ in range(2):
        assert_step_close(step(model, inputs), peft, exact)
    assert siblings(model) == {frozenset(names.split()) for names in ARCHITECTURES[name].siblings}


@pytest.mark.full
@pytest.mark.parametrize("options", [{"every_n_layers": 2}])
def test_with_transformers_newer_checkpointing(options: dict[str, Any]) -> None:
    model = make("llama")
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable(**options)
    inputs = batch(model)
    peft, exact = step(model, inputs), truth(model, inputs)
    fastpeft.accelerate(model)
    for _ in range(2):
        assert_step_close(step(model, inputs), peft, exact)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_checkpointing_repeats_the_dropout_of_the_forward(name: str, use_reentrant: bool) -> None:
    plain = fastpeft.accelerate(make(name, lora_dropout=0.3))
    inputs = batch(plain)
    recomputed = checkpointed(copy.deepcopy(plain), use_reentrant)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = step(plain, inputs)
        torch.manual_seed(seed)
        got = step(recomputed, inputs)
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
        for gradient, wanted in zip(got.gradients.values(), expected.gradients.values(), strict=True):
            assert (
                gradient - wanted
            ).norm() <= 1e-3 * wanted.norm()  # other masks would differ as much as the gradients


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj"], ["k_proj", "o_proj", "down_proj"]])
def test_any_subset_of_projections(targets: list[str]) -> None:
    model = make("llama", target_modules=targets)
    inputs = batch(model)
    peft, exact = step(model, inputs), truth(model, inputs)
    assert_step_close(step(fastpeft.accelerate(model), inputs), peft, exact)


def test_a_model_of_pictures() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    base = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes))
    model = with_lora(base, None).train()
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 2])}
    peft, exact = step(model, inputs), truth(model, inputs)
    fastpeft.accelerate(model)
    assert_step_close(step(model, inputs), peft, exact)
    assert len(siblings(model)) == 1 and not notes(model)
    with pytest.raises(ValueError, match="does not take input_ids alone"):
        fastpeft.verify(model)
    assert fastpeft.verify(model, inputs).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype: torch.dtype) -> None:
    """PEFT keeps the adapters of a 16-bit base in fp32 and so do we."""
    model = make("llama", dtype)
    inputs = batch(model)
    peft, exact = step(model, inputs), truth(model, inputs)
    assert_step_close(step(fastpeft.accelerate(model), inputs), peft, exact)
