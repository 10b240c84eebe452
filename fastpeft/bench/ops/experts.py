"""A mixture's experts with LoRA on their stacked matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Forward, Inputs, OpCase
from .making import Numbers, by_name, floors, package, peft_layer

SCALING = 2.0


class Mixture(NamedTuple):
    """Sizes of a layer of experts, gate and up in one matrix; each token takes `chosen` of the experts."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    chosen: int


QWEN3_30B_A3B = Mixture("Qwen3-30B-A3B", 2048, 768, 128, 8)
SMALL = Mixture("a quarter of Qwen3-30B-A3B's sizes, 8 experts", 512, 192, 8, 2)


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """A small mixture in fp32 on a CPU; all 128 experts and 4096 tokens in bf16 on a GPU."""
    if device == "cpu":
        for tokens in (16,) if depth == "quick" else (16, 256):
            yield case(SMALL, tokens, 8, torch.float32)
        return
    yield case(QWEN3_30B_A3B, 4096, 8, torch.bfloat16)
    if depth != "quick":
        yield case(QWEN3_30B_A3B, 1024, 8, torch.bfloat16)
    if depth == "full":
        yield case(QWEN3_30B_A3B, 4096, 64, torch.bfloat16)


def case(shape: Mixture, tokens: int, rank: int, dtype: torch.dtype) -> OpCase:
    """x (tokens, hidden), each through `chosen` experts, with adapters laid out as PEFT's.

    Floor, with R = tokens chosen rows, h = hidden and i = intermediate: forward has 6 R h i operations of the frozen
    matrices, and 2 R rank (2 h + 3 i) of the adapters; backward as many of the frozen ones and twice the adapters'.
    Forward reads all experts, x and adapters and writes y; backward reads dy and all of these, and writes the gradients
    of x, of the weights of the choices, and of the adapters.
    """
    hidden, inner, experts = shape.hidden, shape.intermediate, shape.experts

    def make(device: str, dtype_: torch.dtype, seed: int) -> Inputs:
        numbers = Numbers(device, dtype_, dtype, seed)

        def adapter(name: str, out: int, features: int) -> dict[str, Tensor]:
            a = numbers.normal(rank * experts, features, scale=features**-0.5)
            b = numbers.normal(out, rank * experts, scale=0.1 * rank**-0.5)
            return {f"{name}_a": nn.Parameter(a), f"{name}_b": nn.Parameter(b)}

        scores = torch.rand((tokens, experts), device=device, generator=numbers.generator)
        weights, index = scores.topk(shape.chosen)
        tensors = {
            "x": numbers.normal(tokens, hidden).requires_grad_(),
            "index": index,
            "weights": (weights / weights.sum(-1, keepdim=True)).to(dtype).to(dtype_).requires_grad_(),
            "gate_up": numbers.normal(experts, 2 * inner, hidden, scale=hidden**-0.5),
            "down": numbers.normal(experts, hidden, inner, scale=inner**-0.5),
            **adapter("gate_up", 2 * inner, hidden),
            **adapter("down", hidden, inner),
        }
        wanted = tuple(tensor for tensor in tensors.values() if tensor.requires_grad)
        return Inputs(tensors, wanted, (numbers.normal(tokens, hidden),))

    rows, size = tokens * shape.chosen, dtype.itemsize
    frozen, adapted = 6.0 * rows * hidden * inner, 2.0 * rows * rank * (2 * hidden + 3 * inner)
    x, adapters, choices = tokens * hidden * size, rank * experts * (2 * hidden + 3 * inner) * size, rows * size
    operands = x + experts * 3 * hidden * inner * size + adapters + choices + 8 * rows
    return OpCase(
        op="experts",
        name=f"{shape.name}, {tokens} tokens, rank {rank}",
        dtype=dtype,
        make=make,
        floors=floors((frozen + adapted, frozen + 2 * adapted), operands, x, operands, x + adapters + choices),
        reference=by_name(_plain),
        peers={"fastpeft": by_name(_fastpeft), "peft": _peft},
        settings={"model": shape.name, "tokens": tokens, "rank": rank, "experts": experts},
    )


def _plain(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, **adapters: Tensor) -> Any:
    """A loop over the experts, as transformers' eager one, with LoRA beside each projection."""
    y = torch.zeros_like(x)

    def project(x: Tensor, stack: Tensor, name: str, expert: int) -> Tensor:
        a, b = by_expert(adapters, name, len(stack))
        return F.linear(x, stack[expert]) + SCALING * F.linear(F.linear(x, a[expert]), b[expert])

    for expert in index.unique().tolist():
        tokens, choices = torch.where(index == expert)
        gate, up = project(x[tokens], gate_up, "gate_up", expert).chunk(2, -1)
        part = project(F.silu(gate) * up, down, "down", expert) * weights[tokens, choices, None]
        y = y.index_add(0, tokens, part)
    return (y,)


def by_expert(adapters: dict[str, Tensor], name: str, experts: int) -> tuple[Tensor, Tensor]:
    """Views (experts, rank, in) and (experts, out, rank): PEFT has A expert by expert, B rank by rank."""
    a, b = adapters[f"{name}_a"], adapters[f"{name}_b"]
    return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)


def _fastpeft(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, **adapters: Tensor
) -> Sequence[Tensor]:
    from fastpeft_kernels.experts import ExpertAdapter, ExpertProjection, Experts, Gating, lora_experts
    from fastpeft_kernels.weights import DenseWeight

    def projection(stack: Tensor, name: str) -> ExpertProjection:
        adapter = ExpertAdapter(*by_expert(adapters, name, len(stack)), SCALING)
        return ExpertProjection(DenseWeight(stack.flatten(0, 1)), len(stack), adapters=(adapter,))

    experts = Experts(projection(gate_up, "gate_up"), projection(down, "down"), Gating("silu"))
    return (lora_experts(x, index, weights, experts),)


def _peft(inputs: Inputs) -> Forward:
    """`target_parameters` over transformers' module, which multiplies by groups on a GPU in bf16, else in its loop."""
    t = inputs.tensors
    experts, hidden, inner = t["down"].shape
    configuration = package("transformers").Qwen3MoeConfig(
        num_experts=experts, hidden_size=hidden, moe_intermediate_size=inner, hidden_act="silu"
    )
    grouped = t["x"].is_cuda and t["x"].dtype == torch.bfloat16
    configuration._experts_implementation = "grouped_mm" if grouped else "eager"
    with torch.device("meta"):
        module = package("transformers.models.qwen3_moe.modeling_qwen3_moe").Qwen3MoeExperts(configuration)
    module.gate_up_proj, module.down_proj = (nn.Parameter(t[name], requires_grad=False) for name in ("gate_up", "down"))
    rank = t["down_a"].shape[0] // experts
    targets = ["layer.gate_up_proj", "layer.down_proj"]
    layer = peft_layer(module, "LoraConfig", r=rank, lora_alpha=int(SCALING * rank), target_parameters=targets)
    wrapper = layer
    for _ in targets:
        name = wrapper.parameter_name.removesuffix("_proj")
        wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight = t[f"{name}_a"], t[f"{name}_b"]
        wrapper = wrapper.base_layer
    return lambda: (layer(t["x"], t["index"], t["weights"]),)
