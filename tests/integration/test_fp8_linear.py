"""LoRA over transformers' FP8Linear: its own product by default, the decoded weight where that is asked for."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.integrations import finegrained_fp8 as library
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, FP8Linear

import fastpeft
from fastpeft.integrations import finegrained_fp8, quantised
from fastpeft.layers.fp8 import NEVER, asked
from tests.budget import assert_within_budget
from tests.integration.bases import PROJECTIONS
from tests.integration.fp8_layers import fp8_linear, product
from tests.integration.models import batch, make_base, trained
from tests.integration.reports import adapter_rows, mlp_rows, notes
from tests.integration.steps import assert_step_close, step, truth

OVER = "lora_linear over transformers FP8"


@pytest.fixture
def decodes() -> None:
    if not hasattr(library, "_dequantize_fp8_weight"):
        pytest.skip("this transformers has no gradient through FP8Linear to compare with")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, decodes: None) -> None:
    """The library has no product on a CPU; PEFT then cannot run."""
    monkeypatch.setattr(library, "fp8_linear", product)


def make(dtype: torch.dtype = torch.float32) -> PeftModel:
    model = make_base("llama", dtype, num_hidden_layers=1)
    for path, linear in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in PROJECTIONS:
            setattr(model.get_submodule(parent), name, fp8_linear(linear))
    return trained(get_peft_model(model, LoraConfig(r=4, target_modules=PROJECTIONS)))  # type: ignore[no-any-return]


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Adapters and biases; `model.to(dtype)` would cast the codes too."""
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.endswith("bias"):
            parameter.data = parameter.data.to(dtype)


def dense_twin(model: PeftModel) -> PeftModel:
    """The same over ordinary layers of the values that the library decodes."""
    twin = copy.deepcopy(model)
    for path, layer in list(twin.named_modules()):
        if type(layer) is FP8Linear:
            parent, _, name = path.rpartition(".")
            dense = finegrained_fp8.dense_linear(layer).to(model.dtype)
            setattr(twin.get_submodule(parent), name, dense)
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("on_cpu")
def test_a_layer_gives_the_numbers_of_peft(dtype: torch.dtype, bias: bool) -> None:
    base = nn.Sequential(fp8_linear(nn.Linear(64, 96, bias=bias, dtype=dtype)))
    model = trained(get_peft_model(base, LoraConfig(r=4, target_modules=["0"])))
    cast(model, dtype)
    x, dy = torch.randn(3, 20, 64).to(dtype), torch.randn(3, 20, 96).to(dtype)

    def numbers(model: nn.Module, wide: torch.dtype) -> list[Tensor]:
        leaves = [x.to(wide).requires_grad_(), *[p for p in model.parameters() if p.requires_grad]]
        y = model(leaves[0])
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(wide))]

    peft = numbers(model, dtype)
    wide = copy.deepcopy(model)
    cast(wide, torch.float64)
    exact = numbers(wide, torch.float64)
    fastpeft.accelerate(model)
    for what, ours, same, truly in zip(("y", "dx", "da", "db"), numbers(model, dtype), peft, exact, strict=True):
        assert_within_budget(ours, same, truly, what)
    (row,) = fastpeft.report(model).rows
    assert (row.op, row.note) == (OVER, "")


@pytest.mark.usefixtures("on_cpu")
def test_a_model_s_siblings_and_mlps() -> None:
    model = make()
    inputs = batch(model)
    peft, exact = step(model, inputs), truth(dense_twin(model), inputs)
    fastpeft.accelerate(model)
    for _ in range(2):
        assert_step_close(step(model, inputs), peft, exact)
    assert {row.op for row in adapter_rows(model)} == {OVER}
    assert {row.op for row in mlp_rows(model)} == {"lora_mlp"}
    assert {row.partners for row in adapter_rows(model) if "q_proj" in row.path} == {"one of 3"}
    assert notes(model) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoded_weight_where_it_is_asked_for(dtype: torch.dtype) -> None:
    """Without any product of the library's: as PEFT over ordinary layers of the same values."""
    model = make(dtype)
    inputs = batch(model)
    twin = dense_twin(model)
    peft, exact = step(twin, inputs), truth(twin, inputs)
    fastpeft.accelerate(model, fp8_compute="never")
    for _ in range(2):
        assert_step_close(step(model, inputs), peft, exact)
    assert {row.op for row in adapter_rows(model)} == {f"{OVER}, products with the decoded weight"}
    assert notes(model) == ""
    with torch.no_grad():  # few tokens, which else PEFT would get
        torch.testing.assert_close(model(**inputs).loss, twin(**inputs).loss, rtol=0.0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("block", "scale_fmt"), [((32, 32), "float"), ((16, 64), "ue8m0"), (None, "float")])
