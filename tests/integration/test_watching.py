"""The forward that is run once more, to see who are siblings: what it costs and what it leaves behind."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import ArrowConfig, LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

import fastpeft
from fastpeft.layers import watching
from fastpeft.layers.random_state import RandomState, devices_of
from tests.integration.blocks import WIDTH, Block, Stack, blocks, check, gradients, inputs, pair
from tests.integration.models import with_lora
from tests.integration.reports import adapter_rows, notes, siblings
from tests.integration.test_errors_and_leftovers import needs_gradients

GROUPED = {frozenset("qkv")}


class TestCost:
    def test_nothing_is_searched_while_a_cache_is_passed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As for every token that is generated."""

        class Cached(Block):
            def forward(self, x: Tensor, cache: Any = None) -> Tensor:
                return super().forward(x)

        ours, peft = pair(Cached())
        (block,) = blocks(ours)
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(nn.Module, "named_modules", forbidden)
            patched.setattr(watching.SiblingWatch, "_watch", forbidden)
            for _ in range(3):
                block(inputs(), cache=[1])
        assert not siblings(ours)
        check(ours, peft)
        assert siblings(ours) == GROUPED

    @pytest.mark.parametrize("fails", [False, True])
    def test_one_more_forward_although_some_layers_are_not_reached(self, fails: bool) -> None:
        ours, peft = pair(Routed())
        for model in (ours, peft):
            routed(model).fails = fails
        check(ours, peft)
        assert routed(ours).runs == 3
        assert siblings(ours) == (set() if fails else GROUPED)
        for model in (ours, peft):
            routed(model).fails, routed(model).expert = False, 1
        check(ours, peft)
        assert routed(ours).runs == 5
        last = adapter_rows(ours)[-1]
        assert last.path.endswith("experts.1.v") and bool(last.partners) is not fails
        fastpeft.restore(ours)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in ours.modules())

    def test_an_interrupt_between(self) -> None:
        ours, peft = pair(Routed())
        hook = ours.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ours(inputs())
        hook.remove()
        check(ours, peft)
        for model in (ours, peft):
            routed(model).expert = 1
        check(ours, peft)
        assert len([row for row in adapter_rows(ours) if row.partners]) == 6


class Routed(nn.Module):
    """One of two blocks is called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Block(), Block()])
        self.expert, self.runs, self.fails = 0, 0, False

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.fails:
            needs_gradients(x)
        return self.experts[self.expert](x)


def routed(model: nn.Module) -> Routed:
    return next(m for m in model.modules() if isinstance(m, Routed))


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("called")


class Stateful(nn.Module):
    """A buffer that `change` writes into, or replaces, in each forward."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.change = change
        self.register_buffer("state", torch.ones(WIDTH), persistent=False)
        self.register_buffer("still", torch.ones(1).expand(WIDTH))
        self.register_buffer("nowhere", torch.ones(WIDTH, device="meta"), persistent=False)
        self.register_buffer("absent", None)
        self.known = 1

    def forward(self, x: Tensor) -> Tensor:
        self.change(self)
        return x * self.state


def extended(module: Any) -> None:
    """As rotary embeddings do: the number says what the buffer holds."""
    if module.known == 1:
        module.known = 2
        module.register_buffer("state", module.state + 1, persistent=False)


def added(module: Any) -> None:
    if not hasattr(module, "more"):
        module.register_buffer("more", torch.ones(1))
        module.state.mul_(2)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "written": lambda m: m.state.add_(1),
    "written through data": lambda m: m.state.data.mul_(2),
    "data assigned": lambda m: setattr(m.state, "data", m.state.data + 1),
    "replaced": lambda m: setattr(m, "state", m.state + 1),
    "replaced by None and back": lambda m: (setattr(m, "absent", m.state), setattr(m, "state", m.state + 1)),
    "extended": extended,
    "added": added,
    "left": lambda m: None,
}


