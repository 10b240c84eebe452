"""LoRA on stacked experts (`target_parameters`): PEFT's numbers without PEFT's stacks, and PEFT's behaviour."""

from __future__ import annotations

import copy
import importlib
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import fastpeft
from fastpeft.layers.experts_structure import ExpertRoles, candidates, proved
from fastpeft_kernels.experts import CLAMPED_SWIGLU, Gating
from tests.integration.mixtures import MIXTURES, experts, make, truth
from tests.integration.models import VOCABULARY, batch, checkpointed, trained
from tests.integration.reports import adapter_rows
from tests.integration.steps import assert_accelerated_close, assert_close, step
from tests.kernels.experts.test_experts import Sizes

FULL = pytest.mark.full


def served(model: nn.Module) -> bool:
    """All wrappers of experts, in all their calls."""
    rows = [row for row in adapter_rows(model) if "experts" in row.path]
    return bool(rows) and all(row.op == "lora_experts" and not row.note for row in rows)


@pytest.mark.parametrize(
    "implementation", ["grouped_mm", pytest.param("eager", marks=FULL), pytest.param("batched_mm", marks=FULL)]
)
@pytest.mark.parametrize("name", MIXTURES)
def test_loss_and_gradients_are_those_of_peft(name: str, implementation: str) -> None:
    model = make(name, implementation=implementation)
    inputs = batch(model)
    assert_accelerated_close(model, inputs, truth(model, inputs))
    assert served(model)


@pytest.mark.parametrize(
    "name", ["mixtral", *(pytest.param(name, marks=FULL) for name in MIXTURES if name != "mixtral")]
)
def test_16_bits(name: str) -> None:
    """A token may take another expert than in fp64 for its rounding, so layers are compared, on the same routing."""
    model = fastpeft.accelerate(make(name, torch.bfloat16))
    layer = experts(model)
    x, index = torch.randn(40, 32).bfloat16(), torch.rand(40, 4).topk(2).indices
    weights = torch.rand(40, 2)
    peft = copy.deepcopy(fastpeft.restore(copy.deepcopy(layer)))
    exact = copy.deepcopy(peft).double()
    exact.get_base_layer().config._experts_implementation = "eager"
    dy = torch.randn(40, 32)
    results = [_derive(each, x, index, weights, dy) for each in (layer, peft, exact)]
    assert len(results[0]) == 2 + 1 + 4
    for mine, theirs, right in zip(*results, strict=True):
        assert_close(mine, theirs, right)


def _derive(layer: Any, x: Tensor, index: Tensor, weights: Tensor, dy: Tensor) -> list[Tensor]:
    dtype = layer.get_base_layer().down_proj.dtype
    x, weights = x.detach().to(dtype).requires_grad_(), weights.detach().clone().requires_grad_()
    y = layer(x, index, weights.to(dtype))
    wanted = [x, weights, *(p for p in layer.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(dtype))]


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_under_autocast(implementation: str) -> None:
    model = make(implementation=implementation)
    x, index, weights, dy = (
        torch.randn(40, 32),
        torch.rand(40, 4).topk(2).indices,
        torch.rand(40, 2),
        torch.randn(40, 32),
    )
    layer = experts(model)
    exact = copy.deepcopy(layer).double()
    exact.get_base_layer().config._experts_implementation = "eager"
    right = _derive(exact, x, index, weights, dy)
    with torch.autocast("cpu", torch.bfloat16):
        peft = _derive(layer, x, index, weights, dy)
        fastpeft.accelerate(model)
        ours = _derive(layer, x, index, weights, dy)
    for mine, theirs, truth_ in zip(ours, peft, right, strict=True):
        assert_close(mine, theirs, truth_)
    assert experts(model).fastpeft_calls == {"fused": 1}


@pytest.mark.parametrize("stacks", [("gate_up_proj",), ("down_proj",)], ids=str)
@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt-oss", marks=FULL)])
def test_adapters_of_one_stack(name: str, stacks: tuple[str, ...]) -> None:
    model = make(name, stacks=stacks)
    inputs = batch(model)
    assert_accelerated_close(model, inputs, truth(model, inputs))
    assert served(model)


def test_shared_experts_are_an_mlp() -> None:
    report = fastpeft.report(fastpeft.accelerate(make("deepseek")))
    assert [row.op for row in report.rows if row.path.endswith("shared_experts")] == ["lora_mlp"]