def test_values_are_bit_for_bit_the_library_s(
    dtype: torch.dtype, block: tuple[int, int] | None, scale_fmt: str
) -> None:
    layer = fp8_linear(nn.Linear(64, 96), block, scale_fmt)
    decode: Any = Fp8Dequantize(None)
    scale = layer.weight_scale_inv.reshape(1, 1) if block is None else layer.weight_scale_inv
    expected = decode._dequantize_one(layer.weight, scale, dtype)
    with asked(layer, NEVER):
        decoded_only = quantised.frozen_base(finegrained_fp8, layer, torch.zeros(2, 64, dtype=dtype), None)
    default = quantised.frozen_base(finegrained_fp8, layer, torch.zeros(2, 64, dtype=dtype), None)
    for found in (decoded_only, default):
        assert not isinstance(found, str)
        assert torch.equal(found[0].decode(dtype=dtype), expected) and found[1:] == (dtype, dtype)
    again = type(default[0]).unflatten(*default[0].flatten())
    assert torch.equal(again.decode(dtype=dtype), expected)


def test_blocks_that_do_not_fill_the_matrix(decodes: None) -> None:
    layer = fp8_linear(nn.Linear(72, 40), (32, 32))
    with asked(layer, NEVER):
        found = quantised.frozen_base(finegrained_fp8, layer, torch.zeros(2, 72), None)
    expected = library._dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, (32, 32), torch.float32)
    assert torch.equal(found[0].decode(), expected)


def test_what_is_asked_of_the_library_s_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, of this version and of an older one."""
    layer = fp8_linear(nn.Linear(64, 96))
    layer.activation_scale, layer._deepgemm_disabled = nn.Parameter(torch.tensor(0.5), requires_grad=False), True
    weight = quantised.frozen_base(finegrained_fp8, layer, torch.zeros(2, 64), None)[0]
    seen: dict[str, Any] = {}

    def recorded(*names: str) -> Any:
        """A function with keywords of these names beside those of every version."""
        every = ("input", "weight", "weight_scale_inv", "block_size", "bias", "activation_scale", *names)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD

        def function(*args: Any, **kwargs: Any) -> Tensor:
            seen.update(function.__signature__.bind(*args, **kwargs).arguments)  # type: ignore[attr-defined]
            return seen["input"]  # type: ignore[no-any-return]

        parameters = [inspect.Parameter(name, kind, default=None) for name in every]
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return function

    x = torch.zeros(2, 64)
    for function in (recorded("allow_deepgemm"), recorded("output_dtype")):
        monkeypatch.setattr(library, "fp8_linear", function)
        weight.linear(x)
        assert (seen["block_size"], seen.get("bias"), seen["activation_scale"].item()) == ([32, 32], None, 0.5)
        assert seen["weight"].data_ptr() == layer.weight.data_ptr() and seen["input"] is x
    assert seen["allow_deepgemm"] is False and seen["output_dtype"] == torch.float32


def test_what_cannot_be_read_is_left_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = fp8_linear(nn.Linear(64, 96)), torch.zeros(2, 64)
    monkeypatch.delattr(library, "fp8_linear")
    found = quantised.frozen_base(finegrained_fp8, layer, x, None)
    assert found == "transformers FP8: a version of transformers without fp8_linear"
    layer.requires_grad_(True)
    assert quantised.frozen_base(finegrained_fp8, layer, x, None) == "transformers FP8: the base weight is trained"
    layer = fp8_linear(nn.Linear(64, 96))
    layer.weight = nn.Parameter(torch.zeros(96, 32, dtype=torch.int8), requires_grad=False)  # FP4, two in a byte
    assert "a weight in torch.int8" in quantised.frozen_base(finegrained_fp8, layer, x, None)
    layer.weight = nn.Parameter(torch.zeros(96, 64), requires_grad=False)  # decoded when it was loaded
    assert quantised.reader(layer) is None
