"""Projections without adapters beside adapted ones that read the same tensor: computed with them, to PEFT's numbers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastpeft
from fastpeft.layers.frozen import FrozenSibling
from tests.integration.blocks import Block, Stack, assert_same, blocks, check, gradients, inputs, many, pair
from tests.integration.models import batch, checkpointed, make
from tests.integration.quantised import make_quantised, quantised_truth
from tests.integration.reports import adapter_rows, notes, siblings
from tests.integration.steps import assert_accelerated_close, step, truth

GROUPED = {frozenset("qkv")}
TARGETS = {"first": ["k", "v"], "between": ["q", "v"], "last": ["q", "k"], "two": ["v"]}
"""Which of q, k and v have adapters, by the place of those that do not in the order of calls."""
ATTENTION = {"llama": "q_proj v_proj", "bert": "query value", "t5": "q v", "bart": "q_proj v_proj"}
pytestmark = pytest.mark.usefixtures("nan_filled")


def frozen(model: nn.Module) -> list[str]:
    """Paths of the rows without adapters."""
    return [row.path for row in adapter_rows(model) if row.op.startswith("frozen_linear")]


def calls(model: nn.Module) -> list[dict[str, int]]:
    """What the frozen members' calls met."""
    return [getattr(model.get_submodule(path), "fastpeft_calls", {}) for path in frozen(model)]


@pytest.mark.parametrize("place", TARGETS)
def test_are_computed_with_the_others(place: str) -> None:
    ours, peft = pair(target_modules=TARGETS[place])
    check(ours, peft)
    assert siblings(ours) == GROUPED and len(frozen(ours)) == 2 * (3 - len(TARGETS[place]))
    assert calls(ours) == [{"fused": 2}] * len(frozen(ours)) and not notes(ours)


class TestModels:
    @pytest.mark.parametrize("name", ATTENTION)
    def test_dense(self, name: str) -> None:
        model = make(name, target_modules=ATTENTION[name].split())
        model.enable_input_require_grads()  # type: ignore[operator]
        inputs = batch(model)
        assert_accelerated_close(model, inputs, truth(model, inputs))
        assert len(frozen(model)) == (2 if name in ("llama", "bert") else 6)
        assert all(found.get("fused") == 2 and len(found) == 1 for found in calls(model))

    @pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.full)])
    def test_four_bit(self, name: str) -> None:
        model = make_quantised(name, lora={"target_modules": ATTENTION[name].split()})
        model.enable_input_require_grads()  # type: ignore[operator]
        inputs = batch(model)
        assert_accelerated_close(model, inputs, quantised_truth(model, inputs))
        assert {row.op for row in adapter_rows(model)} == {"frozen_linear over 4-bit", "lora_linear over 4-bit"}
        assert all(found == {"fused": 2} for found in calls(model))

    def test_adapters_in_fp32_on_a_bf16_base(self) -> None:
        model = make("llama", torch.bfloat16, target_modules=["q_proj", "v_proj"])
        inputs = batch(model)
        assert_accelerated_close(model, inputs, truth(model, inputs))
        assert calls(model) == [{}, {"fused": 2}]  # no gradient of the first layer's input is wanted

    @pytest.mark.parametrize("name", ["llama", "bart"])
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointed(self, name: str, use_reentrant: bool) -> None:
        model = checkpointed(make(name, target_modules=ATTENTION[name].split()), use_reentrant)
        inputs = batch(model)
        assert_accelerated_close(model, inputs, truth(model, inputs))

    @pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
    def test_verify_checks_them_too(self, nf4: bool) -> None:
        lora = {"target_modules": ["q_proj", "v_proj"]}
        model = fastpeft.accelerate(make_quantised(lora=lora) if nf4 else make(**lora))
        outcome = fastpeft.verify(model)  # before any forward
        assert outcome.passed and not outcome.unserved, str(outcome)
        assert any(check.path.endswith("layers.1.self_attn.k_proj") for check in outcome.checks)
        assert all(not found for found in calls(model))

    def test_the_report_shows_them_and_does_not_count_them_as_adapters(self) -> None:
        model = fastpeft.accelerate(make(target_modules=["q_proj", "v_proj"]))
        step(model, batch(model))
        text = str(fastpeft.report(model))
        assert text.startswith("fastpeft: 4 of 4 adapter layers accelerated, 2 frozen projections computed with them")
        assert re.search(r"self_attn\.k_proj +2 +frozen_linear +one of 3", text)