@pytest.mark.parametrize("use_reentrant", [False, pytest.param(True, marks=FULL)])
def test_with_activation_checkpointing(use_reentrant: bool) -> None:
    model = make()
    inputs = batch(model)
    exact = truth(model, inputs)
    assert_accelerated_close(checkpointed(model, use_reentrant), inputs, exact)
    assert served(model)


def test_compiled() -> None:
    """A break of the graph, as PEFT's own forward is several."""
    model = fastpeft.accelerate(make())
    block, x = model.get_submodule("base_model.model.model.layers.1.mlp"), torch.randn(2, 5, 32)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager")
    parameters = [p for p in block.parameters() if p.requires_grad]
    eager, traced = (torch.autograd.grad(run(x).square().sum(), parameters) for run in (block, compiled))
    assert len(eager) == 4 and all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))
    assert served(model) and experts(model).fastpeft_calls == {"fused": 2}
    torch._dynamo.reset()


def test_tokens_that_no_router_sent() -> None:
    """No token at all, and one, as in generation; the same to PEFT."""
    layer = experts(fastpeft.accelerate(make()))
    plain = experts(fastpeft.restore(copy.deepcopy(make())))
    plain.load_state_dict(layer.state_dict())
    for tokens in (0, 1):
        x, index, weights = torch.randn(tokens, 32), torch.zeros(tokens, 2, dtype=torch.int64), torch.rand(tokens, 2)
        with torch.no_grad():
            torch.testing.assert_close(layer(x, index, weights), plain(x, index, weights))
    assert layer.fastpeft_calls == {"fused": 2}


def test_no_stack_is_made() -> None:
    model = make()
    inputs, layer = batch(model), experts(model)
    stack = layer.get_base_layer().gate_up_proj.numel()
    x, index, weights = torch.randn(6, 32, requires_grad=True), torch.rand(6, 4).topk(2).indices, torch.rand(6, 2)
    with Sizes() as peft:
        layer(x, index, weights).sum().backward()
    fastpeft.accelerate(model)
    with Sizes() as ours:
        layer(x, index, weights).sum().backward()
    assert peft.largest >= stack > 4 * ours.largest
    assert step(model, inputs).gradients


def test_merging_disabling_and_adapters_are_peft_s() -> None:
    model = make()
    inputs = batch(model)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    trained(model)
    plain = copy.deepcopy(model)
    fastpeft.accelerate(model)
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(plain).keys()

    def same() -> None:
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)

    same()
    for each in (model, plain):
        each.set_adapter("second")
    same()
    for each in (model, plain):
        each.base_model.set_adapter(["default", "second"])
    same()
    with model.disable_adapter(), plain.disable_adapter():
        same()
    assert "adapters disabled" in str(fastpeft.report(model))
    for each in (model, plain):
        each.merge_adapter()
    same()
    assert "merged" in str(fastpeft.report(model))
    for each in (model, plain):
        each.unmerge_adapter()
        each.delete_adapter("second")
    same()
    merged, theirs = model.merge_and_unload(), plain.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = fastpeft.accelerate(make()).eval()  # as a loaded one is
    inputs = batch(model)
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()
    loaded = fastpeft.accelerate(PeftModel.from_pretrained(base, tmp_path))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    assert served(loaded)


def test_an_adapter_that_is_added_to_an_accelerated_model(tmp_path: Any) -> None:
    """PEFT looks for its wrapper by name."""
    plain = make()
    model, inputs = fastpeft.accelerate(copy.deepcopy(plain)), batch(plain)
    plain.save_pretrained(tmp_path)
    for each in (model, plain):
        each.load_adapter(tmp_path, "loaded")
        each.add_adapter("added", copy.deepcopy(each.peft_config["default"]))
        each.set_adapter("loaded")
    fastpeft.accelerate(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert served(model)


def test_a_merge_between_forward_and_backward_is_noticed() -> None:
    model = fastpeft.accelerate(make())
    loss = model(**batch(model)).loss
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="frozen base weight"):
        loss.backward()


