"""Two processes of gloo, each with half of the rows: the losses of one, whatever shards, recomputes or accumulates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft import LayerPolicy
from fastpeft.bench.distributed.training import rows_of, tiny_model
from fastpeft.memory.layers import model_layers
from tests.integration.blocks import Stack, assert_same, blocks, inputs, pair
from tests.integration.reports import notes
from tests.processes import together

pytestmark = pytest.mark.full
STEPS, ACCUMULATED = 3, 2


def losses(model: nn.Module, rank: int, processes: int, forward: Any = None) -> list[float]:
    """Of all rows, of steps whose gradients are those of two batches; DDP sends them with the second."""
    forward = model if forward is None else forward
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    found = []
    for step in range(STEPS):
        batches = [rows_of(ACCUMULATED * step + i) for i in range(ACCUMULATED)]
        counted = sum(int((labels[:, 1:] != -100).sum()) for _, labels in batches)
        whole = torch.zeros(())
        for place, (tokens, labels) in enumerate(batches):
            last = place == ACCUMULATED - 1
            if hasattr(forward, "set_requires_gradient_sync"):
                forward.set_requires_gradient_sync(last)
            mine = slice(rank, None, processes)
            with forward.no_sync() if hasattr(forward, "no_sync") and not last else nullcontext():
                part = forward(input_ids=tokens[mine], labels=labels[mine], num_items_in_batch=counted).loss
                (part * processes).backward()
            whole += part.detach()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if processes > 1:
            torch.distributed.all_reduce(whole)
        found.append(whole.item())
    return found


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    from torch.distributed import device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = device_mesh.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for each in (*model_layers(model).values(), model):
        fully_shard(each, mesh=mesh, **settings)
    return model


def by_ddp(base: str, rank: int) -> list[float]:
    model = fastpeft.accelerate(tiny_model(base))
    return losses(model, rank, 2, nn.parallel.DistributedDataParallel(model))


def by_policy(policy: LayerPolicy) -> Callable[[str, int], list[float]]:
    return lambda base, rank: losses(sharded(fastpeft.accelerate(tiny_model(base), memory=policy)), rank, 2)


def accelerated_last(base: str, rank: int) -> list[float]:
    return losses(fastpeft.accelerate(sharded(tiny_model(base))), rank, 2)


def prepared(model: nn.Module, rank: int) -> nn.Module:
    """As accelerate shards for a Trainer; it has its own groups, and leaves 4-bit weights in uint8 whole."""
    from types import SimpleNamespace

    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"], reshard_after_forward=True,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=None, device=torch.device("cpu"),
        is_main_process=rank == 0, mixed_precision="no",
    )  # fmt: skip
    return fsdp2_prepare_model(accelerator, model)


def by_accelerate(base: str, rank: int) -> list[float]:
    return losses(prepared(fastpeft.accelerate(tiny_model(base)), rank), rank, 2)


@pytest.mark.parametrize("base", ["dense", "NF4"])
@pytest.mark.parametrize(
    "spread",
    [
        by_ddp,
        by_policy(LayerPolicy("recompute")),
        by_policy(LayerPolicy("offload")),
        by_policy(LayerPolicy("keep", streamed=True)),
        accelerated_last,
        by_accelerate,
    ],
    ids=["ddp", "recompute", "offload", "streamed", "accelerated last", "accelerate"],
)
def test_accumulated_steps_are_those_of_one_process(
    spread: Callable[[str, int], list[float]], base: str, tmp_path: Path
) -> None:
    wanted = losses(fastpeft.accelerate(tiny_model(base)), 0, 1)
    for found in together(2, lambda rank: spread(base, rank), tmp_path):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_an_adapter_that_one_process_does_not_use(tmp_path: Path) -> None:
    """Its gradient is that of the process which used it, divided by two."""
    ours, peft = pair(Stack(depth=2))
    x = [inputs(), inputs()]

    def step(model: nn.Module, rank: int) -> dict[str, Tensor]:
        blocks(model)[1].skip = rank == 1
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):  # the first finds the siblings
            model.zero_grad(set_to_none=True)
            wrapped(x[rank]).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (tmp_path / "peft").mkdir()
    wanted = together(2, lambda rank: step(copy.deepcopy(peft), rank), tmp_path / "peft")
    for found, expected in zip(together(2, lambda rank: step(ours, rank), tmp_path), wanted, strict=True):
        assert_same(found, expected)


def test_projections_that_are_sharded_one_by_one_run_peft(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[list[float], str]:
        from torch.distributed import device_mesh
        from torch.distributed.fsdp import fully_shard

        model, mesh = fastpeft.accelerate(tiny_model("NF4")), device_mesh.init_device_mesh("cpu", (2,))
        for path, module in list(model.named_modules()):
            if path.endswith("base_layer"):
                fully_shard(module, mesh=mesh)
        return losses(fully_shard(model, mesh=mesh), rank, 2), str(notes(model))

    wanted = losses(tiny_model("NF4"), 0, 1)
    for found, said in together(2, work, tmp_path):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
        assert "FSDPLinear4bit in place of Linear" in said


def test_floating_storage_that_mixed_precision_casts_is_an_error(tmp_path: Path) -> None:
    def work(rank: int) -> str:
        import bitsandbytes as bnb
        from torch.distributed.fsdp import MixedPrecisionPolicy

        model = tiny_model("dense")
        for path, module in list(model.named_modules()):
            if path.endswith("base_layer"):
                layer = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, quant_type="nf4", device="meta",
                    quant_storage=torch.float16,
                )  # fmt: skip
                layer.weight = bnb.nn.Params4bit(
                    module.weight.data, quant_type="nf4", quant_storage=torch.float16, module=layer
                )
                model.get_submodule(path.removesuffix(".base_layer")).base_layer = layer.to("cpu")
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        sharded(fastpeft.accelerate(model), mp_policy=policy)
        with pytest.raises(ValueError, match=r"expected its storage in torch.float16, got torch.bfloat16: FSDP2"):
            model(input_ids=rows_of(0)[0])
        return "refused"

    assert together(2, work, tmp_path) == ["refused"] * 2
