"""What a forward meets: modes, dtypes, mixtures of frozen and trained, errors half-way, changes before backward."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from tests.integration.blocks import WIDTH, Block, Stack, assert_same, blocks, check, gradients, inputs, many, pair
from tests.integration.reports import notes, siblings

GROUPED = {frozenset("qkv")}
pytestmark = pytest.mark.usefixtures("nan_filled")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_and_then_with_them(mode: Callable[[], Any]) -> None:
    ours, peft = pair()
    x = many()
    for _ in range(2):
        with mode():
            y = ours(x)
            assert not y.requires_grad
            torch.testing.assert_close(y, peft(x))
        check(ours, peft)
    assert siblings(ours) == GROUPED and not notes(ours)


class TestWhatIsTrained:
    @pytest.mark.parametrize("trained", ["lora_A", "lora_B", "base_layer.bias", "k.", "v.lora_B", "nothing"])
    @pytest.mark.parametrize("input_too", [False, True])
    def test_any_mixture(self, trained: str, input_too: bool) -> None:
        ours, peft = pair()
        for model in (ours, peft):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trained in name and "base_layer.weight" not in name)
        if trained == "nothing" and not input_too:
            assert not ours(inputs()).requires_grad
        else:
            check(ours, peft, inputs().requires_grad_(input_too))
        assert not notes(ours)

    def test_a_trained_base_weight(self) -> None:
        ours, peft = pair()
        for model in (ours, peft):
            blocks(model)[0].k.base_layer.weight.requires_grad_(True)
        check(ours, peft)
        assert "the base weight is trained" in notes(ours)

    def test_a_trained_base_weight_recomputed_with_dropout(self) -> None:
        """Reentrant checkpointing runs forward without gradients, then with them: both must drop the same elements."""
        ours, _ = pair(lora_dropout=0.5)
        layer = blocks(ours)[0].q
        layer.base_layer.weight.requires_grad_(True)
        x = torch.randn(40, WIDTH, requires_grad=True)
        torch.manual_seed(3)
        checkpoint(layer, x, use_reentrant=True).sum().backward()
        recomputed, x.grad = x.grad, None
        torch.manual_seed(3)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, recomputed)

    def test_frozen_and_thawed_between_steps(self) -> None:
        ours, peft = pair()
        for flag in (True, False, True):
            for model in (ours, peft):
                for name, parameter in model.named_parameters():
                    if "q.lora_" in name or "v.lora_B" in name:
                        parameter.requires_grad_(flag)
            check(ours, peft)

    def test_projections_that_are_not_called_get_no_gradient(self) -> None:
        """Not zeros: an optimizer would decay the weights."""
        ours, peft = pair()
        check(ours, peft)
        for block in (*blocks(ours), *blocks(peft)):
            block.skip = True
        check(ours, peft)


class TestShapes:
    @pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1), (3,), (2, 3, 4), (1, 2, 2, 3)])
    def test_any_number_of_dimensions(self, shape: tuple[int, ...]) -> None:
        ours, peft = pair()
        check(ours, peft, inputs(*shape).requires_grad_())
        assert not notes(ours)

    def test_one_dimension_runs_peft(self) -> None:
        ours, peft = pair()
        x = torch.randn(16)
        torch.testing.assert_close(ours(x), peft(x))
        assert "an input of 1 dimensions" in notes(ours)

    def test_inputs_that_are_views(self) -> None:
        ours, peft = pair()
        for x in (torch.randn(5, 16, 2).transpose(1, 2)[::2], torch.randn(16).expand(3, 4, 16)):
            assert_same(gradients(ours, x), gradients(peft, x))


def test_two_forwards_before_the_backwards() -> None:
    found = []
    for model in pair():
        torch.manual_seed(5)
        one, two = model(inputs()), model(inputs())
        (one.square().sum() + two.pow(3).sum()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(*found)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_only_a_part(use_reentrant: bool) -> None:
    ours, peft = pair(lora_dropout=0.0)

    def forward(model: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            first, last = blocks(model)
            return last(checkpoint(first, x, use_reentrant=use_reentrant))

        return run

    x = inputs().requires_grad_()
    for _ in range(2):
        assert_same(gradients(ours, x, forward(ours)), gradients(peft, x, forward(peft)))
    assert siblings(ours) == GROUPED


def test_saved_tensors_moved_elsewhere_until_backward() -> None:
    ours, peft = pair()
    x, found = inputs().requires_grad_(), []
    for model in (ours, peft):
        with torch.autograd.graph.save_on_cpu():
            found.append(gradients(model, x))
    assert_same(*found)


def test_siblings_called_in_another_order() -> None:
    class Turned(Block):
        turned = False

        def forward(self, x: Tensor) -> Tensor:
            first, *others = (self.v, self.k, self.q) if self.turned else (self.q, self.k, self.v)
            return first(x).sigmoid() * others[0](x) + others[1](x)

    ours, peft = pair(Turned())
    check(ours, peft)
    for turned in (True, False):
        for block in (*blocks(ours), *blocks(peft)):
            block.turned = turned  # type: ignore[attr-defined]
        check(ours, peft)


def test_projections_that_share_an_input_only_sometimes_stay_alone() -> None:
    class Sometimes(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x) + self.q(x + 1) * self.v(x + 1)

    ours, peft = pair(Sometimes())
    check(ours, peft)
    assert not siblings(ours) and not notes(ours)


def test_siblings_of_different_dtypes() -> None:
    """k's and v's adapters are wider than q's, which is the first to be called: they may not lose by the company."""
    ours, peft = pair(Block())
    outputs: dict[str, list[Tensor]] = {"k": [], "v": []}
    for block in (*blocks(ours), *blocks(peft)):
        for adapters in (block.q.lora_A, block.q.lora_B):  # type: ignore[union-attr]
            adapters.to(torch.bfloat16)  # type: ignore[operator]
        for name, kept in outputs.items():
            getattr(block, name).register_forward_hook(lambda layer, args, y, kept=kept: kept.append(y))
    x = inputs()
    for model in (ours, ours, peft):
        model(x)
    for *_, second, expected in outputs.values():
        torch.testing.assert_close(second, expected)
    assert siblings(ours) == GROUPED and not notes(ours)