class TestSideEffects:
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
    def test_buffers(self, change: Callable[[Any], Any], mode: Callable[[], Any]) -> None:
        results = []
        for model in pair(nn.Sequential(Stateful(change), Block())):
            stateful = next(m for m in model.modules() if isinstance(m, Stateful))
            x, still = inputs() if not results else x, stateful.still._version  # noqa: F821
            with mode():
                results.append((model(x), stateful.state, stateful.known, sorted(stateful._buffers)))
            assert stateful.still._version == still
        (y, state, *others), (expected, expected_state, *expected_others) = results
        torch.testing.assert_close(y, expected)
        assert torch.equal(state, expected_state) and others == expected_others

    def test_a_replaced_buffer_is_the_same_object_again(self) -> None:
        ours, peft = pair(nn.Sequential(Stateful(CHANGES["replaced"]), Block()))
        found = []
        for model in (ours, peft):
            stateful = next(m for m in model.modules() if isinstance(m, Stateful))
            before, seen = stateful.state, []
            stateful.register_forward_pre_hook(lambda m, args, b=before, seen=seen: seen.append(m.state is b))
            model(inputs())
            found.append(seen)
        assert found == [[True, True], [True]]

    def test_inference_tensors(self) -> None:
        results, x = [], inputs()
        for model in pair(nn.Sequential(Stateful(CHANGES["written"]), Block())):
            stateful = next(m for m in model.modules() if isinstance(m, Stateful))
            with torch.inference_mode():
                stateful.state = torch.ones(WIDTH)
                results += [model(x), stateful.state]
        torch.testing.assert_close(results[0], results[2])
        assert torch.equal(results[1], results[3])

    def test_spectral_norm(self) -> None:
        x, results = inputs(), []
        for model in pair(nn.Sequential(spectral_norm(nn.Linear(WIDTH, WIDTH)), Block())):
            results.append([model(x), *[value for name, value in model.named_buffers() if "parametrizations" in name]])
        assert len(results[0]) > 1
        torch.testing.assert_close(*results)

    @pytest.mark.parametrize("grad", [False, True])
    def test_a_variant_that_writes_into_adapters(self, grad: bool) -> None:
        """Arrow's first forward subtracts from all tasks' adapters what is general knowledge: once."""
        arrow = ArrowConfig(use_gks=True, top_k=1, rng_seed=0)
        arrow.task_adapter_names, arrow.gks_adapter_names = ["default", "other"], ["general"]
        config = {"target_modules": ["q", "k", "v"], "r": 4, "init_lora_weights": False}
        peft = with_lora(Stack(), None, **config)
        for name in ("other", "general"):
            peft.add_adapter(name, LoraConfig(**config))
        ours, x = fastpeft.accelerate(copy.deepcopy(peft)), inputs()
        results = []
        for model in (ours, peft):
            torch.manual_seed(0)
            model.add_adapter("router", LoraConfig(**config, arrow_config=copy.deepcopy(arrow)))
            model.set_adapter("router")
            with torch.set_grad_enabled(grad):
                y = [model(x) for _ in range(2)]
            results.append([*y, *model.state_dict().values()])
        torch.testing.assert_close(*results)
        assert not siblings(ours)
        for model in (ours, peft):
            model.delete_adapter("router")
            model.set_adapter("default")
        check(ours, peft)
        assert siblings(ours) == (set() if grad else GROUPED)

    def test_under_fake_tensors(self) -> None:
        ours, _ = pair(nn.Sequential(Stateful(CHANGES["written"]), Block()))
        with FakeTensorMode(allow_non_fake_inputs=True):
            ours(inputs())
        assert siblings(ours) == GROUPED

    def test_generators_of_the_devices_in_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        used = [SimpleNamespace(device=torch.device(name)) for name in ("cpu", "meta", "xpu:1", "xpu:0", "mps", "mps")]
        module = cast(nn.Module, SimpleNamespace(parameters=lambda: used[:4], buffers=lambda: used[4:]))
        put: list[Any] = []
        for home in (torch.xpu, torch.mps):
            monkeypatch.setattr(home, "get_rng_state", lambda *device: f"state of {device}")
            monkeypatch.setattr(home, "set_rng_state", lambda *given: put.append(given))
        state = RandomState(devices_of(module))
        assert not put
        state.put_back()
        xpus = [torch.device(f"xpu:{index}") for index in (0, 1)]
        assert put == [("state of ()",), *((f"state of ({xpu!r},)", xpu) for xpu in xpus)]


class TestErrors:
    def test_the_report_says_why_and_one_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        ours, peft = pair()
        for model in (ours, peft):
            blocks(model)[1].between = needs_gradients
        shape = {path: sorted(m.__dict__) for path, m in peft.named_modules()}
        with caplog.at_level(logging.WARNING):
            check(ours, peft, inputs().requires_grad_())
        (record,) = [record for record in caplog.records if record.name == "fastpeft"]
        assert "6 LoRA layers" in record.getMessage() and "RuntimeError: element 0 of" in record.getMessage()
        found = [row.note for row in adapter_rows(ours)]
        assert len(found) == 6 and all("siblings not found: RuntimeError: element 0 of" in note for note in found)
        assert not notes(ours)  # each layer is computed by the op all the same
        fastpeft.restore(ours)
        left = {path: set(m.__dict__) - set(shape[path]) for path, m in ours.named_modules()}
        assert not any(left.values())

    def test_accelerating_again_tries_again(self) -> None:
        ours, peft = pair()
        blocks(ours)[1].between = needs_gradients
        ours(inputs().requires_grad_())
        blocks(ours)[1].between = lambda x: None
        fastpeft.accelerate(ours)
        check(ours, peft)
        assert siblings(ours) == GROUPED
        assert not any(row.note for row in adapter_rows(ours))

    def test_no_warning_when_the_call_itself_fails(self, caplog: pytest.LogCaptureFixture) -> None:
        ours, _ = pair()
        with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError):
            ours(torch.randn(2, WIDTH + 1))
        assert not caplog.records and not any(row.note for row in adapter_rows(ours))


class TestAutocast:
    def test_a_trained_head_gets_its_gradient_in_the_first_step(self) -> None:
        ours, peft = pair(nn.Sequential(Block(), nn.Linear(WIDTH, WIDTH)))
        found = []
        x = inputs()
        for model in (ours, peft):
            next(m for m in model.modules() if isinstance(m, nn.Sequential))[1].requires_grad_(True)
            with torch.autocast("cpu", torch.bfloat16):
                found.append(gradients(model, x))
        assert found[0].keys() == found[1].keys()
        head = [name for name in found[1] if name.endswith("model.1.weight")]
        mine, theirs = (gradient[head[0]] for gradient in found)
        assert (mine - theirs).norm() <= 0.05 * theirs.norm()

    def test_no_cast_of_the_watched_forward_is_used_again(self) -> None:
        """Up to torch 2.11 such a cast, made under no_grad, cut a trained weight off; later ones tell them apart."""
        casts: list[bool] = []

        class Casts(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is torch.ops.aten._to_copy.default and args[0].shape == (WIDTH, WIDTH):
                    casts.append(torch.is_grad_enabled())
                return func(*args, **(kwargs or {}))

        class Head(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                with Casts():
                    return super().forward(x)

        ours, _ = pair(nn.Sequential(Block(), Head(WIDTH, WIDTH)))
        for module in ours.modules():
            if isinstance(module, Head):
                module.requires_grad_(True)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                ours(inputs())
        assert len(casts) == 2  # the watched forward's, and one for both calls
