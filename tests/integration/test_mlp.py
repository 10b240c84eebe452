"""MLPs as one op: found by structure, proved on the instance, given back to the module where the op does not fit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpeft
from fastpeft.layers.mlp import FastMlp
from tests.integration.models import ARCHITECTURES, batch, checkpointed, make, with_lora
from tests.integration.reports import mlp_rows
from tests.integration.steps import assert_accelerated_close, assert_step_close, step, truth

WITH_MLPS = {"llama": 2, "gpt2": 2, "qwen2": 2, "qwen3": 2, "gemma2": 2, "phi3": 2, "t5": 4}


def calls(model: nn.Module) -> set[str]:
    """What became of all calls of MLPs."""
    return {outcome for m in model.modules() if isinstance(m, FastMlp) for outcome in m.__dict__["fastpeft_calls"]}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_which_models_have_some(name: str) -> None:
    rows = mlp_rows(fastpeft.accelerate(make(name)))
    assert len(rows) == WITH_MLPS.get(name, 0) and all(row.op == "lora_mlp" for row in rows)


@pytest.mark.parametrize("name", WITH_MLPS)
@pytest.mark.parametrize("targets", ["all-linear", "attention", "one"])
def test_same_gradients(name: str, targets: str) -> None:
    """Also where only attention is adapted, so that whole MLPs are frozen, and where one projection of each is."""
    down = {"t5": "wo", "gpt2": "c_proj"}.get(name, "down_proj")
    attention = {"t5": ["q", "v"], "phi3": ["qkv_proj"], "gpt2": ["c_attn"]}.get(name, ["q_proj", "v_proj"])
    chosen = {"all-linear": "all-linear", "attention": attention, "one": [down]}[targets]
    model = make(name, target_modules=chosen)
    given = batch(model)
    exact = truth(model, given)
    assert_accelerated_close(model, given, exact)
    assert calls(model) == {"fused"}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing_with_dropout(use_reentrant: bool) -> None:
    """The same elements are dropped as without: one seed a projection, drawn in the same order."""
    plain, recomputed = (fastpeft.accelerate(make(lora_dropout=0.3)) for _ in range(2))
    recomputed.load_state_dict(plain.state_dict())
    recomputed = checkpointed(recomputed, use_reentrant)
    given = batch(plain)
    found = []
    for model in (plain, recomputed):
        torch.manual_seed(5)
        found.append(step(model, given))
    assert found[0].equals(found[1]) and calls(plain) == calls(recomputed) == {"fused"}


def test_dropout_draws_as_without_the_op() -> None:
    model = make(lora_dropout=0.3)
    given = batch(model)
    fastpeft.accelerate(model, mlp=False)
    step(model, given)
    torch.manual_seed(5)
    apart = step(model, given)
    fastpeft.accelerate(model)
    torch.manual_seed(5)
    whole = step(model, given)
    for name, gradient in apart.gradients.items():
        torch.testing.assert_close(whole.gradients[name], gradient, rtol=1e-4, atol=1e-5)
    assert calls(model) == {"fused"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype: torch.dtype) -> None:
    model = make(dtype=dtype)
    given = batch(model)
    assert_accelerated_close(model, given, truth(model, given))
    assert calls(model) == {"fused"}


def test_under_autocast() -> None:
    model = make()
    given = batch(model)
    exact = truth(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        assert_accelerated_close(model, given, exact)
    assert calls(model) == {"fused"}


class TestWhatRunsPartByPart:
    def test_a_hook_on_a_projection_runs(self) -> None:
        model = fastpeft.accelerate(make())
        step(model, batch(model))
        seen: list[nn.Module] = []
        layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
        handle = layer.register_forward_hook(lambda module, *_: seen.append(module))
        step(model, batch(model))
        handle.remove()
        assert seen == [layer]
        assert any("up_proj: a hook on a bypassed FastLinear" in row.note for row in mlp_rows(model))

    def test_a_hook_on_the_activation_runs(self) -> None:
        model = fastpeft.accelerate(make())
        seen: list[Tensor] = []
        model.get_submodule("base_model.model.model.layers.1.mlp.act_fn").register_forward_hook(
            lambda module, args, output: seen.append(output)
        )
        step(model, batch(model))
        assert seen

    def test_adapters_off_merged_and_back(self) -> None:
        model = make()
        given = batch(model)
        plain = copy.deepcopy(model)
        fastpeft.accelerate(model, attention=False)
        step(model, given)
        with model.disable_adapter(), plain.disable_adapter():
            torch.testing.assert_close(model(**given).logits, plain(**given).logits)
        model.merge_adapter()
        plain.merge_adapter()
        assert torch.equal(model(**given).logits, plain(**given).logits)
        model.unmerge_adapter()
        plain.unmerge_adapter()
        assert_step_close(step(model, given), step(plain, given), truth(plain, given))

    def test_a_part_that_is_another_now(self) -> None:
        model = make()
        fastpeft.accelerate(model)
        plain = copy.deepcopy(model)
        fastpeft.restore(plain)
        for m in (model, plain):
            m.get_submodule("base_model.model.model.layers.0.mlp").act_fn = nn.ReLU()  # type: ignore[assignment]
            m.get_submodule("base_model.model.model.layers.1.mlp").more = nn.Identity()  # type: ignore[assignment]
        given = batch(model)
        assert_step_close(step(model, given), step(plain, given), truth(plain, given))
        assert {row.note.partition(": ")[2] for row in mlp_rows(model)} == {
            "act_fn: another one than when it was accelerated",
            "other parts than when it was accelerated",
        }

    def test_traced_by_torch_jit(self) -> None:
        model, before = accelerated(Usual().requires_grad_(False))
        x = torch.randn(5, 16)
        mlp = model.get_submodule("base_model.model.0")
        traced = torch.jit.trace(mlp, (x.requires_grad_(),), check_trace=False)
        torch.testing.assert_close(traced(x), before(x))

    def test_a_trained_base_weight(self) -> None:
        model = make(modules_to_save=["up_proj"], target_modules=["gate_proj", "down_proj"])
        given = batch(model)
        assert_accelerated_close(model, given, truth(model, given))


class Parts(nn.Module):
    """Something of the parts of an MLP; what it does with them is up to its subclasses."""

    def __init__(self, features: int = 24) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, features), nn.Linear(16, features)
        self.last, self.act = nn.Linear(features, 16), nn.SiLU()


class Usual(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.second(x)) * self.first(x))  # type: ignore[no-any-return]


class Square(Usual):
    """Each projection could be the last, by its size."""

    def __init__(self) -> None:
        super().__init__(16)


class Scaled(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.second(x)) * self.first(x) * 1.01)  # type: ignore[no-any-return]


class Slightly(Parts):
    """Hidden by the rounding of bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.second(x)) * self.first(x)) * 1.01  # type: ignore[no-any-return]