def test_outputs_changed_in_place() -> None:
    """As OLMo clamps its queries."""

    class Clamped(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            return q.clamp_(-1, 1) * k.mul_(2.0) + v.add_(1.0)

    check(*pair(Clamped()))


def test_one_layer_called_many_times() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.block(x) + self.block(x)
            return x

    ours, peft = pair(Repeated())
    check(ours, peft)
    assert siblings(ours) == GROUPED


def test_an_inner_module_called_first() -> None:
    ours, peft = pair()
    x = inputs().requires_grad_()
    for inner_ours, inner_peft in ((blocks(ours)[1], blocks(peft)[1]), (ours.base_model.model, peft.base_model.model)):
        assert_same(gradients(inner_ours, x), gradients(inner_peft, x))
    check(ours, peft)
    assert siblings(ours) == GROUPED


def test_two_models_in_one_process() -> None:
    ours, peft = pair()
    alone = {id(m): dict(m.__dict__) for m in peft.modules()}
    check(ours, peft)
    assert alone.keys() == {id(m) for m in peft.modules()}
    other, other_peft = pair()
    check(other, other_peft)
    check(ours, peft)


def test_accelerating_a_part_and_then_the_whole() -> None:
    for order in ((0, 1), (1, 0), (0, 1, 0)):
        peft = copy.deepcopy(pair()[1])
        ours = copy.deepcopy(peft)
        roots = (ours, blocks(ours)[0])
        for i in order:
            fastpeft.accelerate(roots[i])
        check(ours, peft)
        assert siblings(ours) == GROUPED
        fastpeft.restore(roots[1])
        check(ours, peft)
        fastpeft.restore(ours)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in ours.modules())
        assert not any(name.startswith("fastpeft") for m in ours.modules() for name in m.__dict__)


def test_threads_share_an_accelerated_model() -> None:
    ours, peft = pair(Stack())
    batches = [many() for _ in range(4)]
    with torch.no_grad():
        expected = [peft(x) for x in batches]
    wrong: list[str] = []

    def work(x: Tensor, y: Tensor) -> None:
        for _ in range(30):
            with torch.no_grad():
                if not torch.allclose(ours(x), y, rtol=1e-4, atol=1e-5):
                    wrong.append(threading.current_thread().name)

    threads = [threading.Thread(target=work, args=one) for one in zip(batches, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
