"""Queries and keys of models turned by our op: recognised and proved on the instance, its file left as it is."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import fastpeft
from fastpeft.bench.matrix import families
from fastpeft.bench.matrix.families import FAMILIES
from fastpeft.layers import rotary
from fastpeft.layers.rotary import NO_KERNEL, FastRotary
from fastpeft.layers.rotary_calls import CONVENTIONS, NO_CALL
from fastpeft.layers.rotary_structure import ELSEWHERE, UNKNOWN, Turn, own_functions, proved
from fastpeft.reporting import ReportRow
from tests.integration.models import batch, make, with_lora
from tests.integration.steps import assert_step_close, step, truth


@pytest.fixture
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no kernel the op computes its definition."""
    monkeypatch.setattr(rotary, "kernel_serves", lambda q, cos: True)


def rows(model: nn.Module) -> list[ReportRow]:
    return [row for row in fastpeft.report(model).rows if row.op == "rotary"]


def attentions(model: nn.Module) -> list[FastRotary]:
    return [module for module in model.modules() if isinstance(module, FastRotary)]


def attention_of(model: str, kind: str) -> nn.Module:
    """Without anything in it."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    made: nn.Module = module.__dict__[kind].__new__(module.__dict__[kind])
    nn.Module.__init__(made)
    return made


@pytest.mark.parametrize(
    ("model", "kind", "turn"),
    [
        ("llama", "LlamaAttention", Turn("halved", "each", False, False)),
        ("phi3", "Phi3Attention", Turn("halved", "each", False, True)),
        ("cohere", "CohereAttention", Turn("interleaved", "each", True, False)),
        ("glm", "GlmAttention", Turn("interleaved", "pairs", False, True)),
        ("gpt_oss", "GptOssAttention", Turn("halved", "half", False, False)),
        ("deepseek_v3", "DeepseekV3Attention", Turn("separated", "pairs", False, False)),
        ("qwen2_5_vl", "Qwen2_5_VLVisionAttention", Turn("halved", "each", True, False, CONVENTIONS[2])),
        ("gemma4", "Gemma4TextAttention", Turn("halved", "each", False, False, CONVENTIONS[3])),
        ("gptj", "GPTJAttention", Turn("interleaved", "half", False, False, CONVENTIONS[4])),
        ("deepseek_v2", "DeepseekV2Attention", Turn("interleaved", "half", True, False, CONVENTIONS[5])),
        ("llama4", "Llama4TextAttention", Turn("interleaved", "half", True, False, CONVENTIONS[6])),
        ("dinov3_vit", "DINOv3ViTAttention", None),
    ],
)
def test_recognised_by_what_it_computes(model: str, kind: str, turn: Turn | None) -> None:
    module = attention_of(model, kind)
    functions = own_functions(module)
    assert isinstance(functions, dict)
    found = proved(module, functions)
    assert (
        found == f"apply_rotary_pos_emb: {UNKNOWN}"
        if turn is None
        else isinstance(found, dict) and list(found.values())[:1] == [turn]
    )


def test_a_function_that_only_looks_like_one_is_left() -> None:
    def doubled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return tuple(2 * x for x in modeling_llama.apply_rotary_pos_emb(q, k, cos, sin))

    def detached(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        turned = modeling_llama.apply_rotary_pos_emb(q.detach(), k.detach(), cos, sin)
        return tuple(y + 0 * x for x, y in zip((q, k), turned, strict=True))

    for function in (doubled, detached):
        assert proved(nn.Identity(), {"turn": function}) == f"turn: {UNKNOWN}"


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize("name", ("llama", "qwen3", "gemma2", "phi3"))
def test_whole_models(name: str) -> None:
    model = make(name)
    given = batch(model)
    theirs, exact = step(model, given), truth(model, given)
    fastpeft.accelerate(model)
    assert_step_close(step(model, given), theirs, exact)
    assert len(rows(model)) == len(attentions(model)) == 2 and {row.note for row in rows(model)} == {""}
    assert all(set(module.fastpeft_turns) == {"fused"} for module in attentions(model))
    kinds = {row.kind for row in fastpeft.report(model).rows if row.path == rows(model)[0].path}
    assert kinds == {"attention", "norms"}
    assert fastpeft.verify(model).passed
    fastpeft.restore(model)
    assert not attentions(model) and not rows(model)
    assert not [n for m in model.modules() for n in m.__dict__ if n.startswith("fastpeft_turn")]


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize("name", ("gemma4", "deepseek_v3", "llama4"))
def test_whole_models_that_turn_otherwise(name: str) -> None:
    base: Any = FAMILIES[name].build()
    base.set_experts_implementation("eager")  # the others multiply in no fp64
    model = with_lora(base, None, target_modules=["q_proj", "q_b_proj", "o_proj"])
    given = families.batch(base)
    theirs, exact = step(model, given), truth(model, given)
    fastpeft.accelerate(model, norms=True)
    assert_step_close(step(model, given), theirs, exact)
    assert rows(model) and {row.note for row in rows(model)} == {""}
    assert {outcome for module in attentions(model) for outcome in module.fastpeft_turns} == {"fused"}


@pytest.mark.usefixtures("on_any_device")
def test_attention_over_pictures() -> None:
    """Of Qwen2.5-VL: tokens first, without a dimension of rows."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as file

    config = file.Qwen2_5_VLVisionConfig(hidden_size=64, num_heads=4)
    config._attn_implementation = "sdpa"
    module = nn.ModuleDict({"attention": file.Qwen2_5_VLVisionAttention(config)})
    x, angles = torch.randn(9, 64), torch.randn(9, 16)
    documents, tables = torch.tensor([0, 4, 9], dtype=torch.int32), (angles.cos(), angles.sin())
    given = {"cu_seqlens": documents, "position_embeddings": tables}

    def derived(module: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = module["attention"](leaf, **given)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])]

    theirs = derived(module)
    fastpeft.accelerate(module, attention=False)
    torch.testing.assert_close(derived(module), theirs)
    assert attentions(module)[0].fastpeft_turns == {"fused": 1}


