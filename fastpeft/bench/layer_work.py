"""What the benchmark of a decoder layer computes: its seven projections, in three arrangements, without attention."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .steps import nf4_linear

Module = TypeVar("Module", bound=nn.Module)
SCALE = 2  # lora_alpha / r


@dataclass(frozen=True)
class Size:
    """One layer; by default that of Llama 3.1 8B, four rows of 2048 tokens."""

    hidden: int = 4096
    intermediate: int = 14336
    kv: int = 1024
    rows: int = 4
    tokens: int = 2048

    @property
    def all_tokens(self) -> int:
        return self.rows * self.tokens


class Attention(nn.Module):
    """The projections of attention, without it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.q_proj = nn.Linear(size.hidden, size.hidden, bias=False)
        self.k_proj = nn.Linear(size.hidden, size.kv, bias=False)
        self.v_proj = nn.Linear(size.hidden, size.kv, bias=False)
        self.o_proj = nn.Linear(size.hidden, size.hidden, bias=False)


class Layer(Attention):
    """Every projection of a Llama layer on an input of its own, as in the model: only q, k and v share one."""

    inputs = ("hidden", "hidden", "hidden")

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP

        self.mlp = LlamaMLP(LlamaConfig(hidden_size=size.hidden, intermediate_size=size.intermediate))

    def forward(self, x: Tensor, attended: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), self.o_proj(attended), self.mlp(hidden)


class Linears(Attention):
    """The same projections without the activation: what down reads is given."""

    inputs = ("hidden", "hidden", "hidden", "intermediate")

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.gate_proj = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.up_proj = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.down_proj = nn.Linear(size.intermediate, size.hidden, bias=False)

    def forward(self, x: Tensor, attended: Tensor, hidden: Tensor, inner: Tensor) -> tuple[Tensor, ...]:
        attention = self.q_proj(x), self.k_proj(x), self.v_proj(x), self.o_proj(attended)
        return *attention, self.gate_proj(hidden), self.up_proj(hidden), self.down_proj(inner)


class Linear(nn.Module):
    """One square projection."""

    inputs = ("hidden",)

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.o_proj = nn.Linear(size.hidden, size.hidden, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.o_proj(x),)


WORKS: dict[str, type[Layer] | type[Linears] | type[Linear]] = {"layer": Layer, "linears": Linears, "linear": Linear}
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Case:
    """One work in one setting. The base is in bf16.

    Attributes:
        work: of WORKS.
        base: "dense", or "nf4": bitsandbytes' with nested scales.
        autocast: fp32 adapters under bf16 autocast, as Trainer's bf16 has it; else bf16 adapters without autocast.
    """

    work: str
    base: str
    rank: int
    autocast: bool = True
    size: Size = field(default_factory=Size)

    @property
    def name(self) -> str:
        adapters = "fp32 adapters, autocast" if self.autocast else "bf16 adapters"
        return f"{self.work} {self.base} r={self.rank} {adapters}"


@dataclass
class Work:
    """A case ready to run.

    Attributes:
        peft: the model as PEFT makes it.
        frozen: the same without adapters, dense; its weights are also the base's where that is dense.
        inputs: bf16 (rows, tokens, features), requiring gradients.
        dys: gradient of each output, bf16.
    """

    case: Case
    device: str
    peft: Any
    frozen: nn.Module
    inputs: list[Tensor]
    dys: list[Tensor]

    @property
    def wanted(self) -> list[Tensor]:
        """What gradients are taken of: the inputs, then every adapter's a and b."""
        return [*self.inputs, *[p for p in self.peft.parameters() if p.requires_grad]]


def prepare(case: Case, device: str) -> Work:
    """Weights, inputs and gradients of outputs, random; adapters not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    size = case.size
    with torch.device(device):
        frozen: nn.Module = WORKS[case.work](size)
    frozen = frozen.to(torch.bfloat16).requires_grad_(False)
    model = sharing(frozen)
    projections = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if case.base == "nf4":
        for name, module in projections.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nf4_linear(module, torch.bfloat16))
        # as transformers marks it, so that PEFT takes its layer for 4 bits
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    targets = sorted(name.rpartition(".")[2] for name in projections)
    config = LoraConfig(
        r=case.rank, lora_alpha=SCALE * case.rank, target_modules=targets, lora_dropout=0.0, init_lora_weights=False
    )
    peft = get_peft_model(model, config).to(device).train()
    for parameter in peft.parameters():
        if parameter.requires_grad and not case.autocast:
            parameter.data = parameter.data.to(torch.bfloat16)
    inputs = [_random(size, getattr(size, name), device).requires_grad_() for name in WORKS[case.work].inputs]
    with torch.no_grad():
        dys = [_random(size, y.shape[-1], device) for y in frozen(*[x[:1, :1] for x in inputs])]
    return Work(case, device, peft, frozen, inputs, dys)


def sharing(model: Module) -> Module:
    """A copy with the same parameters and buffers, not copies of them."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _random(size: Size, features: int, device: str) -> Tensor:
    return torch.randn((size.rows, size.tokens, features), device=device, dtype=torch.bfloat16)
