"""One model for each class of PEFT's LoRA layers: two adapters, of which one is active."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
from transformers.pytorch_utils import Conv1D

from tests.integration import bases
from tests.integration.bases import BASES
from tests.integration.models import trained
from tests.integration.quantised import _packed

IN, OUT = 24, 20


class Net(nn.Module):
    """One layer, its output as it is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        y = self.layer(x, **kwargs)
        return y if isinstance(y, Tensor) else y[0]


class Attended(Net):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.layer(x, x, x, **kwargs)[0]  # type: ignore[no-any-return]


class Routed(Net):
    """Tokens go to experts by turns."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        tokens = x.shape[0]
        index = torch.stack([torch.arange(tokens) % 3, (torch.arange(tokens) + 1) % 3], dim=1)
        weights = torch.tensor([[0.7, 0.3]], dtype=x.dtype).expand(tokens, 2)
        return self.layer(x, index, weights, **kwargs)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Kind:
    """How to build the net, its input, and whether the layer becomes one of ours."""

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    served: bool
    config: dict[str, Any]


def _kind(make: Callable[[], nn.Module], *shape: int, served: bool = True, **config: Any) -> Kind:
    return Kind(make, lambda: torch.randn(*shape), served, config or {"target_modules": ["layer"]})


def _experts() -> nn.Module:
    sizes = {"hidden_size": IN, "intermediate_size": OUT, "num_local_experts": 3, "num_experts_per_tok": 2}
    experts = MixtralExperts(MixtralConfig(**sizes))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=IN**-0.5)
    return experts


KINDS: dict[str, Kind] = {
    "Linear": _kind(lambda: Net(nn.Linear(IN, OUT)), 3, 8, IN),
    "Conv1D of transformers": _kind(lambda: Net(Conv1D(OUT, IN)), 3, 8, IN),
    "Embedding": Kind(
        lambda: Net(nn.Embedding(30, OUT)), lambda: torch.randint(30, (3, 8)), True, {"target_modules": ["layer"]}
    ),
    "Conv1d": _kind(lambda: Net(nn.Conv1d(IN, OUT, 3)), 3, IN, 8, served=False),
    "Conv2d": _kind(lambda: Net(nn.Conv2d(4, 6, 3)), 3, 4, 5, 6, served=False),
    "Conv3d": _kind(lambda: Net(nn.Conv3d(4, 6, 2)), 3, 4, 3, 4, 5, served=False),
    "MultiheadAttention": _kind(
        lambda: Attended(nn.MultiheadAttention(IN, 2, batch_first=True)), 3, 8, IN, served=False
    ),
    "ParamWrapper": _kind(lambda: Routed(_experts()), 64, IN, target_modules=[], target_parameters=["layer.down_proj"]),
    "Linear4bit": _kind(lambda: Net(_packed(nn.Linear(64, OUT), "nf4", True, None)), 3, 8, 64),
    "Linear8bitLt": _kind(lambda: Net(BASES["LLM.int8"](nn.Linear(IN, OUT))), 3, 8, IN),
    "TorchaoLoraLinear": _kind(lambda: Net(BASES["torchao int8"](nn.Linear(IN, OUT))), 3, 8, IN),
}
"""By the name of PEFT's class."""


def make(kind: str, **config: Any) -> nn.Module:
    """In training mode; both adapters have random values."""
    model = KINDS[kind].make()
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "Linear4bit", kind == "Linear8bitLt"  # type: ignore[assignment]
    chosen = {"r": 4, "lora_alpha": 6, **KINDS[kind].config, **config}
    made = get_peft_model(model, LoraConfig(**chosen))
    made.add_adapter("other", LoraConfig(**chosen | {"r": 2}))
    return trained(made).train()  # type: ignore[no-any-return]


def layer(model: Any) -> Any:
    """The one of PEFT's or ours."""
    return model.base_model.model.layer


def wide(model: nn.Module) -> nn.Module:
    """A copy in fp64; in the place of a quantised layer the values that its library decodes."""
    copied: Any = copy.deepcopy(model)
    base = layer(copied).base_layer
    values = bases.values(base)
    if values is not None and layer(copied).disable_adapters and layer(copied).merged:
        layer(copied).unmerge()  # as forward would, which quantises anew
        values = bases.values(base)
    if values is not None:
        dense = nn.Linear(values.shape[1], values.shape[0])
        dense.weight = nn.Parameter(values.float(), requires_grad=False)
        dense.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
        layer(copied).base_layer = dense
    return copied.double()  # type: ignore[no-any-return]
