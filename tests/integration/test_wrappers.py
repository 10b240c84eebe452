"""What wraps or transforms a whole model: DataParallel, DistributedDataParallel, torch.func, torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastpeft
from tests.integration.blocks import Stack, assert_same, blocks, check, gradients, inputs, pair
from tests.integration.reports import notes, siblings

GROUPED = {frozenset("qkv")}


def test_replicas_of_data_parallel_run_peft() -> None:
    ours, peft = pair()
    replica = copy.deepcopy(ours)
    for module in replica.modules():
        module._is_replica = True  # type: ignore[assignment]
    check(replica, peft)
    assert "a replica of nn.DataParallel" in notes(replica)
    check(ours, peft)


@pytest.mark.parametrize("first", ["accelerate", "wrap"])
def test_distributed_data_parallel(first: str, tmp_path: Any) -> None:
    import torch.distributed as dist

    _, peft = pair()
    ours = copy.deepcopy(peft)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        if first == "accelerate":
            fastpeft.accelerate(ours)
        wrapped = nn.parallel.DistributedDataParallel(ours)
        if first == "wrap":
            fastpeft.accelerate(wrapped)
        x = inputs()
        for _ in range(2):
            assert_same(gradients(ours, x, wrapped), gradients(peft, x))
    finally:
        dist.destroy_process_group()
    assert siblings(ours) == GROUPED


def test_functional_call() -> None:
    ours, peft = pair()
    x = inputs()
    for _ in range(2):
        found = []
        for model in (ours, peft):
            torch.manual_seed(2)
            other = {
                n: torch.randn_like(p).mul_(0.3).requires_grad_(p.requires_grad) for n, p in model.named_parameters()
            }
            y = torch.func.functional_call(model, other, (x,))
            y.square().sum().backward()
            found.append({"y": y.detach(), **{n: t.grad for n, t in other.items() if t.grad is not None}})
        assert_same(*found)
    check(ours, peft)


def test_function_transforms_run_peft() -> None:
    ours, peft = pair()
    x = inputs(3, 2)
    for _ in range(2):
        for transform in (torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).square().sum())):
            torch.testing.assert_close(transform(ours)(x), transform(peft)(x))
        primal = torch.func.jvp(ours, (x,), (x,)), torch.func.jvp(peft, (x,), (x,))
        torch.testing.assert_close(*primal)
    assert "torch.func" in notes(ours)
    check(ours, peft)


def test_fully_sharded(tmp_path: Any) -> None:
    """FSDP2 in one process: parameters are DTensors between the steps, plain inside forward and backward."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    ours, peft = pair()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for block in blocks(ours):
            fully_shard(block, mesh=mesh)
        fully_shard(ours, mesh=mesh)
        x = inputs()
        expected = gradients(peft, x)
        for _ in range(3):
            found = gradients(ours, x)
            assert_same({name: getattr(g, "to_local", lambda g=g: g)() for name, g in found.items()}, expected)
    finally:
        dist.destroy_process_group()
    assert not notes(ours)


@pytest.mark.parametrize("taken", ["base_layer", "lora_A.default", "lora_B.default"])
def test_parameters_that_are_plain_attributes_run_peft(taken: str) -> None:
    """As FSDP1 leaves them: views of one flat parameter, in no module's `_parameters`."""
    ours, peft = pair()
    check(ours, peft)
    for model in (ours, peft):
        linear: Any = blocks(model)[0].k.get_submodule(taken)
        value = linear._parameters.pop("weight")
        linear.weight = value.detach().clone()
    x = inputs()
    assert_same(gradients(ours, x), gradients(peft, x))
    assert "weight of a Linear held elsewhere" in notes(ours)


def test_what_deepspeed_partitions_runs_peft_and_says_so() -> None:
    """As ZeRO-3 leaves them: parameters without elements, which a hook before each call fills."""
    ours, peft = pair()
    check(ours, peft)
    for module in ours.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.ds_id, parameter.whole, parameter.data = 1, parameter.data, parameter.data.new_empty(0)
                module.register_forward_pre_hook(gathered)
    x = inputs()
    y = ours(x)
    torch.testing.assert_close(y, peft(x))
    assert "a parameter sharded by DeepSpeed" in notes(ours)


def gathered(module: nn.Module, _: Any) -> None:
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = parameter.whole  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "when",
    [
        *(pytest.param(when, marks=pytest.mark.full) for when in ("after accelerating", "after the first forward")),
        "before accelerating",  # for the others see test_compiled_models.py
    ],
)
def test_compiled(backend: str, when: str) -> None:
    ours, peft = pair(Stack(depth=1))
    if when == "after the first forward":
        check(ours, peft)
    if when == "before accelerating":
        fastpeft.restore(ours)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend=backend)
    if when == "before accelerating":
        fastpeft.accelerate(compiled)
    x = inputs()
    for _ in range(2):
        assert_same(gradients(ours, x, compiled), gradients(peft, x))
    check(ours, peft)  # and without compiling, afterwards
    torch._dynamo.reset()