def test_verify_finds_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastpeft.accelerate(make(target_modules=["q_proj", "v_proj"]))
    step(model, batch(model))
    request = FrozenSibling.request

    def off(layer: Any, x: Tensor, row_names: Any = None) -> Any:
        other = copy.copy(layer)
        other._parameters = {"weight": nn.Parameter(layer.weight * 1.001, requires_grad=False), "bias": None}
        return request(other, x)

    monkeypatch.setattr(FrozenSibling, "request", off)
    failures = fastpeft.verify(model).failures
    assert {failure.path.rpartition(".")[2] for failure in failures if failure.what == "output"} >= {"k_proj"}


class TestCheckpointingWithDropout:
    """Forward and recomputation must drop the same elements, although one of them runs without gradients."""

    @pytest.mark.parametrize("how", ["reentrant", "not reentrant", "selective"])
    @pytest.mark.parametrize("place", TARGETS)
    def test_gives_what_it_gives_without_checkpointing(self, place: str, how: str) -> None:
        ours, _ = pair(target_modules=TARGETS[place], lora_dropout=0.5)
        for block in blocks(ours):
            block.between = lambda _: torch.rand(3)  # draws random numbers between the projections
        x = inputs(8, 5).requires_grad_()
        gradients(ours, x)
        stack = next(m for m in ours.modules() if isinstance(m, Stack))
        options: dict[str, Any] = {"use_reentrant": how == "reentrant"}
        if how == "selective":
            policy = lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE  # noqa: E731
            options["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)

        def recomputed(x: Tensor) -> Tensor:
            h: Tensor = stack.embed(x)
            for block in stack.blocks:
                h = h + checkpoint(block, h, **options)
            return h

        torch.manual_seed(3)
        expected = gradients(ours, x)
        torch.manual_seed(3)
        assert_same(gradients(ours, x, recomputed), expected)


class TestRunByThemselves:
    @pytest.mark.parametrize("place", TARGETS)
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, place: str, mode: Callable[[], Any]) -> None:
        ours, peft = pair(target_modules=TARGETS[place])
        x = many()
        for _ in range(2):
            with mode():
                torch.testing.assert_close(ours(x), peft(x))
        assert siblings(ours) == GROUPED and not any(calls(ours))
        check(ours, peft)

    @pytest.mark.parametrize("place", TARGETS)
    def test_where_no_gradient_of_the_input_is_wanted(self, place: str) -> None:
        """As in a model's first layer: an output that asks for one would have attention compute it in vain."""
        ours, peft = pair(Block(), target_modules=TARGETS[place])
        check(ours, peft, inputs())
        assert not any(calls(ours))
        for path in frozen(ours):
            ours.get_submodule(path).register_forward_hook(lambda module, args, y: outputs.append(y))
        outputs: list[Tensor] = []
        ours(inputs())
        assert outputs and not any(y.requires_grad for y in outputs)

    @pytest.mark.parametrize("place", TARGETS)
    @pytest.mark.parametrize("trained", ["weight", "bias"])
    def test_where_they_are_trained(self, place: str, trained: str) -> None:
        """A trained bias is the op's business too."""
        ours, peft = pair(target_modules=TARGETS[place])
        check(ours, peft)
        for model in (ours, peft):
            for path in frozen(ours):
                getattr(model.get_submodule(path), trained).requires_grad_(True)
        check(ours, peft)
        check(ours, peft, inputs())
        found = {reason for reasons in calls(ours) for reason in reasons}
        assert ("the base weight is trained" in found) is (trained == "weight")

    def test_trained_from_the_start(self) -> None:
        ours, peft = pair(target_modules=["q", "v"])
        for block in (*blocks(ours), *blocks(peft)):
            block.k.requires_grad_(True)
        check(ours, peft)
        assert siblings(ours) == {frozenset("qv")}

    @pytest.mark.parametrize("place", TARGETS)
    @pytest.mark.parametrize("how", ["disabled", "merged"])
    def test_without_adapters_for_a_while(self, place: str, how: str) -> None:
        ours, peft = pair(target_modules=TARGETS[place])
        check(ours, peft)
        before, x = calls(ours), inputs().requires_grad_()
        for _ in range(2):
            if how == "disabled":
                with ours.disable_adapter(), peft.disable_adapter():
                    assert_same(gradients(ours, x), gradients(peft, x))
            else:
                for model in (ours, peft):
                    model.merge_adapter()
                assert_same(gradients(ours, x), gradients(peft, x))
                for model in (ours, peft):
                    model.unmerge_adapter()
        assert calls(ours) == before
        check(ours, peft)


