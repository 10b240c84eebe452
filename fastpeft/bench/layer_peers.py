"""Who computes a decoder layer's projections in the benchmark: the frozen products alone, PEFT, others, fastpeft."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels.lora.keys import LINEAR, RANK
from fastpeft_kernels.mlp.fused import FUSED
from fastpeft_kernels.tuning.choosing import forced

from . import unsloth_functions
from .layer_work import SIBLINGS, Work, sharing
from .left_out import NotHereError

_OURS = {RANK: "triton", LINEAR: "triton"}
VARIANTS: dict[str, dict[str, str]] = {
    "fastpeft": {},  # as a user gets it
    "fastpeft, cuBLAS": {RANK: "library", LINEAR: "torch", FUSED: "apart"},
    "fastpeft, our products": {**_OURS, FUSED: "apart"},
    "fastpeft, our kernels": {**_OURS, FUSED: "fused"},
}
PRODUCTS, REFERENCE = "frozen products", "peft"


@dataclass(frozen=True)
class Peer:
    """One who does the work; a call is forward and backward.

    Attributes:
        function: from the work's inputs to its outputs.
        wanted: of what gradients are taken.
        choices: forced meanwhile, by op.
        checked: computes what PEFT does.
    """

    work: Work
    function: Callable[..., Sequence[Tensor]]
    wanted: Sequence[Tensor]
    choices: Mapping[str, str] = field(default_factory=dict)
    checked: bool = True

    def forward(self) -> tuple[Tensor, ...]:
        with torch.autocast(self.work.device, torch.bfloat16, enabled=self.work.case.autocast):
            return tuple(self.function(*self.work.inputs))

    def __call__(self) -> list[Tensor]:
        """Outputs, then gradients of `wanted`."""
        with forced(dict(self.choices)) if self.choices else nullcontext():
            outputs = self.forward()
            return [*outputs, *torch.autograd.grad(outputs, self.wanted, self.work.dys)]


Builder = Callable[[], "Peer | FrozenProducts"]


def builders(work: Work) -> dict[str, Builder]:
    """How to make each peer; one raises NotHereError where it cannot run, and anything else where it is broken."""
    accelerated = cache(partial(_accelerated, work))
    found: dict[str, Builder] = {PRODUCTS: partial(FrozenProducts, work)}
    if work.case.work == "layer" and work.case.base == "dense":
        found["frozen layer"] = lambda: Peer(work, work.frozen, work.inputs, checked=False)
    found[REFERENCE] = lambda: Peer(work, work.peft, work.wanted)
    if work.case.work == "layer":
        found["peft + liger"] = partial(_liger, work)
    if work.case.work != "linears":
        found["unsloth functions"] = partial(_unsloth, work)
    for name, choices in VARIANTS.items():
        found[name] = partial(_fastpeft, work, accelerated, choices)
    return found


class FrozenProducts:
    """The bare products of the dense base weights, forward and to the input, into memory that is there already."""

    checked = False

    def __init__(self, work: Work) -> None:
        weights = {name.split(".")[-2]: parameter for name, parameter in work.frozen.named_parameters()}
        tokens = work.case.size.all_tokens
        self.groups: list[tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]] = []
        for names in SIBLINGS:
            found = [weights[name].detach() for name in names if name in weights]
            if found:
                x = torch.randn((tokens, found[0].shape[1]), device=work.device, dtype=torch.bfloat16)
                products = [(weight, x.new_empty((tokens, weight.shape[0]))) for weight in found]
                self.groups.append((x, torch.empty_like(x), products))

    @torch.no_grad()
    def __call__(self) -> list[Tensor]:
        """dX of each group of siblings; the outputs serve as their own gradients."""
        for x, _, products in self.groups:
            for weight, y in products:
                torch.mm(x, weight.t(), out=y)
        for _, dx, products in self.groups:
            for i, (weight, y) in enumerate(products):
                if i == 0:
                    torch.mm(y, weight, out=dx)
                else:
                    dx.addmm_(y, weight)
        return [dx for _, dx, _ in self.groups]


def _liger(work: Work) -> Peer:
    """PEFT's projections around Liger's activation."""
    try:
        from liger_kernel.transformers.swiglu import LigerSwiGLUMLP
    except ImportError as error:
        raise NotHereError(str(error)) from error
    if work.device != "cuda":
        raise NotHereError("needs a GPU")
    model = sharing(work.peft)
    layer = model.get_base_model()
    with torch.device("meta"):
        mlp = LigerSwiGLUMLP(layer.mlp.config)
    for name, child in layer.mlp.named_children():
        if name in ("gate_proj", "up_proj", "down_proj"):
            setattr(mlp, name, child)
    layer.mlp = mlp
    return Peer(work, model, work.wanted)


def _unsloth(work: Work) -> Peer:
    """Its functions as it calls them, but for dX, which it would write over the inputs; here others read those too."""
    functions = unsloth_functions.load()
    return Peer(work, partial(unsloth_forward, functions, work.peft.get_base_model()), work.wanted)


def unsloth_forward(functions: Any, layer: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The outputs of a layer or of one linear by functions of the module `functions`."""
    if len(inputs) == 1:
        return (functions.apply_lora_o(layer, inputs[0]),)
    x, attended, hidden = inputs
    return (
        *functions.apply_lora_qkv(layer, x, inplace=False),
        functions.apply_lora_o(layer, attended),
        functions.apply_lora_mlp_swiglu(layer.mlp, hidden, inplace=False),
    )


def _accelerated(work: Work) -> Any:
    """The PEFT model accelerated, its siblings found; raises where any part is not served by our ops."""
    import fastpeft

    model = fastpeft.accelerate(sharing(work.peft))
    Peer(work, model, work.wanted).forward()
    report = fastpeft.report(model)
    whole = {row.path.rpartition(".")[2]: row for row in report.rows}
    if report.left or not report.rows or any(row.note for row in report.rows):
        raise AssertionError(f"not all is served:\n{report}")
    if "q_proj" in whole and whole["q_proj"].partners != "one of 3":
        raise AssertionError(f"q, k and v are not computed together:\n{report}")
    if work.case.work == "layer" and "mlp" not in whole:
        raise AssertionError(f"the MLP is not one op:\n{report}")
    return model


def _fastpeft(work: Work, accelerated: Callable[[], Any], choices: Mapping[str, str]) -> Peer:
    return Peer(work, accelerated(), work.wanted, choices)