@pytest.mark.usefixtures("on_any_device")
def test_a_decorated_forward_is_run_within_its_decorators(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24 takes a cache by its old name through one; an older one is given two here."""
    model = make()
    given = batch(model)
    theirs, exact = step(model, given), truth(model, given)
    passed: list[str] = []
    for name in ("inner", "outer"):
        monkeypatch.setattr(LlamaAttention, "forward", noting(LlamaAttention.forward, name, passed))
    fastpeft.accelerate(model)
    assert_step_close(step(model, given), theirs, exact)
    assert {row.note for row in rows(model)} == {""} and passed[:2] == ["outer", "inner"]
    assert all(set(module.fastpeft_turns) == {"fused"} for module in attentions(model))


def noting(forward: Any, name: str, passed: list[str]) -> Any:
    @functools.wraps(forward)
    def noted(*args: Any, **kwargs: Any) -> Any:
        passed.append(name)
        return forward(*args, **kwargs)

    return noted


def test_what_a_decorator_keeps_elsewhere_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = [LlamaAttention.forward]

    @functools.wraps(functions[0])
    def indirect(*args: Any, **kwargs: Any) -> Any:
        return functions[0](*args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", indirect)
    said = "its forward is decorated in a way that is not known"
    assert own_functions(attention_of("llama", "LlamaAttention")) == said


def test_without_a_kernel_the_model_s_own_function_runs() -> None:
    model = make()
    given = batch(model)
    fastpeft.accelerate(model, norms=False)
    theirs = step(model, given)
    fastpeft.accelerate(model)
    assert step(model, given).equals(theirs)
    assert {row.note for row in rows(model)} == {f"every call by the model's own function: {NO_KERNEL}"}


@pytest.mark.usefixtures("on_any_device")
def test_the_file_is_untouched_and_what_changes_there_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = fastpeft.accelerate(make()), make()
    file, before = modeling_llama.__dict__, dict(modeling_llama.__dict__)
    step(model, batch(model))
    assert file == before and not attentions(other) and "apply_rotary_pos_emb" in file
    asked: list[str] = []
    attend = modeling_llama.ALL_ATTENTION_FUNCTIONS

    class Noted:
        def get_interface(self, name: str, default: Any) -> Any:
            asked.append(name)
            return attend.get_interface(name, default)

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Noted())
    step(model, batch(model))
    assert asked == ["fastpeft"] * 2


@pytest.mark.usefixtures("on_any_device")
def test_copies_and_pickles() -> None:
    model = fastpeft.accelerate(make()).eval()
    given = batch(model)
    with torch.no_grad():
        wanted = model(**given).loss
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(attentions(other)) == 2 and torch.equal(other(**given).loss, wanted)


class Turning(nn.Module):
    """The least that calls such a function."""

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return apply_rotary_pos_emb(q, k, cos, sin)


@pytest.mark.usefixtures("on_any_device")
def test_compiled_it_is_the_module_s_own() -> None:
    module: Any = fastpeft.accelerate(nn.ModuleDict({"turning": Turning()}))["turning"]
    given = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    found = torch.compile(module, fullgraph=True, backend="eager")(*given)
    torch.testing.assert_close(found, apply_rotary_pos_emb(*given))
    assert isinstance(module, FastRotary) and "fastpeft_turns" not in module.__dict__
    module(*given)
    assert module.fastpeft_turns == {"fused": 1}


def apply_rotary_doubled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return tuple(2 * x for x in apply_rotary_pos_emb(q, k, cos, sin))


class ByMethod(nn.Module):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return self.apply_rotary_here(q, k, cos, sin)

    def apply_rotary_here(self, *given: Tensor) -> Any:
        return apply_rotary_pos_emb(*given)


class ThroughModule(nn.Module):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)


class OfTwo(nn.Module):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return apply_rotary_doubled(*apply_rotary_pos_emb(q, k, cos, sin), cos, sin)


class Unknown(nn.Module):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return apply_rotary_doubled(q, k, cos, sin)


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize(
    ("kind", "served", "note"),
    [
        (ByMethod, False, f"apply_rotary_here: {ELSEWHERE}"),
        (ThroughModule, False, f"apply_rotary_pos_emb: {ELSEWHERE}"),
        (Unknown, False, f"apply_rotary_doubled: {UNKNOWN}"),
        (OfTwo, True, f"apply_rotary_doubled: {UNKNOWN}"),
    ],
)
def test_functions_that_are_left_to_the_model_are_named(kind: type[nn.Module], served: bool, note: str) -> None:
    module: Any = kind()
    x, table = torch.randn(2, 4, 5, 16), torch.randn(1, 5, 16)
    theirs = module(x, x, table, table)
    report = fastpeft.report(fastpeft.accelerate(nn.ModuleDict({"turning": module})))
    torch.testing.assert_close(module(x, x, table, table), theirs)
    assert [row.note for row in report.rows if row.path == "turning"] == [note]
    assert isinstance(module, FastRotary) is served
    if served:
        assert module.fastpeft_turns == {"fused": 1}


@pytest.mark.usefixtures("on_any_device")
def test_calls_that_are_left_to_the_file_s_function() -> None:
    attention: Any = attentions(fastpeft.accelerate(make()))[0]
    q, k, cos = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(1, 5, 16)
    turned = partial(attention._turned, "apply_rotary_pos_emb", attention.fastpeft_turn["apply_rotary_pos_emb"])
    want = modeling_llama.apply_rotary_pos_emb(q, k, cos, cos)
    torch.testing.assert_close(turned(q, k, cos, cos, unsqueeze_dim=1), want)
    torch.testing.assert_close(turned(q, k, cos=cos, sin=cos), want)
    turned(q, k, cos[:, :1], cos[:, :1])
    turned(q, k.double(), cos, cos)
    turned(q, k, cos.clone().requires_grad_(), cos)
    torch.func.vmap(turned)(q[None], k[None], cos[None], cos[None])
    assert attention.fastpeft_turns == {
        "fused": 1,
        NO_CALL: 1,
        "inputs of shapes (2, 4, 5, 16), (2, 2, 5, 16), (1, 1, 16)": 1,
        "inputs of several dtypes or devices": 1,
        "angles that are trained": 1,
        "a torch.func transform": 1,
    }
