"""What a training on several GPUs sends, counted by hand and in processes of gloo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft.memory.plan.planning import model_of
from fastpeft.memory.plan.several import Fabric, Shares, scaling, shares_of, spread
from tests.memory.plan.test_planning import CONFIG
from tests.processes import together

SHARES = Shares(layers=(1000, 1000), rest=600, trained=200, trained_groups=2, whole=50)


def test_by_hand() -> None:
    """Of 16 GPUs in machines of 8, at 100 and 10 bytes a second, a step of a ring taking 1 s."""
    fabric = Fabric(per_node=8, link=100, network=10, latency=1)
    ddp, whole, hybrid = (spread(SHARES, way, 16, 60, fabric) for way in ("ddp", "fsdp2", "hybrid"))
    assert (ddp.inside, ddp.across, ddp.base) == (0, 2 * 15 / 16 * 200, 2650)
    assert ddp.seconds == 375 / 10 + 2 * 15
    assert (whole.inside, whole.across, whole.base) == (0, 15 / 16 * (2 * 2000 + 600 + 200), 2600 // 16 + 50)
    assert whole.seconds == 4500 / 10 + (4 + 1 + 2) * 15
    assert (hybrid.inside, hybrid.across) == (7 / 8 * 4800, 2 * 1 / 2 * 200 / 8)
    assert hybrid.seconds == 4200 / 100 + 25 / 10 + 7 * 7 + 2 * 2
    assert ddp.efficiency == (60 / 127.5, 60 / 67.5)


def test_ddp_reduces_a_bucket_at_a_time() -> None:
    shares = replace(SHARES, trained=160 << 20)
    at_once, in_steps = (spread(shares, "ddp", 16, 60, Fabric(latency=each)).seconds for each in (0, 1))
    assert in_steps - at_once == pytest.approx((1 + 7) * 2 * 15)  # a first bucket of 1 MiB, and seven of 25


def test_one_machine_sends_nothing_to_others_and_one_gpu_nothing_at_all() -> None:
    for way in ("ddp", "fsdp2", "hybrid"):
        assert spread(SHARES, way, 8, 1, Fabric()).across == 0
        lonely = spread(SHARES, way, 1, 1, Fabric())
        assert (lonely.inside, lonely.seconds, lonely.efficiency) == (0, 0, (1, 1))


@pytest.mark.parametrize(
    ("way", "gpus", "said"),
    [
        ("fsdp", 8, "way: expected one of ddp, fsdp2, hybrid, got 'fsdp'"),
        ("ddp", 12, "gpus: expected at most 8 or a multiple of it up to 65536, got 12"),
        ("ddp", 0, "gpus: expected at most 8"),
    ],
)
def test_wrong_arguments(way: str, gpus: int, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        spread(SHARES, way, gpus, 1, Fabric())


@pytest.mark.full
def test_shares_of_a_configuration() -> None:
    """Layers that are traced once count as often as the model has them; nested scales stay whole."""
    model = model_of(CONFIG, 64, 1, 4, "qlora", "all-linear", "bfloat16", "adamw_torch", "auto")[1]
    found = shares_of(model)
    packed, ranks = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128, 4 * (7 * 64 + 2 * 64 + 2 * 32 + 3 * 128)
    assert found.layers == (packed // 2 + 2 * 2 * 64 + 4 * ranks,) * 6
    assert found.rest == 2 * (2 * 512 * 64 + 64)
    assert found.trained == 6 * 4 * ranks and found.trained_groups == 6
    assert found.whole >= 6 * packed // 64  # a byte a block, and what is rounded up
    assert [each.gpus for each in scaling(model, (8, 16))] == [8] * 3 + [16] * 3


class Sent(TorchDispatchMode):
    """Bytes that each process sends by the rings of `several`, by collective."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.processes, self.bytes = processes, {"gather": 0, "scatter": 0, "reduce": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        part = (self.processes - 1) / self.processes

        def size(tensors: Any) -> int:
            listed = tensors if isinstance(tensors, (list, tuple)) else [tensors]
            return sum(each.numel() * each.element_size() for each in listed)

        if "c10d._allgather_base_" in name:
            self.bytes["gather"] += int(part * size(args[0]))
        elif "c10d._reduce_scatter_base_" in name:
            self.bytes["scatter"] += int(part * size(args[1]))
        elif "c10d.allreduce_" in name:
            self.bytes["reduce"] += int(2 * part * size(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.full
def test_bytes_of_fully_sharded_processes(tmp_path: Path) -> None:
    """One step of two processes; sizes divide by two, so that nothing is padded."""

    def work(rank: int) -> tuple[dict[str, int], Shares]:
        from torch.distributed import device_mesh
        from torch.distributed.fsdp import fully_shard

        from fastpeft.bench.distributed.training import rows_of, tiny_model
        from fastpeft.memory.layers import model_layers

        model = tiny_model("NF4")
        layers = list(model_layers(model).values())
        size = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())  # noqa: E731
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        sizes = tuple(map(size, layers))
        shares = Shares(sizes, size(model) - sum(sizes), trained, len(layers), 0)
        mesh = device_mesh.init_device_mesh("cpu", (2,))
        for each in (*layers, model):
            fully_shard(each, mesh=mesh)
        tokens, labels = rows_of(0)
        with Sent(2) as sent:
            model(input_ids=tokens[rank::2], labels=labels[rank::2]).loss.backward()
        return sent.bytes, shares

    for sent, shares in together(2, work, tmp_path):
        assert sent["gather"] + sent["scatter"] == spread(shares, "fsdp2", 2, 1, Fabric()).inside
        assert sent["scatter"] == shares.trained // 2
