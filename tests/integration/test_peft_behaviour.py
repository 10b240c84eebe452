"""What PEFT does to a model that was accelerated: merging, disabling, adding, switching and combining adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from torch import nn

import fastpeft
from tests.integration.models import add_adapter, batch, make, make_base, trained, with_lora
from tests.integration.reports import adapter_rows, notes, shape_of, siblings
from tests.integration.steps import assert_step_close, step, truth


def pair(**config: Any) -> tuple[PeftModel, PeftModel, dict[str, torch.Tensor]]:
    """An accelerated model that has already made a step, the same model without fastpeft, and a batch."""
    peft = make(**config)
    ours, inputs = fastpeft.accelerate(copy.deepcopy(peft)), batch(peft)
    step(ours, inputs)
    peft.get_base_model().set_attn_implementation("fastpeft")  # type: ignore[operator]
    return ours, peft, inputs


def check(ours: PeftModel, peft: PeftModel, inputs: dict[str, torch.Tensor]) -> None:
    assert_step_close(step(ours, inputs), step(peft, inputs), truth(peft, inputs))


def second(model: PeftModel, **config: Any) -> None:
    """Another adapter, of the same values in every model that gets one."""
    torch.manual_seed(7)
    model.add_adapter("second", LoraConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj"], **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)


class TestMerging:
    def test_merged_and_unmerged(self) -> None:
        ours, peft, inputs = pair()
        for model in (ours, peft):
            model.merge_adapter()
        assert torch.equal(ours(**inputs).logits, peft(**inputs).logits)
        assert all("merged" in row.note for row in adapter_rows(ours))
        for model in (ours, peft):
            model.unmerge_adapter()
        check(ours, peft, inputs)

    @pytest.mark.parametrize("leave", ["merge_and_unload", "unload"])
    def test_unloading_gives_the_plain_model_back(self, leave: str) -> None:
        ours, peft, inputs = pair()
        fastpeft.accelerate(ours, loss=False, norms=False)  # which, like attention, would stay with the plain model
        ours, peft = (getattr(model, leave)() for model in (ours, peft))
        assert torch.equal(ours(**inputs).logits, peft(**inputs).logits)
        assert {p: (row[0], *row[2:]) for p, row in shape_of(ours).items()} == {
            p: (row[0], *row[2:]) for p, row in shape_of(peft).items()
        }, "classes and hooks are not those of the plain model"

    def test_unloading_before_any_forward(self) -> None:
        model = fastpeft.accelerate(make(), loss=False).unload()
        model(**batch(model))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_a_new_peft_model_on_the_unloaded_base(self) -> None:
        ours, peft, inputs = pair()
        ours, peft = (trained(again(model.unload())) for model in (ours, peft))
        check(fastpeft.accelerate(ours), peft, inputs)

    def test_disabled(self) -> None:
        ours, peft, inputs = pair()
        with ours.disable_adapter(), peft.disable_adapter():
            assert torch.equal(ours(**inputs).logits, peft(**inputs).logits)
        check(ours, peft, inputs)

    def test_disabled_while_merged(self) -> None:
        ours, peft, inputs = pair()
        for model in (ours, peft):
            model.merge_adapter()
        with ours.disable_adapter(), peft.disable_adapter():
            assert torch.equal(ours(**inputs).logits, peft(**inputs).logits)
        check(ours, peft, inputs)


class TestSeveralAdapters:
    def test_one_after_the_other(self) -> None:
        ours, peft, inputs = pair()
        for model in (ours, peft):
            second(model)
            model.set_adapter("second")
        check(ours, peft, inputs)
        for model in (ours, peft):
            model.set_adapter("default")
        check(ours, peft, inputs)
        for model in (ours, peft):
            model.delete_adapter("second")
        check(ours, peft, inputs)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_both_at_once(self, dtype: torch.dtype) -> None:
        ours, peft, inputs = pair(dtype=dtype)
        for model in (ours, peft):
            second(model)
            model.base_model.set_adapter(["default", "second"])
        check(ours, peft, inputs)
        assert not notes(ours)

    def test_deleting_the_only_one_leaves_the_base(self) -> None:
        ours, peft, inputs = pair()
        for model in (ours, peft):
            second(model)
            model.set_adapter("second")
            model.delete_adapter("default")
        check(ours, peft, inputs)

    def test_new_targets_are_taken_in_by_accelerating_again(self) -> None:
        ours, peft, inputs = pair(target_modules=["q_proj", "v_proj"])
        for model in (ours, peft):
            second(model, target_modules=["q_proj", "k_proj", "up_proj"])
            model.base_model.set_adapter(["default", "second"])
        check(ours, peft, inputs)
        left = {row.path.rpartition(".")[2] for row in fastpeft.report(ours).left}
        assert left == {"k_proj", "up_proj"}
        fastpeft.accelerate(ours)
        check(ours, peft, inputs)
        assert not notes(ours)
        assert siblings(ours) == {frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"})}

    def test_weighted_combination(self) -> None:
        ours, peft, inputs = pair(target_modules=["q_proj", "v_proj"], r=3)
        for model in (ours, peft):
            second(model)
            model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "mix", combination_type="linear")
            model.set_adapter("mix")
        check(ours, peft, inputs)

    def test_a_mixed_batch(self) -> None:
        ours, peft, inputs = pair()
        for model in (ours, peft):
            second(model)
            model.eval()
        names = {"adapter_names": ["default", "second", "__base__"]}
        with torch.no_grad():
            torch.testing.assert_close(ours(**inputs, **names).logits, peft(**inputs, **names).logits)
        assert not any(row.note for row in adapter_rows(ours) if "mlp" not in row.path)
        check(ours.train(), peft.train(), inputs)

    def test_a_mixed_batch_as_the_very_first_call(self) -> None:
        peft = make().eval()
        ours, inputs = fastpeft.accelerate(copy.deepcopy(peft)), batch(peft)
        names = {"adapter_names": ["default", "__base__", "default"]}
        with torch.no_grad():
            torch.testing.assert_close(ours(**inputs, **names).logits, peft(**inputs, **names).logits)
        check(ours.train(), peft.train(), inputs)


class TestScaling:
    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.scale_layer(0.25),
            lambda layer: layer.set_scale("default", 3.0),
            lambda layer: layer.set_scale("default", 0.0),
        ],
        ids=["scale_layer", "set_scale", "zero"],
    )
    def test_changed_at_run_time(self, change: Callable[[Any], None]) -> None:
        ours, peft, inputs = pair()
        for model in (ours, peft):
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    change(module)
        check(ours, peft, inputs)

    def test_rescaled_for_the_time_of_a_context(self) -> None:
        ours, peft, inputs = pair()
        with rescale_adapter_scale(ours, 0.5), rescale_adapter_scale(peft, 0.5):
            check(ours, peft, inputs)
        check(ours, peft, inputs)

    def test_tensors_of_scaling_for_hotswapping(self) -> None:
        from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

        ours, peft, inputs = pair(r=4)
        other = make(r=2, lora_alpha=16)
        state = {name: t for name, t in other.state_dict().items() if "lora_" in name}
        for model in (ours, peft):
            prepare_model_for_compiled_hotswap(model, target_rank=6)
        assert isinstance(next(m for m in ours.modules() if isinstance(m, LoraLayer)).scaling["default"], torch.Tensor)
        check(ours, peft, inputs)
        for model in (ours, peft):
            hotswap_adapter_from_state_dict(model, dict(state), "default", other.peft_config["default"])
        check(ours, peft, inputs)
        assert not notes(ours)


class TestOtherWaysIn:
    def test_transformers_own_add_adapter(self) -> None:
        peft = make_base()
        add_adapter(peft, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"]))
        trained(peft).train()
        ours, inputs = fastpeft.accelerate(copy.deepcopy(peft), attention=False), batch(peft)
        assert_step_close(step(ours, inputs), step(peft, inputs), truth(peft, inputs))
        ours.disable_adapters()
        peft.disable_adapters()
        assert torch.equal(ours(**inputs).logits, peft(**inputs).logits)

    def test_lora_config_builds_the_layers_directly(self) -> None:
        base = make_base()
        peft = with_lora(copy.deepcopy(base))
        config = fastpeft.lora_config(LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"))
        ours = get_peft_model(base, config)
        ours.load_state_dict(peft.state_dict())
        inputs = batch(peft)
        check(ours, peft, inputs)
        assert all(row.accelerated for row in adapter_rows(ours)) and not siblings(ours)
        check(fastpeft.accelerate(ours), peft, inputs)
        assert siblings(ours)
        for model in (ours, peft):
            second(model)
            model.set_adapter("second")
        check(ours, peft, inputs)
        check(fastpeft.restore(ours), peft, inputs)
        assert {type(m) for m in ours.modules()} == {type(m) for m in peft.modules()}


def again(model: nn.Module) -> PeftModel:
    torch.manual_seed(3)
    return with_lora(model)


@pytest.mark.parametrize("part", ["mlp", "self_attn.q_proj"])
def test_a_model_on_the_meta_device_gives_shapes(part: str) -> None:
    """Where there is no autocast to ask about."""
    ours, _, _ = pair()
    layer = ours.to("meta").get_submodule(f"base_model.model.model.layers.0.{part}")
    y = layer(torch.randn(2, 20, 64, device="meta", requires_grad=True))
    assert y.shape == (2, 20, 64) and y.device.type == "meta"
    y.sum().backward()