class Centred(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.act(self.second(x)) * self.first(x))
        return y - y.mean(0)  # type: ignore[no-any-return]


class Residual(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.act(self.second(x)) * self.first(x))  # type: ignore[no-any-return]


class DroppingByHand(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.second(x)) * self.first(x)
        return self.last(F.dropout(h, 0.1, self.training))  # type: ignore[no-any-return]


class Clamped(Parts):
    """As gpt-oss clamps: nothing of it shows on small numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.second(x).clamp(max=7.0)) * self.first(x))  # type: ignore[no-any-return]


class Strange(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Mish()  # type: ignore[assignment]

    forward = Usual.forward


class KnowsItsSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.last, self.act, self.size = nn.Linear(16, 48), nn.Linear(24, 16), nn.GELU(), 24

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).split(self.size, dim=-1)
        return self.last(self.act(gate) * up)  # type: ignore[no-any-return]


class ByFunction(nn.Module):
    """No activation module: told by numbers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class SquareByFunction(ByFunction):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(16, 16), nn.Linear(16, 16)


def accelerated(part: nn.Module) -> tuple[Any, nn.Module]:
    """The part in a model with an adapter elsewhere, accelerated; and as it was."""
    before = copy.deepcopy(part)
    model = with_lora(nn.Sequential(part, nn.Linear(16, 16)), None, target_modules="1")
    return fastpeft.accelerate(model), before