class TestMixtures:
    @pytest.mark.parametrize("place", TARGETS)
    def test_autocast(self, place: str) -> None:
        ours, peft = pair(target_modules=TARGETS[place])
        exact = copy.deepcopy(peft).double()
        x = inputs().requires_grad_()
        expected = gradients(exact, x.double())
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                found = [gradients(model, x) for model in (ours, peft)]
            for name, value in expected.items():
                mine, theirs = ((f[name].double() - value).norm() for f in found)
                assert mine <= 2.0 * theirs + torch.finfo(torch.bfloat16).eps * value.norm(), name
        assert not notes(ours) and all(found == {"fused": 2} for found in calls(ours))

    def test_of_dtypes_under_autocast(self) -> None:
        ours, peft = pair(target_modules=["q", "v"])
        for block in (*blocks(ours), *blocks(peft)):
            block.k.half()
        with torch.autocast("cpu", torch.bfloat16):
            found = [gradients(model, x) for x in [inputs().requires_grad_()] for model in (ours, peft)]
        assert found[0].keys() == found[1].keys()
        for name, value in found[1].items():
            assert (found[0][name] - value).norm() <= 0.05 * value.norm(), name

    def test_several_adapters_and_samples_that_choose_theirs(self) -> None:
        model = make(target_modules=["q_proj", "v_proj"])
        model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
        model.enable_input_require_grads()  # type: ignore[operator]
        given = batch(model)
        for active in (["second"], ["default", "second"], ["default"]):
            model.base_model.set_adapter(active)
            assert_accelerated_close(model, given, truth(fastpeft.restore(model), given))
        model.eval()
        mixed = {**given, "adapter_names": ["default", "second", "__base__"]}
        ours = step(fastpeft.accelerate(model), mixed)
        peft = step(fastpeft.restore(model), mixed)
        torch.testing.assert_close(ours.loss, peft.loss)
        for name, value in peft.gradients.items():
            torch.testing.assert_close(ours.gradients[name], value, rtol=1e-4, atol=1e-6)


class TestCalledOnlySometimes:
    @pytest.mark.parametrize("place", TARGETS)
    def test_left_out(self, place: str) -> None:
        ours, peft = pair(target_modules=TARGETS[place])
        check(ours, peft)
        for skip in (True, False):
            for block in (*blocks(ours), *blocks(peft)):
                block.skip = skip
            check(ours, peft)

    def test_the_first_one_passed_over_the_adapted_still_go_together(self) -> None:
        class Cached(Block):
            passed = False

            def forward(self, x: Tensor) -> Tensor:
                h = x * 2
                q = h if self.passed else self.q(h)
                return q * torch.sigmoid(self.k(h)) + self.v(h)

        ours, peft = pair(Cached(), target_modules=["k", "v"])
        check(ours, peft)
        for block in (*blocks(ours), *blocks(peft)):
            block.passed = True  # type: ignore[attr-defined]
        check(ours, peft)
        (block,) = blocks(ours)
        h = inputs().requires_grad_()
        block.k(h)
        assert block.v.fastpeft_group._ahead(h) is not None

    def test_with_another_input_they_do_not_separate_the_others(self) -> None:
        class Twice(Block):
            def forward(self, x: Tensor) -> Tensor:
                return self.q(x) * self.k(x).sigmoid() + self.v(x) + self.k(x + 1)

        ours, peft = pair(Twice(), target_modules=["q", "v"])
        check(ours, peft)
        assert siblings(ours) == {frozenset("qv")} and not frozen(ours)

    def test_in_two_places_of_the_tree(self) -> None:
        ours, peft = pair(target_modules=["q", "v"])
        for model in (ours, peft):
            first, last = blocks(model)
            last.k = first.k
        check(ours, peft)
        assert siblings(ours) == {frozenset("qv")}
