"""LoRA over quantised bases of several libraries: PEFT's numbers, and who served."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastpeft
from tests.integration.bases import BASES, make, quantised_layers, stand_for_gptqmodel, truth
from tests.integration.models import batch, checkpointed, make_base, with_lora
from tests.integration.reports import adapter_rows, mlp_rows, notes
from tests.integration.steps import assert_accelerated_close, step

full = pytest.mark.full
every_base = pytest.mark.parametrize("base", list(BASES))
TINY = {"num_hidden_layers": 1}


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


@every_base
def test_biases_and_one_projection_alone(base: str) -> None:
    model = make(base, "qwen2", sizes=TINY, target_modules=["q_proj", "down_proj"])
    inputs = batch(model)
    assert_accelerated_close(model, inputs, truth(model, inputs))
    assert notes(model) == ""


@every_base
@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=full)])
def test_checkpointing(base: str, reentrant: bool) -> None:
    model = checkpointed(make(base, sizes=TINY), reentrant)
    inputs = batch(model)
    assert_accelerated_close(model, inputs, truth(model, inputs))
    assert notes(model) == ""


@every_base
def test_verify_passes_and_sees_a_wrong_weight(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastpeft.accelerate(make(base, sizes=TINY))
    found = fastpeft.verify(model)
    assert found.passed, found
    assert not found.unserved
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.o_proj")
    request = layer.request

    def wrong(x: torch.Tensor) -> Any:
        asked = request(x)
        weight = copy.copy(asked.projection.weight)
        weight.decode_rows = lambda out, first, last: out.fill_(0.1)
        weight.linear = lambda x: None
        projection = copy.copy(asked.projection)
        object.__setattr__(projection, "weight", weight)
        return asked._replace(projection=projection)

    monkeypatch.setattr(layer, "request", wrong)
    assert not fastpeft.verify(model).passed


@every_base
def test_restore_gives_peft_back(base: str) -> None:
    model = make(base, sizes=TINY)
    inputs = batch(model)
    before, classes = step(model, inputs), [type(module) for module in model.modules()]
    step(fastpeft.accelerate(model), inputs)
    fastpeft.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert step(model, inputs).equals(before)


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


def test_bases_that_are_not_read_name_themselves() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    base = make_base(**TINY)
    torchao.quantize_(base.model.layers[0].self_attn.q_proj, torchao.Int8DynamicActivationInt8WeightConfig())
    model = fastpeft.accelerate(with_lora(base, target_modules=["q_proj"]))
    with torch.no_grad():
        model(**batch(model, rows=2, tokens=10))
    assert "torchao: a weight whose product quantises or scales the input too (act_quant_kwargs)" in notes(model)