def test_restore_and_copies() -> None:
    model = make()
    inputs, classes = batch(model), [type(module) for module in model.modules()]
    before = step(model, inputs)
    fastpeft.accelerate(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert step(copied, inputs).gradients.keys() == before.gradients.keys() and served(copied)
    fastpeft.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any(name.startswith("fastpeft") for module in model.modules() for name in module.__dict__)
    assert step(model, inputs).equals(before)
    off = fastpeft.accelerate(model, lora=False)
    assert not any(row.op for row in adapter_rows(off))


@pytest.mark.parametrize("name", ["gpt-oss", pytest.param("mixtral", marks=FULL)])
def test_verify(name: str) -> None:
    """Experts are checked against PEFT's own wrappers in fp64, and a wrong scaling is noticed."""
    model = fastpeft.accelerate(make(name))
    verification = fastpeft.verify(model)
    assert verification.passed and not verification.unserved, str(verification)
    assert any(check.path.endswith("experts") for check in verification.checks)
    layer = experts(model)
    roles = layer.fastpeft_roles
    layer.fastpeft_roles = type(roles)(roles.down, roles.inner, *list(vars(roles).values())[2:])  # gate_up for down
    with pytest.raises(RuntimeError):
        fastpeft.verify(model)


def test_every_other_call_is_peft_s_and_named() -> None:
    model = make()
    layer = experts(fastpeft.accelerate(model))
    plain = experts(fastpeft.restore(copy.deepcopy(model)))
    x, index, weights = torch.randn(6, 32), torch.rand(6, 4).topk(2).indices, torch.rand(6, 2)

    def left(reason: str, x: Tensor = x, *args: Any, **kwargs: Any) -> None:
        layer.__dict__.pop("fastpeft_calls", None)
        args = args or (() if kwargs else (index, weights))
        given, expected = layer(x, *args, **kwargs), plain(x, *args, **kwargs)
        torch.testing.assert_close(given, expected)
        (outcome,) = layer.fastpeft_calls
        assert reason in outcome, outcome

    left("called with top_k_index", top_k_index=index, top_k_weights=weights)
    assert "on the meta device" in layer.request(*(t.to("meta") for t in (x, index, weights)))
    handle = layer.base_layer.register_forward_hook(lambda *_: None)
    left("a hook on a bypassed ParamWrapper")
    handle.remove()
    handle = layer.get_base_layer().act_fn.register_forward_hook(lambda *_: None)
    left("a hook on a bypassed")
    handle.remove()
    layer.get_base_layer().down_proj.requires_grad_(True)
    left("down_proj is trained")
    layer.get_base_layer().down_proj.requires_grad_(False)
    layer.get_base_layer()._is_expert_parallel = True
    left("experts in parallel on several devices")
    layer.get_base_layer()._is_expert_parallel = False
    layer.get_base_layer().more = nn.Identity()
    left("other parts than when it was accelerated")
    del layer.get_base_layer().more
    stack = layer.get_base_layer().down_proj
    stack.data = torch.randn(4, 32, 60)[:, :, :48].copy_(stack.data)
    left("down_proj: matrices that do not lie one after the other")


def _halved(self: Any, *args: Any) -> Tensor:
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, *args) / 2  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("mixtral", lambda base: setattr(base, "act_fn", ACT2FN["gelu"]), "act_fn: another one"),
        ("gpt-oss", lambda base: setattr(base, "limit", 0.5), "limit: another one"),
        ("mixtral", lambda base: setattr(base.config, "_experts_implementation", "halved"), "implementation: another"),
    ],
)
def test_experts_that_compute_something_else_since(
    name: str, change: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was proved holds of the experts as they were."""
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "halved", _halved)
    model = make(name)
    plain, layer = copy.deepcopy(experts(model)), experts(fastpeft.accelerate(model))
    x, index, weights = torch.randn(6, 32), torch.rand(6, 4).topk(2).indices, torch.rand(6, 2)
    for each in (layer, plain):
        change(each.get_base_layer())
    torch.testing.assert_close(layer(x, index, weights), plain(x, index, weights))
    (outcome,) = layer.fastpeft_calls
    assert reason in outcome, outcome


@pytest.mark.parametrize("first", ["eager", pytest.param("batched_mm", marks=FULL)])
@pytest.mark.parametrize("second", ["grouped_mm", "batched_mm", pytest.param("eager", marks=FULL)])
def test_another_implementation_of_transformers_since(first: str, second: str) -> None:
    """They compute the same, and are served alike; autocast tells them apart, at each call anew."""
    model = make(implementation=first)
    plain, layer = copy.deepcopy(model), experts(fastpeft.accelerate(model))
    arguments = torch.randn(40, 32), torch.rand(40, 4).topk(2).indices, torch.rand(40, 2)
    for each in (model, plain):
        each.get_base_model().set_experts_implementation(second)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = second != "grouped_mm"
        tolerances = {"rtol": 0.05, "atol": 0.05} if rounded else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(layer(*arguments), experts(plain)(*arguments), **tolerances)
    assert layer.fastpeft_calls == {"fused": 1}


def test_matrices_stored_the_other_way_round() -> None:
    """They are read where they lie, without a copy of all, and a write to them is noticed."""
    model = make()
    plain, layer = copy.deepcopy(experts(model)), experts(fastpeft.accelerate(model))
    base = layer.get_base_layer()
    for name in ("gate_up_proj", "down_proj"):
        stack = base.get_parameter(name)
        stack.data = stack.data.mT.contiguous().mT
    x, index, weights, dy = torch.randn(6, 32), torch.rand(6, 4).topk(2).indices, torch.rand(6, 2), torch.randn(6, 32)
    with Sizes() as sizes:
        ours = _derive(layer, x, index, weights, dy)
    assert sizes.largest < base.gate_up_proj.numel() / 4
    for mine, theirs in zip(ours, _derive(plain, x, index, weights, dy), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    y = layer(x.requires_grad_(), index, weights)
    base.gate_up_proj.mul_(2)
    with pytest.raises(RuntimeError, match="frozen base weight"):
        y.sum().backward()


def _scaled(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return type(self).plain_forward(self, x, index, weights) * 1.001  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda base: setattr(type(base), "forward", _scaled), "it computes something else than experts"),
        (lambda base: setattr(base, "act_fn", ACT2FN["tanh"]), "no op for lora.ParamWrapper over"),
        (lambda base: setattr(base, "extra", nn.Parameter(torch.ones(2))), "no op for lora.ParamWrapper over"),
        (lambda base: setattr(base.config, "_experts_implementation", "deepgemm"), "trying it failed with"),
    ],
    ids=["another sum", "another activation", "one more parameter", "an implementation for GPUs"],
)
def test_experts_that_compute_something_else_are_left_alone(change: Any, reason: str) -> None:
    model = make()
    for layer in range(2):
        base = model.get_submodule(f"base_model.model.model.layers.{layer}.mlp.experts").get_base_layer()
        stock = type(base)
        base.__class__ = type("Experts", (stock,), {"plain_forward": stock.forward})
        change(base)
    fastpeft.accelerate(model)
    rows = [row for row in adapter_rows(model) if "experts" in row.path]
    assert len(rows) == 4 and all(not row.op and reason in row.note for row in rows), rows


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_experts_without_a_gate(implementation: str) -> None:
    """By its shape either stack could be the inner one; the wrong way round such code raises."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "moe_latent_size": None}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "n_shared_experts": 1}
    routing = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    kinds = ["full_attention", "moe"]
    config = NemotronHConfig(**sizes, **heads, **routing, layers_block_type=kinds, vocab_size=VOCABULARY)
    base = NemotronHForCausalLM(config)
    base.set_experts_implementation(implementation)
    parameters = ["experts.up_proj", "experts.down_proj"]
    model = trained(get_peft_model(base, LoraConfig(r=4, target_modules=["o_proj"], target_parameters=parameters)))
    inputs = batch(model)
    assert_accelerated_close(model, inputs, truth(model, inputs))
    assert served(model)


def test_parameters_of_other_modules_are_left_alone() -> None:
    base = MIXTURES["mixtral"]()
    model = get_peft_model(base, LoraConfig(target_parameters=["mlp.gate.weight"], target_modules=["o_proj"]))
    rows = [row for row in adapter_rows(fastpeft.accelerate(model)) if row.path.endswith("gate")]
    assert {(row.op, row.note) for row in rows} == {
        ("", "no op for lora.ParamWrapper over weight of MixtralTopKRouter")
    }


@pytest.mark.parametrize(
    ("module", "name", "alpha", "shift"),
    [("deepseek_v4", "DeepseekV4Experts", 1.0, 0.0), ("minimax_m3_vl", "MiniMaxM3VLExperts", 1.7, 1.0)],
)
def test_clamped_gates(module: str, name: str, alpha: float, shift: float) -> None:
    file = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    config = SimpleNamespace(num_local_experts=4, hidden_size=8, intermediate_size=12, hidden_act="silu")
    config.swiglu_limit, config.swiglu_alpha, config._experts_implementation = 0.7, 1.7, "eager"
    found = proved(layer := getattr(file, name)(config), candidates(layer))
    assert isinstance(found, ExpertRoles)
    assert found.gating == Gating(CLAMPED_SWIGLU, alpha=alpha, limit=0.7, shift=shift)
