"""LoRA over quantised bases of several libraries: PEFT's numbers, and who served."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, prepare_model_for_kbit_training
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.integrations.finegrained_fp8 import FP8GroupedLinear

import fastpeft
from fastpeft.integrations import bitsandbytes_int8, quantised
from fastpeft.integrations import torchao as torchao_reader
from tests.integration import packed_layers
from tests.integration.bases import BASES, hqq, make, quantised_layers, stand_for_gptqmodel, torchao, truth, values
from tests.integration.models import batch, checkpointed, make_base, with_lora
from tests.integration.reports import adapter_rows, mlp_rows, notes
from tests.integration.steps import assert_accelerated_close, assert_step_close, step

full = pytest.mark.full
every_base = pytest.mark.parametrize("base", list(BASES))
TINY = {"num_hidden_layers": 1}


def _few(*bases: str) -> list[Any]:
    """These always, the others in the whole run."""
    return [base if base in bases else pytest.param(base, marks=full) for base in BASES]


@pytest.fixture(autouse=True)
def gptqmodel(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_for_gptqmodel(monkeypatch)


@every_base
def test_a_step_gives_the_numbers_of_peft(base: str) -> None:
    model = make(base)
    inputs = batch(model)
    assert_accelerated_close(model, inputs, truth(model, inputs))
    assert {row.op for row in adapter_rows(model)} == {f"lora_linear over {base}"}
    assert {row.op for row in mlp_rows(model)} == {"lora_mlp"}
    assert {row.partners for row in adapter_rows(model) if "q_proj" in row.path} == {"one of 3"}
    assert notes(model) == ""


@every_base
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.bfloat16, False),
        (torch.float32, True),
        pytest.param(torch.bfloat16, True, marks=full),
        pytest.param(torch.float16, False, marks=full),
    ],
)
def test_dtypes(base: str, dtype: torch.dtype, autocast: bool) -> None:
    model = make(base, dtype=dtype, sizes=TINY)
    inputs, exact = batch(model), None
    exact = truth(model, inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_accelerated_close(model, inputs, exact)
        assert notes(model) == ""


@pytest.mark.parametrize("base", _few("LLM.int8", "HQQ", "AWQ"))
def test_biases_and_one_projection_alone(base: str) -> None:
    model = make(base, "qwen2", sizes=TINY, target_modules=["q_proj", "down_proj"])
    inputs = batch(model)
    assert_accelerated_close(model, inputs, truth(model, inputs))
    assert notes(model) == ""


@pytest.mark.parametrize("base", _few("LLM.int8", "torchao int8"))
@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=full)])
def test_checkpointing(base: str, reentrant: bool) -> None:
    model = checkpointed(make(base, sizes=TINY), reentrant)
    inputs = batch(model)
    assert_accelerated_close(model, inputs, truth(model, inputs))
    if not reentrant:  # its forward without gradients leaves few tokens to PEFT
        assert notes(model) == ""


@full
@every_base
def test_compiled_without_a_break(base: str) -> None:
    model = make(base, sizes=TINY)
    inputs = batch(model)
    peft, exact = step(model, inputs), truth(model, inputs)
    fastpeft.accelerate(model)
    torch._dynamo.reset()
    ours = step(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    ours.gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in ours.gradients.items()}
    assert_step_close(ours, peft, exact)


@every_base
def test_verify_passes_and_sees_a_wrong_weight(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastpeft.accelerate(make(base, sizes=TINY))
    found = fastpeft.verify(model)
    assert found.passed, found
    assert not found.unserved
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.o_proj")
    request = layer.request

    def wrong(x: torch.Tensor, *names: Any) -> Any:
        asked = request(x, *names)
        weight = copy.copy(asked.projection.weight)
        weight.decode_rows = lambda out, first, last: out.fill_(0.1)
        weight.linear = lambda x, shared: None
        projection = copy.copy(asked.projection)
        object.__setattr__(projection, "weight", weight)
        return dataclasses.replace(asked, projection=projection)

    monkeypatch.setattr(layer, "request", wrong)
    assert not fastpeft.verify(model).passed


@pytest.mark.parametrize("base", _few("LLM.int8", "torchao int8", "GPTQ"))
def test_restore_gives_peft_back(base: str) -> None:
    model = make(base, sizes=TINY)
    inputs = batch(model)
    before, classes = step(model, inputs), [type(module) for module in model.modules()]
    step(fastpeft.accelerate(model), inputs)
    fastpeft.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert step(model, inputs).equals(before)


def _int3(library: Any) -> dict[str, Any]:
    return {"weight_dtype": torch.int3, "granularity": library.PerAxis(0)}


def asymmetric_int8(linear: nn.Linear) -> nn.Module:
    library = pytest.importorskip("torchao.quantization")
    values = library.Int8Tensor.from_hp(linear.weight, library.PerRow(), mapping_type=library.MappingType.ASYMMETRIC)
    linear.weight = nn.Parameter(values, requires_grad=False)
    return linear


LAYERS = {
    **BASES,
    "torchao int8, groups": torchao("Int8WeightOnlyConfig", lambda q: {"granularity": q.PerGroup(16)}),
    "torchao int8, asymmetric": asymmetric_int8,
    "torchao float8, one scale": torchao("Float8WeightOnlyConfig", lambda q: {"granularity": q.PerTensor()}),
    "torchao int3": torchao("IntxWeightOnlyConfig", _int3),
    **{f"HQQ {bits}, axis {axis}": partial(hqq, bits=bits, axis=axis) for bits in (8, 4, 3, 2, 1) for axis in (0, 1)},
    "HQQ, as floats": partial(hqq, view_as_float=True),
    "GPTQ 8": partial(packed_layers.TorchLinear, bits=8),
    "GPTQ 2, in no order": partial(packed_layers.TorchLinear, bits=2, shuffled=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", list(LAYERS))
def test_values_are_those_that_the_library_decodes_bit_for_bit(layer: str, dtype: torch.dtype) -> None:
    base = LAYERS[layer](nn.Linear(64, 96, dtype=dtype).requires_grad_(False))
    reader = quantised.reader(base)
    assert reader is not None
    found = reader.frozen_base(base, torch.randn(3, 64, dtype=dtype), None)
    assert not isinstance(found, str), found
    weight = found[0]
    expected = values(base)
    assert expected is not None and expected.shape == weight.shape == (96, 64)
    assert torch.equal(weight.decode(dtype=expected.dtype), expected)
    assert torch.equal(weight.decode(dtype=expected.dtype, rows=(5, 38)), expected[5:38])
    dense = reader.dense_linear(base).weight
    assert torch.allclose(dense, expected.float(), rtol=torch.finfo(expected.dtype).eps, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llm_int8_decodes_as_the_library_bit_for_bit(dtype: torch.dtype) -> None:
    """Its product of the identity, where it multiplies by the decoded weight: on a CPU in training."""
    base: Any = BASES["LLM.int8"](nn.Linear(64, 96, bias=False, dtype=dtype)).train()
    found = quantised.frozen_base(bitsandbytes_int8, base, torch.randn(3, 64, dtype=dtype), None)
    assert not isinstance(found, str), found
    assert torch.equal(found[0].decode(), base(torch.eye(64, dtype=dtype)).t())


@pytest.mark.parametrize("threshold", [0.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llm_int8_multiplies_as_the_library_where_it_quantises_x(threshold: float, dtype: torch.dtype) -> None:
    """In evaluation mode on a CPU, and always on a GPU, x is quantised too; some columns are outliers."""
    model = make("LLM.int8", dtype=dtype, sizes=TINY).eval()
    for layer in quantised_layers(model):
        layer.state.threshold = threshold
    inputs = batch(model)
    peft = step(model, inputs)
    fastpeft.accelerate(model, mlp=False)
    ours = [step(model, inputs) for _ in range(2)][1]
    assert notes(model) == ""
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(2, 20, 64, dtype=dtype)
    asked = layer.request(x)
    expected = layer.base_layer(x) if layer.base_layer.bias is None else None
    assert torch.equal(asked.projection.weight.linear(x.view(-1, 64)).view(2, 20, -1), expected)
    for name, gradient in peft.gradients.items():  # what rounds otherwise before may fall to another of the 255 numbers
        assert (ours.gradients[name] - gradient).norm() < 0.05 * gradient.norm()


@pytest.mark.parametrize("base", ["LLM.int8", "torchao int8"])
def test_loaded_and_merged_as_transformers_and_peft_do(base: str, tmp_path: Path) -> None:
    """Whole layers, frozen ones beside adapted ones; a merge quantises anew, and what it did is undone alike."""
    make_base("llama", torch.bfloat16).save_pretrained(tmp_path)
    if base == "LLM.int8":
        settings: Any = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = TorchAoConfig(quant_type=pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    model = with_lora(prepare_model_for_kbit_training(loaded), target_modules=["q_proj", "v_proj"]).train()
    inputs = batch(model)
    peft = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_accelerated_close(model, inputs, truth(model, inputs))
    frozen = {f"frozen_linear over {base}"} if base == "torchao int8" else set()
    assert {row.op for row in adapter_rows(model)} == {f"lora_linear over {base}"} | frozen
    assert notes(model) == ""
    for each in (model, peft):
        each.merge_adapter()
    merged = [values(module) for module in quantised_layers(model)]
    assert all(torch.equal(*pair) for pair in zip(merged, map(values, quantised_layers(peft)), strict=True))
    for each in (model, peft):
        each.unmerge_adapter()
    with torch.autocast("cpu", torch.bfloat16):
        assert_step_close(step(model, inputs), step(peft, inputs), truth(peft, inputs))


def test_bases_that_are_not_read_name_themselves() -> None:
    base = make_base(**TINY)
    torchao("Int8DynamicActivationInt8WeightConfig")(base.model.layers[0].self_attn.q_proj)
    model = fastpeft.accelerate(with_lora(base, target_modules=["q_proj"]))
    with torch.no_grad():
        model(**batch(model, rows=2, tokens=10))
    assert "torchao int8: a weight whose product quantises or scales the input too (act_quant_kwargs)" in notes(model)


def test_another_version_s_storage_is_left_to_peft_and_named() -> None:
    """Attributes that are not where they were, and sizes that do not fit."""
    model = fastpeft.accelerate(make("GPTQ", sizes=TINY, target_modules=["q_proj", "o_proj"]))
    attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
    del attention.o_proj.base_layer.g_idx
    attention.q_proj.base_layer.qzeros = torch.zeros(1, 1, dtype=torch.int32)
    with torch.no_grad():
        model(**batch(model, rows=2, tokens=10))
    assert "GPTQ: storage that cannot be read: zeros: expected shape" in notes(model)
    assert "GPTQ: storage that cannot be read: 'TorchLinear' object has no attribute 'g_idx'" in notes(model)


@pytest.mark.parametrize("block", [(1, 0), (1, 48)])
def test_torchao_s_blocks_that_do_not_fit(block: tuple[int, int]) -> None:
    base = BASES["torchao int8"](nn.Linear(64, 96))
    base.weight.block_size = block
    found = quantised.frozen_base(torchao_reader, base, torch.randn(3, 64), None)
    assert isinstance(found, str) and found.startswith("torchao int8: storage that cannot be read: "), found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["torchao int8", "torchao float8", "torchao int4"])
def test_torchao_s_dtype_of_the_result(base: str, bias_dtype: torch.dtype, autocast: bool) -> None:
    """Float8Tensor adds the bias by itself."""
    layer: Any = BASES[base](nn.Linear(64, 96).requires_grad_(False))
    layer.bias = nn.Parameter(layer.bias.to(bias_dtype), requires_grad=False)
    x = torch.randn(3, 64)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = layer(x).dtype
    except RuntimeError:  # a matrix and a bias of two dtypes
        return
    found = quantised.frozen_base(torchao_reader, layer, x, torch.bfloat16 if autocast else None)
    assert found[2] == expected


@pytest.mark.parametrize("base", ["HQQ", "LLM.int8", "torchao int8", "GPTQ"])
def test_a_write_to_the_codes_between_forward_and_backward_is_noticed(base: str) -> None:
    model = fastpeft.accelerate(make(base, sizes=TINY, target_modules=["q_proj"]))
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    y, inner = layer(torch.randn(2, 20, 64, requires_grad=True)), layer.base_layer
    codes = {
        "HQQ": lambda: inner.W_q,
        "LLM.int8": lambda: inner.weight.CB,
        "torchao int8": lambda: inner.weight.qdata,
        "GPTQ": lambda: inner.qweight,
    }[base]()
    with torch.no_grad():
        codes.zero_()
    with pytest.raises(RuntimeError, match="frozen base weight"):
        y.sum().backward()


def test_layers_of_other_libraries_are_left_to_peft_and_named() -> None:
    """FP8GroupedLinear multiplies groups of features; PEFT puts its plain LoRA layer over it."""
    base = make_base(**TINY)
    attention = base.model.layers[0].self_attn
    attention.q_proj = FP8GroupedLinear(64, 64, 1, (32, 32)).requires_grad_(False)
    model = fastpeft.accelerate(with_lora(base, target_modules=["q_proj", "o_proj"]))
    left = {row.path.rpartition(".")[2]: row.note for row in fastpeft.report(model).left}
    assert left == {"q_proj": "no op for a base layer of type FP8GroupedLinear"}
    eetq = type("EetqLoraLinear", (GPTQLoraLinear,), {})
    attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
    layer = eetq(packed_layers.TorchLinear(nn.Linear(64, 64)), "default", LoraConfig(), r=4, lora_alpha=4)
    attention.o_proj = layer
    left = {row.path.rpartition(".")[2]: row.note for row in fastpeft.report(fastpeft.accelerate(model)).left}
    assert left["o_proj"] == "no op for lora.EetqLoraLinear yet"
