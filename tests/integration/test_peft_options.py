"""Options of LoraConfig that change what a layer computes: served with PEFT's numbers, or left to PEFT and named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

import fastpeft
from tests.integration.models import batch, make, make_base, with_lora
from tests.integration.reports import adapter_rows, mlp_rows, notes
from tests.integration.steps import assert_accelerated_close, assert_step_close, step, truth

SERVED: dict[str, dict[str, Any]] = {
    "rank_pattern": {"rank_pattern": {"q_proj": 8, "up_proj": 1}, "alpha_pattern": {"v_proj": 32}},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "bias_lora_only": {"bias": "lora_only"},
    "bias_all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "layers_to_transform": {"layers_to_transform": [1], "target_modules": ["q_proj", "k_proj", "up_proj"]},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "exclude_modules": {"exclude_modules": ["k_proj"]},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "eva": {"init_lora_weights": "eva"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "velora": {"velora_config": VeloraConfig(num_groups=8, init_type="random")},
    "kasa": {"kasa_config": KasaConfig()},
    "monteclora": {"monteclora_config": MontecloraConfig()},
    "bdlora": {
        "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["o_proj"], nblocks=2),
        "target_modules": ["q_proj", "o_proj"],
    },
}


@pytest.mark.parametrize("option", SERVED)
def test_served(option: str) -> None:
    name = "qwen2" if option.startswith("bias") else "llama"
    model = make(name, **SERVED[option])
    inputs = batch(model)
    assert_accelerated_close(model, inputs, truth(model, inputs))
    assert not notes(model)


@pytest.mark.parametrize("indices", [{"embed_tokens": [3, 7]}, {"embed_tokens": [3, 7], "lm_head": [7, 40]}])
def test_trainable_tokens(indices: dict[str, list[int]]) -> None:
    """LoRA's layers are served as ever, and what trains the tokens too."""
    model = make(trainable_token_indices=indices)
    inputs = batch(model)
    inputs["input_ids"][:, 1:3] = torch.tensor([3, 7])
    exact = truth(model, inputs)
    deltas = [gradient for name, gradient in exact.gradients.items() if "trainable_tokens_delta" in name]
    assert len(deltas) == len(indices) and all(delta.any() for delta in deltas)
    assert_accelerated_close(model, inputs, exact)
    assert len(adapter_rows(model)) == 14 + len(indices) and all(row.accelerated for row in adapter_rows(model))
    assert not notes(model)
    assert len(mlp_rows(model)) == 2 and all(row.accelerated for row in mlp_rows(model))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, pytest.param(torch.optim.AdamW, marks=pytest.mark.full)])
def test_lora_plus(optimizer: type[torch.optim.Optimizer]) -> None:
    """PEFT's optimizer with a larger rate for B, three steps."""
    plain = make()
    ours, inputs = fastpeft.accelerate(copy.deepcopy(plain)), batch(plain)
    exact = copy.deepcopy(plain).double()
    for model in (ours, plain, exact):
        rates = create_loraplus_optimizer(model, optimizer, lr=1e-3, loraplus_lr_ratio=16)
        by_rate = {group["lr"]: len(group["params"]) for group in rates.param_groups if group["params"]}
        assert by_rate == {1e-3: 14, 16e-3: 14}
        for _ in range(3):
            model(**inputs).loss.backward()
            rates.step()
            rates.zero_grad()
    assert_step_close(step(ours, inputs), step(plain, inputs), step(exact, inputs))
    assert not notes(ours)


@pytest.mark.full
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda(method: str) -> None:
    """CorDA's weights come of a run over samples, one row at a time."""
    pytest.importorskip("attr", reason="PEFT's CorDA imports attrs")
    from peft import get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    base = make_base(dtype=torch.float32)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(
        r=4, init_lora_weights="corda", target_modules=targets, corda_config=CordaConfig(corda_method=method)
    )
    rows = torch.randint(3, 60, (8, 32), generator=torch.Generator().manual_seed(0))
    preprocess_corda(base, config, run_model=lambda: [base(input_ids=row[None]) for row in rows])
    model = get_peft_model(base, config)
    inputs = batch(model)
    assert_accelerated_close(model, inputs, truth(model, inputs))
    assert not notes(model)


