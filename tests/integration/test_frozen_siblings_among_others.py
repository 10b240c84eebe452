"""Frozen siblings are still the modules that PEFT, hooks, copies, wrappers and compilers take them for."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any
from weakref import ref

import bitsandbytes as bnb
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn

import fastpeft
from fastpeft.layers.frozen import FrozenSibling
from tests.integration.blocks import assert_same, blocks, check, gradients, inputs, pair
from tests.integration.models import batch, make
from tests.integration.quantised import make_quantised
from tests.integration.reports import adapter_rows, mlp_rows, notes, shape_of, siblings
from tests.integration.steps import assert_step_close, step, truth
from tests.integration.test_compiled_models import Compiled, compiled, compiled_step  # noqa: F401
from tests.integration.test_copies_of_parts import nothing
from tests.integration.test_frozen_siblings import GROUPED, TARGETS, calls, frozen
from tests.integration.test_hooks import hang

NAMES = {"first": "q", "between": "k", "last": "v"}


class TestRestored:
    @pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
    def test_leaves_no_trace(self, nf4: bool) -> None:
        lora_config = {"target_modules": ["q_proj", "v_proj"]}
        model = make_quantised(lora=lora_config) if nf4 else make(**lora_config)
        model.enable_input_require_grads()  # type: ignore[operator]
        shape, names = shape_of(model), list(model.state_dict())
        step(fastpeft.accelerate(model), batch(model))
        assert frozen(model) and list(model.state_dict()) == names
        assert shape_of(fastpeft.restore(model)) == shape

    @pytest.mark.parametrize("place", TARGETS)
    def test_between_two_siblings(self, place: str) -> None:
        ours, peft = pair(target_modules=TARGETS[place])
        check(ours, peft)
        for block in blocks(ours):
            block.between = lambda _, block=block: fastpeft.restore(block)
        check(ours, peft)
        assert not any(isinstance(m, FrozenSibling) for m in ours.modules())

    def test_switched_off_and_on(self) -> None:
        ours, peft = pair(target_modules=["q", "v"])
        check(ours, peft)
        fastpeft.accelerate(ours, lora=False)
        assert type(blocks(ours)[0].k) is nn.Linear
        check(ours, peft)
        check(fastpeft.accelerate(ours), peft)
        assert siblings(ours) == GROUPED


class TestPeft:
    @pytest.mark.parametrize("merge", [False, True])
    def test_unloads_plain_layers(self, merge: bool) -> None:
        ours, peft = pair(target_modules=["q", "v"])
        check(ours, peft)
        x, found = inputs(), []
        for model in (ours, peft):
            found.append(model.base_model.merge_and_unload() if merge else model.base_model.unload())
        torch.testing.assert_close(found[0](x), found[1](x))
        assert {type(m) for m in found[0].modules()} == {type(m) for m in found[1].modules()}

    @pytest.mark.parametrize("again", [False, True], ids=["left", "accelerated again"])
    def test_gives_them_adapters_later(self, again: bool) -> None:
        ours, peft = pair(target_modules=["q", "v"])
        check(ours, peft)
        for model in (ours, peft):
            torch.manual_seed(0)
            model.add_adapter("second", LoraConfig(r=2, target_modules=["q", "k", "v"], init_lora_weights=False))
            model.base_model.set_adapter(["default", "second"])
            assert isinstance(blocks(model)[0].k, lora.Linear)
        if again:
            fastpeft.accelerate(ours)
        check(ours, peft)
        if again:
            assert siblings(ours) == GROUPED and not notes(ours) and not frozen(ours)
        else:
            assert all(path.endswith("k.base_layer") for path in frozen(ours)) and all(calls(ours))
        for model in (ours, peft):
            model.delete_adapter("second")
        check(ours, peft)
        found = [model.base_model.unload() for model in (ours, peft)]
        assert {type(m) for m in found[0].modules()} == {type(m) for m in found[1].modules()}

    def test_gives_them_4_bit_adapters_later(self) -> None:
        model = make_quantised(lora={"target_modules": ["q_proj", "v_proj"]})
        fastpeft.accelerate(model)
        step(model, batch(model))
        assert len(frozen(model)) == 2
        model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        assert sum(type(m) is lora.Linear4bit for m in model.modules()) == 2 * 5  # k, o and the MLP's three
        model.base_model.set_adapter(["default", "second"])
        given = batch(model)
        ours = step(fastpeft.accelerate(model), given)
        assert not frozen(model) and all(type(m.base_layer) is bnb.nn.Linear4bit for m in model.modules()
                                         if isinstance(m, lora.Linear4bit))  # fmt: skip
        peft = step(fastpeft.restore(model), given)
        torch.testing.assert_close(ours.loss, peft.loss)

    @pytest.mark.parametrize("again", [False, True], ids=["left", "accelerated again"])
    def test_trains_them_whole_later(self, again: bool) -> None:
        ours, peft = pair(target_modules=["q", "v"])
        check(ours, peft)
        for model in (ours, peft):
            torch.manual_seed(0)
            second = LoraConfig(r=2, target_modules=["q"], modules_to_save=["k"], init_lora_weights=False)
            model.add_adapter("second", second)
            model.base_model.set_adapter("second")
        if again:
            fastpeft.accelerate(ours)
        check(ours, peft)
        assert any("modules_to_save.second.weight" in name for name in gradients(ours, inputs()))
        if again:
            assert siblings(ours) == {frozenset("qv")}

    def test_builds_our_layers_over_them(self) -> None:
        ours, _ = pair(target_modules=["q", "v"])
        gradients(ours, inputs().requires_grad_())
        base = nn.Sequential(blocks(ours)[0].k)
        again = get_peft_model(base, fastpeft.lora_config(LoraConfig(target_modules=["0"])))
        assert "FastLinear" in {type(m).__name__ for m in again.modules()}


class TestHooks:
    @pytest.mark.parametrize("kind", ["forward", "pre", "changes output", "changes input", "backward"])
    @pytest.mark.parametrize("place", NAMES)
    def test_run_as_in_peft(self, place: str, kind: str) -> None:
        ours, peft = pair(target_modules=TARGETS[place])
        check(ours, peft)
        x, found = inputs().requires_grad_(), []
        for model in (ours, peft):
            called: list[str] = []
            for block in blocks(model):
                hang(getattr(block, NAMES[place]), kind, called)
            found.append((gradients(model, x), len(called)))
        assert_same(found[0][0], found[1][0])
        assert found[0][1] == found[1][1] and (found[0][1] or kind.startswith("changes"))
        assert any("calls by itself: a hook on" in row.note for row in adapter_rows(ours))

    @pytest.mark.parametrize("order", ["hook accelerate unhook restore", "accelerate hook restore unhook",
                                       "accelerate hook unhook restore"])  # fmt: skip
    def test_of_accelerate_that_do_nothing(self, order: str) -> None:
        peft = pair(target_modules=["q", "v"])[1]
        ours, seen = copy.deepcopy(peft), []
        for action in order.split():
            for module in ours.modules():
                if action == "hook" and (isinstance(module, nn.Linear) or hasattr(module, "base_layer")):
                    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
                elif action == "unhook":
                    remove_hook_from_module(module)
            if action in ("accelerate", "restore"):
                getattr(fastpeft, action)(ours)
            check(ours, peft)
            seen.append((siblings(ours), bool(notes(ours))))
        assert (GROUPED, False) in seen and {type(m) for m in ours.modules()} == {type(m) for m in peft.modules()}

    def test_of_accelerate_that_do_something(self) -> None:
        class Double(ModelHook):
            def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
                return output * 2

        ours, peft = pair(target_modules=["q", "v"])
        check(ours, peft)
        for model in (ours, peft):
            for block in blocks(model):
                add_hook_to_module(block.k, Double())
        check(ours, peft)

    def test_a_forward_replaced_on_the_instance_keeps_out(self) -> None:
        ours, peft = pair(target_modules=["q", "v"])
        for block in (*blocks(ours), *blocks(peft)):
            block.k.forward = lambda x: x.tanh()  # type: ignore[method-assign]
        check(ours, peft)
        assert siblings(ours) == {frozenset("qv")}


class TestCopies:
    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    @pytest.mark.parametrize("place", TARGETS)
    def test_of_a_block_take_the_group_along(self, place: str, how: str) -> None:
        ours, peft = pair(target_modules=TARGETS[place])
        check(ours, peft)
        for block in blocks(ours):
            block.between = nothing
        taken = blocks(ours)[1]
        copied = copy.deepcopy(taken) if how == "deepcopy" else pickle.loads(pickle.dumps(taken))
        everything = [ref(m) for m in ours.modules()]
        del ours, taken, block
        gc.collect()
        assert not any(module() for module in everything)
        check(copied, blocks(peft)[1])
        assert siblings(copied) == GROUPED
        fastpeft.restore(copied)
        assert not any(isinstance(m, FrozenSibling) or m._forward_hooks for m in copied.modules())

    @pytest.mark.parametrize("action", ["call", "restore", "accelerate"])
    def test_of_one_are_plain_layers(self, action: str) -> None:
        ours, _ = pair(target_modules=["q", "v"])
        gradients(ours, inputs().requires_grad_())
        layer, x = blocks(ours)[0].k, inputs()
        copied = copy.deepcopy(layer)
        assert adapter_rows(ours)[1].partners and not adapter_rows(copied)
        if action != "call":
            getattr(fastpeft, action)(copied)
        assert torch.equal(copied(x), layer(x))
        assert type(copied) is nn.Linear and not any(name.startswith("fastpeft_group") for name in copied.__dict__)

    def test_of_4_bit_models_through_a_file(self) -> None:
        model = fastpeft.accelerate(make_quantised(lora={"target_modules": ["q_proj", "v_proj"]}))
        given = batch(model)
        expected = step(model, given)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        assert step(again, given).equals(step(model, given)) and len(frozen(again)) == 2
        torch.testing.assert_close(step(again, given).loss, expected.loss)


class TestWrappers:
    def test_fully_sharded(self, tmp_path: Any) -> None:
        import torch.distributed as dist
        from torch.distributed.fsdp import fully_shard

        ours, peft = pair(target_modules=["q", "v"])
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        try:
            check(ours, peft)
            mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
            fully_shard(blocks(ours)[0].k, mesh=mesh)  # FSDP2's class before ours
            for block in blocks(ours):
                fully_shard(block, mesh=mesh)
            fully_shard(ours, mesh=mesh)
            x = inputs().requires_grad_()
            expected = gradients(peft, x)
            for _ in range(2):
                for _ in range(2):
                    found = gradients(ours, x)
                    assert_same({name: getattr(g, "to_local", lambda g=g: g)() for name, g in found.items()}, expected)
                fastpeft.restore(ours)
        finally:
            dist.destroy_process_group()

    @pytest.mark.parametrize("place", TARGETS)
    def test_parameters_that_are_plain_attributes(self, place: str) -> None:
        """As FSDP1 leaves them."""
        ours, peft = pair(target_modules=TARGETS[place])
        check(ours, peft)
        for model in (ours, peft):
            for path in frozen(ours):
                linear: Any = model.get_submodule(path)
                linear.weight = linear._parameters.pop("weight").detach().clone()
        check(ours, peft)
        assert any("held elsewhere" in reason for found in calls(ours) for reason in found)

    def test_replicas_of_data_parallel(self) -> None:
        ours, peft = pair(target_modules=["q", "v"])
        check(ours, peft)
        for module in ours.modules():
            module._is_replica = True  # type: ignore[assignment]
        check(ours, peft)
        assert "a replica of nn.DataParallel" in notes(ours)

    def test_moved_to_another_dtype(self) -> None:
        ours, peft = pair(target_modules=["q", "v"])
        check(ours, peft)
        ours, peft = ours.double(), peft.double()
        x = inputs().double().requires_grad_()
        assert_same(gradients(ours, x), gradients(peft, x))

    @pytest.mark.parametrize(
        "place", ["first", *[pytest.param(place, marks=pytest.mark.full) for place in ("between", "last", "two")]]
    )
    def test_compiled_as_a_whole(self, place: str, compiled: Compiled) -> None:  # noqa: F811
        ours, peft = pair(target_modules=TARGETS[place])
        check(ours, peft)
        traced = compiled(ours, fullgraph=True)
        x = inputs().requires_grad_()
        assert_same(gradients(ours, x, traced), gradients(peft, x))
        assert compiled.forward["lora_group"] == compiled.backward["lora_group_backward"] == 2
        check(ours, peft)

    @pytest.mark.full
    def test_compiled_over_4_bits(self, compiled: Compiled) -> None:  # noqa: F811
        model = make_quantised(lora={"target_modules": ["q_proj", "v_proj"]})
        given = batch(model)
        eager = [step(fastpeft.accelerate(model), given) for _ in range(2)][1]
        found = compiled_step(model, compiled(model, fullgraph=True), given)
        torch.testing.assert_close(found.loss, eager.loss)
        for name, gradient in eager.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-4, atol=1e-6)
        assert compiled.forward["lora_group"] == 2


def test_a_frozen_gate_of_an_mlp_that_is_taken_apart() -> None:
    model: PeftModel = make(target_modules=["up_proj"])
    given = batch(model)
    peft, exact = step(model, given), truth(model, given)
    fastpeft.accelerate(model)
    for _ in range(2):
        assert_step_close(step(model, given), peft, exact)
    assert all(row.accelerated and not row.note for row in mlp_rows(model))
    for name, module in model.named_modules():
        if name.endswith("down_proj"):
            module.register_forward_hook(lambda *_: None)
    assert_step_close(step(model, given), peft, exact)
    assert siblings(model) == {frozenset(["gate_proj", "up_proj"])} and any(calls(model))
    assert all("part by part" in row.note for row in mlp_rows(model))
    fastpeft.accelerate(fastpeft.accelerate(model, mlp=False))
    assert len(mlp_rows(model)) == 2 and all(row.accelerated for row in mlp_rows(model))
