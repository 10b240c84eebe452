"""`verify` passes where the numbers are right, fails where they are not, and leaves the model as it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import fastpeft
from fastpeft.verification import TWINS, _compare_models
from fastpeft_kernels.lora import library, lora_embedding
from tests.integration.models import ARCHITECTURES, batch, make, make_base, with_lora
from tests.integration.quantised import make_quantised
from tests.integration.reports import mlp_rows
from tests.integration.steps import step

full = pytest.mark.full
SERVED = [pytest.param(name, marks=[] if name in ("llama", "bert", "t5") else full) for name in ARCHITECTURES]


class TestVerifyPasses:
    @pytest.mark.parametrize("name", SERVED)
    def test_on_dense_bases(self, name: str) -> None:
        passes(fastpeft.accelerate(make(name)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=full)])
    def test_on_halves(self, dtype: torch.dtype) -> None:
        passes(fastpeft.accelerate(make("llama", dtype)))

    @pytest.mark.parametrize("name", ["llama", pytest.param("bert", marks=full), pytest.param("t5", marks=full)])
    @pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
    def test_on_nf4(self, name: str, compute_dtype: torch.dtype) -> None:
        model = fastpeft.accelerate(make_quantised(name, compute_dtype=compute_dtype))
        if (name, compute_dtype) != ("t5", torch.bfloat16):
            return passes(model)
        outcome = fastpeft.verify(model)  # transformers keeps T5's `wo` in fp32, which runs its MLPs part by part
        assert outcome.passed and set(outcome.unserved) == {row.path for row in mlp_rows(model)}

    @pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
    def test_under_autocast(self, nf4: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            passes(fastpeft.accelerate(make_quantised() if nf4 else make()))

    def test_with_fresh_adapters_whose_lora_b_is_zero(self) -> None:
        config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)
        passes(fastpeft.accelerate(get_peft_model(make_base(), config)))

    def test_on_a_batch_of_one_s_own(self) -> None:
        model = fastpeft.accelerate(make())
        assert fastpeft.verify(model, batch(model)).passed

    def test_on_frozen_adapters(self) -> None:
        """Loaded for inference: nothing is trained."""
        model = fastpeft.accelerate(make()).requires_grad_(False)
        passes(model)
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_with_several_adapters_and_with_merged_ones(self) -> None:
        model = make()
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        model.base_model.set_adapter(["default", "second"])
        passes(fastpeft.accelerate(model))
        model.merge_adapter()
        outcome = fastpeft.verify(model)
        assert not outcome.failures and len(outcome.unserved) == 14 + 2 and "not served by an op" in str(outcome)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["embed_tokens"]], ids=["with layers", "alone"])
    def test_on_embeddings_whose_lora_a_is_zero(self, targets: list[str], dtype: torch.dtype) -> None:
        config = LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
        model = fastpeft.accelerate(get_peft_model(make_base(dtype=dtype, num_hidden_layers=1), config))
        passes(model)
        (factor,) = [p for name, p in model.named_parameters() if "lora_embedding_A" in name]
        assert not factor.any() and factor.grad is None

    def test_inside_no_grad(self) -> None:
        model = fastpeft.accelerate(make())
        with torch.no_grad():
            passes(model)


class TestVerifyFails:
    """A proof that cannot fail is none."""

    @pytest.mark.parametrize(
        ("sabotage", "nf4"),
        [
            pytest.param(sabotage, nf4, marks=full if nf4 and sabotage not in ("scaling", "gradient of x") else ())
            for nf4 in (False, True)
            for sabotage in ("scaling", "swapped", "gradient of a", "gradient of b", "gradient of x", "bias")
        ],
    )
    @pytest.mark.usefixtures("groups_in_python")
    def test_when_an_op_is_wrong(self, sabotage: str, nf4: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = {"num_hidden_layers": 1}
        base = make_quantised("qwen2", sizes=sizes) if nf4 else with_lora(make_base("qwen2", **sizes)).train()
        model = fastpeft.accelerate(base)
        step(model, batch(model))
        monkeypatch.setattr(library, *SABOTAGE[sabotage])
        outcome = fastpeft.verify(model)
        assert not outcome.passed and outcome.failures
        assert "FAILED" in str(outcome)
        assert any(failure.path for failure in outcome.failures), "no layer is named"
        monkeypatch.undo()
        assert fastpeft.verify(model).passed

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_when_one_layer_misreads_it_is_the_one_named(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fastpeft.layers.lora import FastLoraLayer

        model = fastpeft.accelerate(make(dtype=dtype))
        path = "base_model.model.model.layers.1.mlp.down_proj"
        wrong, request = model.get_submodule(path), FastLoraLayer.request

        def off(self: Any, x: Tensor, row_names: Any = None) -> Any:
            """Reads the wrong scaling, as for a layer whose alpha differs."""
            made = request(self, x)
            if self is wrong:
                for adapter in made.projection.adapters:  # type: ignore[union-attr]
                    object.__setattr__(adapter, "scaling", adapter.scaling * 1.03)
            return made

        monkeypatch.setattr(FastLoraLayer, "request", off)
        named = {failure.path for failure in fastpeft.verify(model).failures if failure.path}
        assert named == {path, path.rpartition(".")[0]}

    @pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm"])
    @pytest.mark.parametrize("wrong", ["form", "values"])
    def test_when_a_norm_is_wrong_it_is_the_one_named(
        self, wrong: str, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However few its numbers, which on a CPU the model's own code computes; the first one too, whose input has no
        gradient."""
        model = fastpeft.accelerate(with_lora(make_base(num_hidden_layers=1)).train())
        path = f"base_model.model.model.layers.0.{name}"
        norm: Any = model.get_submodule(path)
        checked = {check.path for check in fastpeft.verify(model).checks}
        assert {path, "base_model.model.model.norm"} <= checked
        if wrong == "form":
            norm.fastpeft_norm = norm.fastpeft_norm._replace(offset=1e-3)
        else:
            fused = norm.fused
            monkeypatch.setattr(norm, "fused", lambda x: fused(x) * 1.001)
        assert {failure.path for failure in fastpeft.verify(model).failures} == {path}

    @pytest.mark.parametrize("wrong", ["output", "gradients"])
    def test_when_an_embedding_is_wrong(self, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
        config = LoraConfig(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = fastpeft.accelerate(get_peft_model(make_base(num_hidden_layers=1), config))

        def off(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
            right, wider = lora_embedding(y, ids, a, b, **options), lora_embedding(y, ids, a * 1.01, b, **options)
            return wider if wrong == "output" else wider + (right - wider).detach()

        monkeypatch.setattr("fastpeft.layers.embedding.lora_embedding", off)
        failed = fastpeft.verify(model).failures
        embedding = "base_model.model.model.embed_tokens"
        assert {failure.path for failure in failed} == {embedding, ""}, "by itself, and in the whole model"

    @pytest.mark.usefixtures("groups_in_python")
    def test_for_numbers_that_are_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = fastpeft.accelerate(make())
        monkeypatch.setattr(
            library, *spoiled("forward", lambda result: ([y * float("nan") for y in result[0]], result[1]))
        )
        assert not fastpeft.verify(model).passed


class TestVerifyLeavesNoTrace:
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
    def test_on_the_model(self, training: bool, nf4: bool) -> None:
        model: PeftModel = fastpeft.accelerate(make_quantised() if nf4 else make(lora_dropout=0.1))
        model.train(training)
        model.get_submodule("base_model.model.model.layers.0").eval()
        step(model, batch(model))
        model(**batch(model)).loss.backward()
        before = everything(model)
        random_state = torch.get_rng_state()
        fastpeft.verify(model)
        assert torch.equal(torch.get_rng_state(), random_state)
        after = everything(model)
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name], name

    def test_on_what_was_suspended_before(self) -> None:
        """As `restore` leaves modules whose class another library has replaced."""
        config = LoraConfig(target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
        model = fastpeft.accelerate(get_peft_model(make_base(num_hidden_layers=1), config), norms=False)
        left: list[Any] = [module for module in model.modules() if hasattr(module, "fastpeft_suspended")]
        for module in left:
            module.fastpeft_suspended = True
        fastpeft.verify(model)
        assert len(left) == 4 and all(module.fastpeft_suspended for module in left)

    def test_when_it_is_interrupted(self) -> None:
        model = fastpeft.accelerate(make())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        before = everything(model)
        with pytest.raises(ValueError, match="input_ids"):
            fastpeft.verify(model, {"no_such_argument": torch.zeros(1)})
        after = everything(model)
        assert all(torch.equal(v, after[n]) if isinstance(v, Tensor) else v == after[n] for n, v in before.items())


def passes(model: nn.Module) -> None:
    outcome = fastpeft.verify(model)
    assert outcome.passed, str(outcome)
    assert not outcome.unserved and "verify: passed" in str(outcome)
    served = {check.path for check in outcome.checks if check.path}
    rows = fastpeft.report(model).rows
    norms = {row.path for row in rows if row.op in ("rms_norm", "layer_norm")}
    assert bool(norms) == bool(served & norms)  # all but those in front of which nothing is trained
    # attention, rotary embeddings and loss are in the whole model's figures alone
    others = ("attention", "norms", "loss")
    assert served - norms == {row.path for row in rows if row.kind not in others}


def spoiled(name: str, change: Callable[[Any], Any]) -> tuple[str, Callable[..., Any]]:
    """`library`'s function with its result changed."""
    function = getattr(library, name)
    return name, lambda *args, **kwargs: change(function(*args, **kwargs))


def _scaled_a_little(result: Any, which: int) -> Any:
    dx, grads = result
    for i, group in enumerate(grads):
        grads[i] = [g if g is None or k % 3 != which else g * 1.01 for k, g in enumerate(group)]
    return dx, grads


def _pack_scaled(packed: Any) -> Any:
    packed.b = [None if b is None else b * 1.001 for b in packed.b]
    return packed


def _swapped(result: Any) -> Any:
    outputs, s = result
    if len(outputs) == 3:
        outputs[1], outputs[2] = outputs[2], outputs[1]  # k and v have the same shape
    return outputs, s


SABOTAGE = {
    "scaling": spoiled("pack", _pack_scaled),
    "swapped": spoiled("forward", _swapped),
    "gradient of a": spoiled("backward", lambda result: _scaled_a_little(result, 1)),
    "gradient of b": spoiled("backward", lambda result: _scaled_a_little(result, 2)),
    "gradient of x": spoiled("backward", lambda result: (None if result[0] is None else result[0] * 1.01, result[1])),
    "bias": spoiled("forward", lambda result: ([y + 1e-3 for y in result[0]], result[1])),
}


def everything(model: nn.Module) -> dict[str, Any]:
    """Values, gradients, training flags, trained flags and what the report says."""
    found: dict[str, Any] = {
        f"value {name}": value.clone() for name, value in model.state_dict(keep_vars=False).items()
    }
    for name, parameter in model.named_parameters():
        found[f"trained {name}"] = parameter.requires_grad
        found[f"gradient {name}"] = None if parameter.grad is None else parameter.grad.clone()
    found |= {f"training {path}": module.training for path, module in model.named_modules()}
    found["report"] = fastpeft.report(model).to_dict()
    return found


def test_peft_s_own_rounding_in_a_layer_is_no_error_of_ours() -> None:
    """A head's gradient is a sum over the vocabulary of numbers that nearly cancel; the twin repeats its rounding."""
    peft = {"output": torch.ones(2, 3), "loss": torch.tensor(1.0), "head": torch.ones(4)}
    ours = {**peft, "head": peft["head"] * (1 + 5e-5)}
    for rounding, passed in (({}, False), ({"head": 4e-5}, True), ({"head": 1e-5}, False), ({"other": 1.0}, False)):
        checks = _compare_models(ours, peft, itertools.repeat(dict.fromkeys(peft, 0.0)), rounding)
        assert {check.what: check.passed for check in checks}["gradient of head"] is passed


def test_a_twin_that_is_close_by_chance_is_not_alone_to_judge() -> None:
    """Found in Qwen3.5's linear attention: rounding grows along one direction, and one twin had hardly any of it."""
    peft = {"output": torch.ones(2, 3), "loss": torch.tensor(1.0), "a": torch.ones(4), "b": torch.ones(4)}
    ours = {**peft, "a": peft["a"] * (1 + 2e-5)}
    near, usual = ({"output": 1e-7, "loss": 1e-7, "a": x, "b": 1e-7} for x in (1e-6, 1e-5))

    def passed(*twins: dict[str, float]) -> bool:
        return all(check.passed for check in _compare_models(ours, peft, itertools.chain(twins), {}))

    assert passed(usual)  # and no further one is run
    assert passed(near, *[usual] * (TWINS - 1))
    assert not passed(*[near] * TWINS)
    assert not passed(near, usual, *[near] * (TWINS - 2))
