"""Products in FP8 where they were asked for: who makes them, when their copies are made again, what they cost.

On a CPU they are emulated, which `accelerate` refuses to do for a user.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import fastpeft
from fastpeft.layers.fp8 import BOTH, FORWARD, asked, products_of
from fastpeft.replacements import fp8
from fastpeft_kernels.fp8 import quantise_rows, scaled_product
from tests.integration.bases import make as over
from tests.integration.models import batch, make
from tests.integration.reports import adapter_rows, mlp_rows, notes
from tests.integration.steps import Step, step
from tests.integration.test_fp8_linear import make as over_fp8_linear

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this CPU had products in FP8."""
    monkeypatch.setattr(fp8, "fp8_refusal", lambda device: None)


def distance(a: Step, b: Step) -> float:
    """Over all gradients, relative."""
    x, y = (torch.cat([g.flatten() for _, g in sorted(s.gradients.items())]) for s in (a, b))
    return ((x - y).norm() / y.norm()).item()


def layer_of(model: nn.Module) -> Any:
    return model.get_submodule(Q_PROJ)


def frozen_product(layer: Any, x: Tensor) -> Tensor:
    """Of a layer whose adapter adds nothing."""
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    return layer(x.requires_grad_()).detach()  # type: ignore[no-any-return]


def in_e4m3(x: Tensor, w: Tensor) -> Tensor:
    return scaled_product(quantise_rows(x.detach().flatten(0, -2)), quantise_rows(w.detach()), x.dtype).view(
        *x.shape[:-1], -1
    )


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("setting", [FORWARD, BOTH])
def test_a_model_computes_nearly_the_same(setting: Any) -> None:
    model = make(dtype=torch.float32)
    inputs = batch(model)
    peft = step(model, inputs)
    fastpeft.accelerate(model, fp8_compute=setting)
    first, second = step(model, inputs), step(model, inputs)
    assert first.equals(second)
    assert 1e-3 < distance(first, peft) < 0.2, "e4m3 has 4 significant bits"
    words = {FORWARD: "lora_linear, x W^T in FP8", BOTH: "lora_linear, in FP8"}[setting]
    assert {row.op for row in adapter_rows(model)} == {words} and notes(model) == ""
    assert {row.op for row in mlp_rows(model)} == {"lora_mlp"}
    assert {row.partners for row in adapter_rows(model) if "q_proj" in row.path} == {"one of 3"}
    fastpeft.accelerate(model)  # without it again
    assert distance(step(model, inputs), peft) < 1e-5


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("setting", [FORWARD, BOTH])
def test_which_products_are_in_fp8(setting: Any) -> None:
    model = make(dtype=torch.float32, target_modules=["q_proj"])
    fastpeft.accelerate(model, fp8_compute=setting)
    layer, x, dy = layer_of(model), torch.randn(2, 30, 64), torch.randn(2, 30, 64)
    w = layer.base_layer.weight
    assert torch.equal(frozen_product(layer, x), in_e4m3(x, w))
    (dx,) = torch.autograd.grad(layer(x), x, dy)
    expected = in_e4m3(dy, w.t()) if setting == BOTH else dy @ w
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # few tokens are computed in the same way
        assert torch.equal(layer(x[:, :2]), in_e4m3(x[:, :2], w))


@pytest.mark.usefixtures("emulated")
def test_a_changed_weight_is_quantised_again() -> None:
    model = make(dtype=torch.float32, target_modules=["q_proj"])
    fastpeft.accelerate(model, fp8_compute="both")
    layer, x = layer_of(model), torch.randn(2, 30, 64)
    weight = layer.base_layer.weight
    made = products_of(layer.base_layer)._made
    assert made is not None, "made by accelerate, not in the first call"
    layer(x)
    assert products_of(layer.base_layer)._made is made
    y = layer(x.requires_grad_())
    with torch.no_grad():
        weight.mul_(-2.0)
    with pytest.raises(RuntimeError, match="frozen base weight"):
        y.sum().backward()
    assert torch.equal(frozen_product(layer, x), in_e4m3(x, weight))
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.merge()
    torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.t())  # PEFT's own
    layer.unmerge()
    assert torch.equal(frozen_product(layer, x), in_e4m3(x, weight))
    layer.base_layer.load_state_dict({"weight": torch.randn(64, 64)}, assign=True)
    layer.base_layer.requires_grad_(False)
    assert torch.equal(frozen_product(layer, x), in_e4m3(x, layer.base_layer.weight))


