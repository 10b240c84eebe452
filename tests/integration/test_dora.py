"""DoRA: PEFT's layers with magnitudes, served with PEFT's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft_kernels.common.random import CounterDropout, draw_seed
from tests.integration.models import batch, checkpointed, make, make_base
from tests.integration.quantised import make_quantised, quantised_truth
from tests.integration.reports import adapter_rows, mlp_rows, notes, siblings
from tests.integration.steps import Step, assert_accelerated_close, assert_close, assert_step_close, step, truth

full = pytest.mark.full
BF16 = torch.bfloat16


def trained(model: PeftModel) -> PeftModel:
    """Magnitudes that are no norms any more, one of them negative."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.0 + 0.3 * torch.randn_like(parameter))
                parameter[0] = -parameter[0]
    return model


def dora(name: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    return trained(make(name, dtype, use_dora=True, **config))


def assert_served(model: PeftModel, inputs: Mapping[str, Any], exact: Step) -> None:
    """With PEFT's numbers in value and every gradient, all of it by ops."""
    assert any("magnitude" in name for name in exact.gradients)
    assert_accelerated_close(model, inputs, exact)
    assert not notes(model)


@pytest.mark.parametrize("name", ["llama", "bert", *(pytest.param(n, marks=full) for n in ("qwen2", "t5", "gemma2"))])
def test_models(name: str) -> None:
    model = dora(name)
    inputs = batch(model)
    assert_served(model, inputs, truth(model, inputs))
    assert any(len(names) == 3 for names in siblings(model))
    assert all("DoRA" in row.note for row in mlp_rows(model))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("base", [torch.float32, pytest.param(BF16, marks=full)], ids=str)
def test_weights_that_lie_transposed(base: torch.dtype, autocast: bool) -> None:
    """GPT-2's Conv1D, (in, out): norms are of each output's weights, as everywhere."""
    model = dora("gpt2", base)
    layer = model.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
    assert layer.base_layer.weight.shape == (64, 192)
    assert layer.lora_magnitude_vector["default"].weight.shape == (192,)
    inputs = batch(model)
    exact = truth(model, inputs)
    with torch.autocast("cpu", BF16, enabled=autocast):
        assert_served(model, inputs, exact)


def test_norms_of_the_other_axis_are_peft_s() -> None:
    """Which somebody has asked for, of a square weight."""
    peft = trained(get_peft_model(nn.Sequential(nn.Linear(16, 16)), LoraConfig(target_modules=["0"], use_dora=True)))
    peft.base_model.model[0].lora_magnitude_vector["default"].fan_in_fan_out = True
    ours, x = fastpeft.accelerate(copy.deepcopy(peft)), torch.randn(5, 16)
    torch.testing.assert_close(ours(x), peft(x), rtol=0.0, atol=0.0)
    assert "a fan_in_fan_out of DoRA that is not the weight's" in notes(ours)


@pytest.mark.parametrize("nested", [True, pytest.param(False, marks=full)])
def test_over_four_bits(nested: bool) -> None:
    model = trained(make_quantised(double_quant=nested, lora={"use_dora": True}))
    inputs = batch(model)
    assert_served(model, inputs, quantised_truth(model, inputs))


@pytest.mark.parametrize("base", [torch.float32, pytest.param(BF16, marks=full)])
def test_under_autocast(base: torch.dtype) -> None:
    model = dora("llama", base)
    inputs = batch(model)
    exact = truth(model, inputs)
    with torch.autocast("cpu", BF16):
        assert_served(model, inputs, exact)


@pytest.mark.parametrize("adapters", [torch.float32, pytest.param(BF16, marks=full)])
def test_a_bf16_base(adapters: torch.dtype) -> None:
    config = LoraConfig(target_modules="all-linear", use_dora=True, init_lora_weights=False)
    model = get_peft_model(make_base(dtype=BF16), config, autocast_adapter_dtype=adapters != BF16)
    inputs = batch(model)
    assert_served(model, inputs, truth(model, inputs))


@pytest.mark.parametrize("use_reentrant", [False, pytest.param(True, marks=full)])
def test_checkpointing_with_dropout(use_reentrant: bool) -> None:
    """The recomputation drops what the forward dropped: the same gradients as without checkpointing."""
    model = fastpeft.accelerate(dora(lora_dropout=0.3))
    inputs = batch(model)
    model(**inputs)
    steps = []
    for prepared in (model, checkpointed(model, use_reentrant)):
        torch.manual_seed(3)
        steps.append(step(prepared, inputs))
    assert steps[0].equals(steps[1]) and not notes(model)


@pytest.mark.parametrize("kind", [nn.Linear, lambda nx, nf: Conv1D(nf, nx)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_is_peft_s_formula(
    autocast: bool, kind: Callable[[int, int], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is dropped is dropped of the base layer's input too, except where it has no gain."""
    config = LoraConfig(r=4, target_modules=["0"], use_dora=True, lora_dropout=0.4, init_lora_weights=False)
    peft = trained(get_peft_model(nn.Sequential(kind(32, 24)), config).train())
    ours = fastpeft.accelerate(copy.deepcopy(peft))
    x, dy = torch.randn(65, 32), torch.randn(65, 24)

    def run(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(7)
        leaf = x.to(next(p.dtype for p in model.parameters())).requires_grad_()
        with torch.autocast("cpu", BF16, enabled=autocast and leaf.dtype == torch.float32):
            y = model(leaf)
        trainable = [p for p in model.parameters() if p.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, [leaf, *trainable], dy.to(y.dtype))]

    found = run(ours)

    def same_mask(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        return CounterDropout.apply(x, draw_seed(x.device), p, 0) if training else x

    monkeypatch.setattr(torch.nn.functional, "dropout", same_mask)
    expected, exact = run(peft), run(copy.deepcopy(peft).double())
    assert len(found) == 5
    for triple in zip(found, expected, exact, strict=True):
        assert_close(*triple)
    assert not notes(ours)


def test_dropout_where_peft_multiplies_in_another_dtype_is_left_and_named() -> None:
    peft = dora("llama", BF16, lora_dropout=0.2)
    ours, inputs = fastpeft.accelerate(copy.deepcopy(peft), attention=False, loss=False), batch(peft)
    torch.manual_seed(0)
    expected = step(peft, inputs)
    ours(**inputs)
    torch.manual_seed(0)
    assert step(ours, inputs).equals(expected)
    assert "DoRA with dropout, adapters in torch.float32, the base in torch.bfloat16, no autocast" in notes(ours)


def test_beside_a_plain_adapter() -> None:
    """Alone it is served; both at once are left to PEFT, which applies them one after the other."""
    model = dora()
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    model.set_adapter("default")
    inputs = batch(model)
    assert_served(copy.deepcopy(model), inputs, truth(model, inputs))
    model.base_model.set_adapter(["default", "plain"])
    exact, peft = truth(model, inputs), step(model, inputs)
    assert_step_close(step(fastpeft.accelerate(model), inputs), peft, exact)
    assert "adapter 'default' is DoRA, and others are active with it" in notes(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_disabling_and_unloading(name: str) -> None:
    model = dora(name).eval()
    plain, inputs = copy.deepcopy(model), batch(model)
    fastpeft.accelerate(model)
    with torch.no_grad():
        for change in ("merge_adapter", "unmerge_adapter", "disable_adapter_layers", "enable_adapter_layers"):
            for each in (model, plain):
                getattr(each.base_model, change)()
            torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)
        torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, plain(**inputs).logits)


def test_saved_and_loaded(tmp_path: Path) -> None:
    base = make_base()
    model = trained(get_peft_model(copy.deepcopy(base), LoraConfig(target_modules="all-linear", use_dora=True)))
    fastpeft.accelerate(model).save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    inputs = batch(plain)
    assert_step_close(step(model, inputs), step(plain, inputs), truth(plain, inputs))


def test_training_moves_the_magnitude_as_peft_does() -> None:
    """Nothing of norms or gains is kept from step to step."""
    peft = dora()
    ours, inputs = fastpeft.accelerate(copy.deepcopy(peft)), batch(peft)
    for model in (peft, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), peft.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_cached_norms_are_peft_s() -> None:
    from peft.helpers import DoraCaching

    model = fastpeft.accelerate(dora()).eval()
    with torch.no_grad(), DoraCaching():
        model(**batch(model))
    assert "norms of DoRA are cached" in notes(model)
    held = [m._dora_cache for m in model.modules() if hasattr(m, "_dora_cache")]
    assert held and all(held)
    with torch.no_grad():
        model(**batch(model))
    assert not any(held)  # as PEFT's: the next time they would be of other weights


def test_a_hook_on_the_magnitude_runs_peft() -> None:
    model = dora()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)
    inputs = batch(model)
    peft, exact = step(model, inputs), truth(model, inputs)
    assert_step_close(step(fastpeft.accelerate(model), inputs), peft, exact)
    named = [row.path.rpartition(".")[2] for row in adapter_rows(model) if "a hook on a bypassed" in row.note]
    assert named == ["q_proj"]


@full
def test_compiled() -> None:
    model = fastpeft.accelerate(dora())
    inputs = batch(model)
    model(**inputs)
    eager = step(model, inputs)
    torch._dynamo.reset()
    compiled = step(torch.compile(model, backend="aot_eager"), inputs)
    for name, gradient in compiled.gradients.items():
        torch.testing.assert_close(gradient, eager.gradients[name.removeprefix("_orig_mod.")])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_verify(name: str) -> None:
    model = fastpeft.accelerate(dora(name))
    assert fastpeft.verify(model, batch(model)).passed
