"""QLoRA: 4-bit bases, as bitsandbytes stores them, and bitsandbytes' habit of rearranging them on CPUs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft import prepare_model_for_kbit_training
from peft.utils.loftq_utils import _low_rank_decomposition
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fastpeft
from fastpeft.integrations import bitsandbytes
from fastpeft_kernels.common.device import product_dtype
from tests.integration.models import batch, make_base, trained, with_lora
from tests.integration.quantised import forbid_packing, four_bit_layers, make_quantised, quantise, quantised_truth
from tests.integration.reports import adapter_rows, notes, shape_of
from tests.integration.steps import assert_accelerated_close, assert_step_close, step

full = pytest.mark.full


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_nf4_gives_the_numbers_of_peft(name: str, checkpointing: bool) -> None:
    model = make_quantised(name, checkpointing=checkpointing)
    check_step(model)
    ops = {row.op for row in adapter_rows(model)}
    assert ops == {"lora_linear over 4-bit"} | ({"lora_linear"} if name == "t5" else set())


@pytest.mark.parametrize(
    ("dtype", "compute_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, None),
        (torch.bfloat16, None),
        pytest.param(torch.float16, torch.float16, marks=full),
        pytest.param(torch.float16, torch.bfloat16, marks=full),
    ],
)
@pytest.mark.parametrize("prepared", [False, True])
def test_every_dtype_of_the_products(dtype: torch.dtype, compute_dtype: torch.dtype | None, prepared: bool) -> None:
    check_step(make_quantised(dtype=dtype, compute_dtype=compute_dtype, prepared=prepared))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_storage(quant_type: str, double_quant: bool) -> None:
    check_step(make_quantised(quant_type=quant_type, double_quant=double_quant))


def test_blocks_that_straddle_rows() -> None:
    check_step(make_quantised(sizes={"hidden_size": 48, "intermediate_size": 72}))


@pytest.mark.parametrize("double_quant", [False, pytest.param(True, marks=full)])
def test_loaded_from_a_folder(tmp_path: Path, double_quant: bool) -> None:
    make_base("llama", torch.bfloat16).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.bfloat16)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    check_step(with_lora(base).train())


def test_restore_leaves_no_trace() -> None:
    model = make_quantised()
    for layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = True
    inputs = batch(model)
    before, shape = step(model, inputs), shape_of(model)
    step(fastpeft.accelerate(model), inputs)
    assert shape_of(fastpeft.restore(model)) == shape
    assert step(model, inputs).equals(before)


def test_merge_and_unmerge_as_peft_does_them() -> None:
    peft = make_quantised()
    ours = fastpeft.accelerate(copy.deepcopy(peft), attention=False)
    inputs = batch(ours)
    step(ours, inputs)
    for model in (peft, ours):
        model.merge_adapter()
    same_bytes(ours, peft)
    assert torch.equal(ours(**inputs).logits, peft(**inputs).logits)
    for model in (peft, ours):
        model.unmerge_adapter()
    same_bytes(ours, peft)
    forbid_packing(peft)  # PEFT makes new weights
    assert_step_close(step(ours, inputs), step(peft, inputs), quantised_truth(peft, inputs))


class TestRearrangedStorage:
    """On a CPU with AVX512-BF16, bitsandbytes rewrites the weights in place at the first forward in evaluation mode."""

    @pytest.fixture(autouse=True)
    def needs_such_a_cpu(self) -> None:
        if not bnb.functional.has_avx512bf16():
            pytest.skip("bitsandbytes rearranges weights on CPUs with AVX512-BF16 only")

    def test_an_accelerated_model_keeps_its_storage_in_evaluation(self) -> None:
        model = unguarded(make_quantised())
        inputs = batch(model)
        exact, peft = quantised_truth(model, inputs), step(model, inputs)
        fastpeft.accelerate(model)
        with torch.no_grad():
            model.eval()(**inputs)
            with model.disable_adapter():  # PEFT's own forward, through bitsandbytes'
                model(**inputs)
        assert not any(rearranged(layer) for layer in four_bit_layers(model))
        assert_step_close(step(model.train(), inputs), peft, exact)

    def test_layers_built_by_lora_config_keep_it_too(self) -> None:
        from peft import LoraConfig, get_peft_model

        base = make_quantised(lora={"r": 2}).unload()
        config = fastpeft.lora_config(LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        model = unguarded(trained(get_peft_model(base, config)))
        inputs = batch(model)
        fastpeft.accelerate(model)
        with torch.no_grad(), model.eval().disable_adapter():
            model(**inputs)
        assert not any(rearranged(layer) for layer in four_bit_layers(model))

    def test_storage_rearranged_before_runs_peft_and_is_named(self) -> None:
        peft = unguarded(make_quantised()).eval()
        inputs = batch(peft)
        with torch.no_grad():
            peft(**inputs)
        assert all(rearranged(layer) for layer in four_bit_layers(peft))
        ours = fastpeft.accelerate(copy.deepcopy(peft), attention=False)  # which rounds otherwise
        with torch.no_grad():
            assert torch.equal(ours(**inputs).logits, peft(**inputs).logits)
        ours(**inputs)  # with gradients, since few tokens without them are left to PEFT anyway
        assert all("packing_format_for_cpu" in row.note for row in adapter_rows(ours))

    def test_verify_does_not_rearrange_layers_without_lora(self) -> None:
        model = unguarded(make_quantised(lora={"target_modules": ["q_proj", "v_proj"]}))
        fastpeft.accelerate(model)
        shape = shape_of(model)
        assert fastpeft.verify(model).passed
        assert not any(rearranged(layer) for layer in four_bit_layers(model))
        assert {path: row[-1] for path, row in shape_of(model).items()} == {
            path: row[-1] for path, row in shape.items()
        }


def test_loftq_s_initialisation() -> None:
    """The adapters that `peft.replace_lora_weights_loftq` leaves; its own call computes on a GPU, by name."""
    base = make_base("llama")
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    model = with_lora(quantise(base), lora_alpha=4).train()
    errors = []
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear4bit):
            weight = before[name.removeprefix("base_model.model.") + ".weight"]
            stored = layer.get_base_layer().weight
            residual = weight - bnb.functional.dequantize_4bit(stored.data, stored.quant_state)
            found = _low_rank_decomposition(residual, reduced_rank=layer.r["default"])
            layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = found["R"], found["L"]
            errors.append((residual - layer.get_delta_weight("default")).norm() / residual.norm())
    assert errors and max(errors) < 1.0
    check_step(model)
    assert {row.op for row in adapter_rows(model)} == {"lora_linear over 4-bit"}


def check_step(model: Any) -> None:
    """The step of the accelerated model against PEFT's and the truth, twice, every call served."""
    inputs = batch(model)
    assert_accelerated_close(model, inputs, quantised_truth(model, inputs))
    assert not notes(model)