@pytest.mark.usefixtures("emulated")
def test_an_adapter_that_begins_in_the_base_s_place() -> None:
    """OLoRA writes into it through `.data`, which torch does not count."""
    model = make(dtype=torch.float32, target_modules=["q_proj"])
    fastpeft.accelerate(model, fp8_compute="both")
    layer, x = layer_of(model), torch.randn(2, 30, 64)
    before, y = layer.base_layer.weight.clone(), layer(x.requires_grad_())
    model.add_adapter("olora", LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"))
    assert not torch.equal(layer.base_layer.weight, before)
    with pytest.raises(RuntimeError, match="frozen base weight"):
        y.sum().backward()
    assert torch.equal(frozen_product(layer, x), in_e4m3(x, layer.base_layer.weight))


@pytest.mark.usefixtures("emulated")
def test_copies_pickles_casts_and_state() -> None:
    model = make(dtype=torch.float32, target_modules=["q_proj"])
    keys = list(model.state_dict())
    fastpeft.accelerate(model, fp8_compute="both")
    assert list(model.state_dict()) == keys
    layer, x = layer_of(model), torch.randn(2, 30, 64)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert products_of(copied.base_layer)._made is None
        assert torch.equal(copied(x), layer(x))
    model.to(torch.bfloat16)
    assert products_of(layer.base_layer)._made is None
    narrow = x.to(torch.bfloat16)
    assert torch.equal(
        frozen_product(layer, narrow), in_e4m3(narrow.detach().float(), layer.base_layer.weight).bfloat16()
    )
    fastpeft.restore(model)
    assert "fastpeft_fp8" not in layer.base_layer.__dict__ and "fastpeft_fp8_left" not in layer.__dict__


@pytest.mark.usefixtures("emulated")
def test_layers_that_are_left_are_named() -> None:
    model = make("gpt2", target_modules=["c_attn", "c_fc"])
    block = model.get_submodule("base_model.model.transformer.h.0")
    inner = block.get_submodule("mlp.c_fc.base_layer")
    inner.weight = nn.Parameter(torch.randn(64, 250), requires_grad=False)  # type: ignore[assignment]
    fastpeft.accelerate(model, fp8_compute="both", fp8_exclude=["*.h.1.attn.*"])
    rows = {row.path.partition("transformer.")[2]: (row.op, row.note) for row in adapter_rows(model)}
    assert rows == {
        "h.0.attn.c_attn": ("lora_linear, in FP8", ""),
        "h.0.mlp.c_fc": (
            "lora_linear",
            "fp8_compute: left in 16 bits, 250 x 64 features, which are no multiples of 16",
        ),
        "h.1.attn.c_attn": ("lora_linear", "fp8_compute: left in 16 bits, named by fp8_exclude"),
        "h.1.mlp.c_fc": ("lora_linear, in FP8", ""),
    }


@pytest.mark.usefixtures("emulated")
def test_over_other_bases() -> None:
    """A base of another library is left; over FP8Linear the products are ours, or with the decoded weight."""
    model = fastpeft.accelerate(over("LLM.int8", sizes={"num_hidden_layers": 1}), fp8_compute="both")
    assert {row.op for row in adapter_rows(model)} == {"lora_linear over LLM.int8"}
    assert all("left in 16 bits, a base layer of type Linear8bitLt" in row.note for row in adapter_rows(model))
    model = over_fp8_linear()
    inputs = batch(model)
    exact = step(fastpeft.accelerate(model, fp8_compute="never"), inputs)
    fastpeft.accelerate(model, fp8_compute="both", fp8_exclude=["*.down_proj"])
    assert 1e-3 < distance(step(model, inputs), exact) < 0.2
    ops = {row.path.rpartition(".")[2]: row.op for row in adapter_rows(model)}
    assert ops.pop("down_proj") == "lora_linear over transformers FP8, products with the decoded weight"
    assert set(ops.values()) == {"lora_linear over transformers FP8, in FP8"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"fp8_compute": "both"},
            ValueError,
            "fp8_compute: expected a GPU of compute capability 8.9 or newer, got cpu",
        ),
        ({"fp8_compute": True}, ValueError, "fp8_compute: expected None or one of"),
        ({"fp8_exclude": ["*"]}, ValueError, "fp8_exclude: expected no patterns without products in FP8"),
        ({"fp8_compute": "both", "fp8_exclude": "*"}, TypeError, "fp8_exclude: expected a list of patterns"),
        ({"fp8_compute": "both", "fp8_exclude": None}, TypeError, "fp8_exclude: expected a list of patterns"),
        ({"fp8_compute": "both", "fp8_exclude": iter(["*"])}, TypeError, "fp8_exclude: expected a list of patterns"),
        ({"fp8_compute": "both", "lora": False}, ValueError, "fp8_compute: expected None with lora=False, got 'both'"),
        ({"fp8_compute": "both", "fp8_exclude": ["x"]}, ValueError, r"match a module's name, got \['x'\]"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make(dtype=torch.float32)
    with pytest.raises(error, match=message):
        fastpeft.accelerate(model, **arguments)
    assert not fastpeft.report(model).accelerated, "refused before anything is changed"


@pytest.mark.usefixtures("emulated")
def test_verify_does_not_pass_them() -> None:
    model = make(dtype=torch.float32, target_modules=["q_proj"])
    assert not fastpeft.verify(fastpeft.accelerate(model, fp8_compute="both"), batch(model)).passed
    assert fastpeft.verify(fastpeft.accelerate(model), batch(model)).passed


class TestReport:
    """fp8_report, on a CPU and without a GPU in sight."""

    def test_every_layer_s_output_and_gradient(self) -> None:
        model = fastpeft.accelerate(make(dtype=torch.float32))
        inputs = batch(model)
        before = step(model, inputs)
        report = fastpeft.fp8_report(model, inputs, limit=0.0)
        assert step(model, inputs).equals(before), "the model is as it was"
        assert len(report.rows) == 2 * len(adapter_rows(model)) and report.left == {}
        assert all(0.002 < row.norm < 0.1 and row.largest < 0.2 and row.cosine > 0.99 for row in report.rows)
        assert set(report.above) == {row.path for row in adapter_rows(model)}
        assert f"above: {Q_PROJ}" in str(report) and report.to_dict()["above"] == list(report.above)

    def test_figures(self) -> None:
        """Of one layer, computed once more from the definition."""
        model = fastpeft.accelerate(make(dtype=torch.float32, target_modules=["q_proj"]))
        layer, inputs = layer_of(model), batch(model)
        seen: dict[str, Tensor] = {}
        nn.init.zeros_(layer.lora_A["default"].weight)  # nothing but the frozen product
        layer.lora_A["default"].weight.data[0, 0] = 1e-30
        handle = layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach()))
        report = fastpeft.fp8_report(model, inputs, fp8_compute="forward", limit=1e-6)
        handle.remove()
        rows = {row.what: row for row in report.rows if row.path == Q_PROJ}
        w = layer.base_layer.weight
        ours, exact = in_e4m3(seen["x"], w), seen["x"] @ w.t()
        assert rows["output"].norm == pytest.approx(((ours - exact).norm() / exact.norm()).item(), rel=1e-3)
        assert rows["output"].largest == pytest.approx(
            ((ours - exact).abs().max() / exact.abs().max()).item(), rel=1e-3
        )
        cosine = torch.nn.functional.cosine_similarity(ours.flatten(), exact.flatten(), dim=0).item()
        assert rows["output"].cosine == pytest.approx(cosine, abs=1e-5)
        assert rows["gradient of x"].norm < 1e-6, "in 16 bits with 'forward'"

    def test_layers_that_cannot(self) -> None:
        model = fastpeft.accelerate(over("LLM.int8", sizes={"num_hidden_layers": 1}))
        report = fastpeft.fp8_report(model, batch(model))
        assert report.rows == () and report.above == ()
        assert set(report.left.values()) == {"a base layer of type Linear8bitLt"}
        assert f"left in 16 bits: {Q_PROJ}: a base layer" in str(report)

    def test_bad_arguments(self) -> None:
        with pytest.raises(TypeError, match="model: expected"):
            fastpeft.fp8_report("model")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="model: no accelerated layer"):
            fastpeft.fp8_report(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="fp8_compute: expected 'forward' or 'both'"):
            fastpeft.fp8_report(nn.Linear(2, 2), fp8_compute="never")
        with pytest.raises(TypeError, match="batch: expected a mapping of the forward's arguments, got list"):
            fastpeft.fp8_report(nn.Linear(2, 2), [1])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="limit: expected a number or None, got 'x'"):
            fastpeft.fp8_report(nn.Linear(2, 2), limit="x")  # type: ignore[arg-type]


def test_no_products_in_fp8_under_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastpeft.accelerate(make(dtype=torch.float32, target_modules=["q_proj"]))
    base = layer_of(model).base_layer
    with asked(base, BOTH):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        weight: Any = object()
        assert products_of(base).weight(weight) is weight