class TestProof:
    @pytest.mark.parametrize("part", [Usual, ByFunction, KnowsItsSize, Square, SquareByFunction])
    def test_what_is_one(self, part: type[nn.Module]) -> None:
        model, before = accelerated(part().requires_grad_(False))
        x = torch.randn(5, 16, requires_grad=True)
        mlp = model.get_submodule("base_model.model.0")
        assert isinstance(mlp, FastMlp) and type(mlp).__mro__[2] is part
        (ours,), (theirs,) = (torch.autograd.grad(m(x).square().sum(), x) for m in (mlp, before))
        torch.testing.assert_close(ours, theirs)
        assert calls(model) == {"fused"}

    @pytest.mark.parametrize("part", [Scaled, Slightly, Residual, DroppingByHand, Clamped, Centred, Strange])
    @pytest.mark.parametrize("training", [False, True])
    def test_what_is_none(self, part: type[nn.Module], training: bool) -> None:
        model, _ = accelerated(part().train(training))
        assert type(model.get_submodule("base_model.model.0")) is part
        assert [row.note for row in mlp_rows(model)] in (["it computes something else than an MLP"], [])

    def test_nothing_is_left_of_it(self) -> None:
        part = DroppingByHand()
        part.last.eval()
        state, modes = torch.get_rng_state(), [m.training for m in part.modules()]
        fastpeft.report(with_lora(nn.Sequential(part, nn.Linear(16, 16)), None, target_modules=["1"]))
        state = torch.get_rng_state()
        fastpeft.report(part)
        assert torch.equal(torch.get_rng_state(), state) and [m.training for m in part.modules()] == modes


def test_copies_pickles_and_restore() -> None:
    model = fastpeft.accelerate(make())
    given = batch(model)
    expected = step(model, given)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert step(other, given).equals(expected) and len(mlp_rows(other)) == 2
    fastpeft.restore(model)
    assert not any(isinstance(m, FastMlp) for m in model.modules())
    assert not any(name.startswith("fastpeft") for m in model.modules() for name in m.__dict__)


def test_restore_with_a_class_before_ours() -> None:
    """As FSDP2 makes one for each module that it shards."""
    model = fastpeft.accelerate(make())
    plain = fastpeft.restore(copy.deepcopy(model))
    for path in ("mlp", "self_attn.q_proj"):
        module = model.get_submodule(f"base_model.model.model.layers.0.{path}")
        module.__class__ = type("Before", (type(module),), {})  # type: ignore[assignment]
    given = batch(model)
    fastpeft.restore(model)
    assert step(model, given).equals(step(plain, given))
    fastpeft.accelerate(model)
    assert_step_close(step(model, given), step(plain, given), truth(plain, given))


def test_mlp_false_leaves_them() -> None:
    model = fastpeft.accelerate(make(), mlp=False)
    assert [row.note for row in mlp_rows(model)] == ["mlp=False"] * 2
    fastpeft.accelerate(fastpeft.accelerate(model), mlp=False)
    assert [row.note for row in mlp_rows(model)] == ["mlp=False"] * 2


def test_sequences_are_left_to_be_sliced() -> None:
    model, _ = accelerated(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)))
    assert not mlp_rows(model)


def test_accelerating_touches_no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("t5")
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    state = torch.get_rng_state()
    assert len(mlp_rows(fastpeft.accelerate(model))) == 4
    assert not seeded and torch.equal(torch.get_rng_state(), state)