def unguarded(model: Any) -> Any:
    """As bitsandbytes builds it."""
    for layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = bnb.functional.has_avx512bf16()
    return model


def rearranged(layer: Any) -> bool:
    return getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def same_bytes(ours: Any, peft: Any) -> None:
    def absmax(layer: Any) -> torch.Tensor:
        return layer.weight.quant_state.absmax

    pairs = zip(four_bit_layers(ours), four_bit_layers(peft), strict=True)
    assert all(torch.equal(a.weight, b.weight) and torch.equal(absmax(a), absmax(b)) for a, b in pairs)


@pytest.mark.parametrize("compute_dtype", [None, torch.float16])
def test_products_follow_autocast(compute_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes' own, whatever its compute dtype says."""
    model = make_quantised(compute_dtype=compute_dtype)
    given = batch(model)
    exact = quantised_truth(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        peft = step(model, given)
        fastpeft.accelerate(model)
        step(model, given)
        decoded = []
        decode = bitsandbytes.BitsAndBytesWeight.decode

        def watched(self, out=None, rows=None, dtype=None):
            decoded.append(dtype if out is None else out.dtype)
            return decode(self, out, rows, dtype)

        monkeypatch.setattr(bitsandbytes.BitsAndBytesWeight, "decode", watched)
        ours = step(model, given)
    assert set(decoded) == {product_dtype(torch.bfloat16, torch.device("cpu"))}
    assert_step_close(ours, peft, exact)


def test_storage_is_let_go_when_the_model_moves_or_is_restored() -> None:
    model = fastpeft.accelerate(make_quantised())
    given = batch(model)
    states = {id(m.weight.quant_state) for m in model.modules() if hasattr(getattr(m, "weight", None), "quant_state")}
    for change in (lambda: model.to("cpu"), lambda: fastpeft.restore(model)):
        step(model, given)
        assert states <= bitsandbytes._WEIGHTS.keys()
        change()
        assert not states & bitsandbytes._WEIGHTS.keys()