def test_adapters_in_the_dtype_of_a_bf16_base() -> None:
    from peft import get_peft_model

    model = get_peft_model(
        make_base(dtype=torch.bfloat16), LoraConfig(target_modules="all-linear"), autocast_adapter_dtype=False
    )
    inputs = batch(model)
    peft, exact = step(model, inputs), truth(model, inputs)
    assert_step_close(step(fastpeft.accelerate(model), inputs), peft, exact)


def test_inputs_that_are_not_to_be_cast_run_peft() -> None:
    from peft.helpers import disable_input_dtype_casting

    model = make(dtype=torch.float32)
    inputs = batch(model)
    before = step(model, inputs)
    fastpeft.accelerate(model, attention=False, loss=False)
    step(model, inputs)
    with disable_input_dtype_casting(model):
        assert step(model, inputs).equals(before)
    assert "casting of inputs disabled" in notes(model)


def test_a_trained_base_weight_runs_peft() -> None:
    model = make()
    weight = model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj").base_layer.weight
    weight.requires_grad_(True)
    inputs = batch(model)
    peft, exact = step(model, inputs), truth(model, inputs)
    fastpeft.accelerate(model)
    assert_step_close(step(model, inputs), peft, exact)
    assert {row.path for row in adapter_rows(model) if "base weight is trained" in row.note} == {
        "base_model.model.model.layers.0.self_attn.k_proj"
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_run_peft_and_are_named(variant: str) -> None:
    peft = make(**VARIANTS[variant])
    ours, inputs = fastpeft.accelerate(copy.deepcopy(peft)), batch(peft)
    torch.manual_seed(0)
    expected = step(peft, inputs)
    torch.manual_seed(0)
    got = step(ours, inputs)
    torch.testing.assert_close(got.gradients, expected.gradients)
    left = [row for row in adapter_rows(ours) if not row.op or "variant" in row.note]
    assert left and all("variant" in row.note for row in left)


def test_a_variant_beside_an_ordinary_adapter_is_left_when_active() -> None:
    model = make(velora_config=VeloraConfig(num_groups=8, init_type="random"))
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))
    model.set_adapter("plain")
    fastpeft.accelerate(model)
    inputs = batch(model)
    model(**inputs)
    served = {row.path.rpartition(".")[2] for row in adapter_rows(model) if row.op and "by PEFT" not in row.note}
    assert {"q_proj", "k_proj"} <= served
    model.set_adapter("default")
    plain = copy.deepcopy(model)
    fastpeft.restore(plain)
    torch.testing.assert_close(step(model, inputs).gradients, step(plain, inputs).gradients)
    assert any("VeloraLinearVariant" in row.note for row in adapter_rows(model))


def test_other_methods_of_peft_are_left_and_named() -> None:
    from peft import IA3Config, get_peft_model

    model = get_peft_model(make_base(), IA3Config(task_type="CAUSAL_LM"))
    inputs = batch(model)
    before = step(model, inputs)
    assert step(fastpeft.accelerate(model, attention=False, loss=False, norms=False), inputs).equals(before)
    notes = {row.note for row in adapter_rows(model)}
    assert notes and all("ia3" in note for note in notes)


def test_embeddings_and_heads_beside_linear_targets() -> None:
    model = with_lora(make_base(), target_modules=["embed_tokens", "q_proj", "k_proj", "lm_head"]).train()
    inputs = batch(model)
    peft, exact = step(model, inputs), truth(model, inputs)
    assert_step_close(step(fastpeft.accelerate(model), inputs), peft, exact)
    assert not fastpeft.report(model).left
    assert not notes(model)


def test_target_parameters_are_refused_by_lora_config() -> None:
    with pytest.raises(ValueError, match="target_parameters"):
        fastpeft.lora_config(LoraConfig(target_parameters=["experts.gate_up_proj"]))
    with pytest.raises(TypeError, match="LoraConfig, got dict"):
        fastpeft.lora_config({"r": 8})  # type: ignore[arg-type]


def test_lora_config_leaves_the_given_one_as_it_is() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    before = copy.deepcopy(config.to_dict())
    fastpeft.lora_config(config)
    assert config.to_dict() == before and not getattr(config, "_custom_modules", None)
