"""A model as a training would have it, accelerated, but without values: on the meta device, from a configuration."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastpeft.config import LoraSection
from fastpeft.errors import UserError
from fastpeft.models.adapters import attach_adapter
from fastpeft.models.tasks import auto_class, head_options

from ..layers import model_layers
from ..policy import LayerPolicy, MemoryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

TRIED = 1 << 16
"""Elements of parameters that are given values while proofs try them: norms, and tables of relative positions."""
BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256


@dataclass(frozen=True)
class Skeleton:
    """A model without values.

    Attributes:
        model: accelerated, in training mode where it has an adapter, with at least the first layers of each stack.
        order: for each layer of the whole model, in the order of its modules, the traced layer that is like it.
        layers: paths of the traced layers.
    """

    model: Any
    order: tuple[int, ...]
    layers: tuple[str, ...]
    task: str


def build(
    config: Any,
    task: str,
    dtype: torch.dtype,
    packed: bool,
    section: LoraSection | None,
    whole: bool = False,
    full: bool = False,
) -> Skeleton:
    """The skeleton of a configuration.

    Args:
        config: transformers' own.
        task: one of `tasks.AUTO`.
        dtype: of the frozen weights that are not packed.
        packed: whether linear layers are stored as nested NF4, but for the head, as transformers does.
        section: the adapter; None for a model that is asked alone.
        whole: trace every layer, not only the first ones.
        full: train all weights, without an adapter.

    Raises:
        UserError: no model can be made of the configuration, or the adapter does not fit it.
    """
    config = copy.deepcopy(config)
    for name, value in head_options(task, None, None).items():
        setattr(config, name, value)
    for name in [name for name in vars(config) if name.endswith("layerdrop")]:
        setattr(config, name, 0.0)  # no layer is left out by chance
    try:
        with torch.device("meta"):
            model = auto_class(task).from_config(config, dtype=dtype)
    except (RuntimeError, ArithmeticError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise UserError(f"MODEL: no model can be made as its config.json says: {error}") from error
    except ValueError as error:
        kind, auto, why = type(config).__name__, auto_class(task).__name__, str(error).partition(". ")[0]
        raise UserError(f"MODEL: {auto} makes none of {kind}, and plans are for models of text: {why}") from error
    model.config.use_cache = False
    order = _keep_first_layers(model, whole)
    whole_model: Any
    if packed:
        _pack(model, dtype)
    if full:
        whole_model = model.requires_grad_(True).train()
    elif section is None:
        whole_model = model.requires_grad_(False).eval()
    else:
        with torch.device("meta"):
            whole_model = attach_adapter(model, section, task, seed=0).train()
    return Skeleton(accelerated(whole_model), order, tuple(model_layers(whole_model)), task)


def accelerated(model: Any) -> Any:
    """The model accelerated: what proofs try out has values meanwhile."""
    import fastpeft

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.numel() <= TRIED and type(parameter) is nn.Parameter:
                values = torch.linspace(0.5, 1.5, parameter.numel()).to(parameter.dtype).view(parameter.shape)
                module._parameters[name] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    fastpeft.accelerate(model)
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if isinstance(tensor, Tensor) and not tensor.is_meta:
                    moved = tensor.to("meta")
                    table[name] = (
                        nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
                    )
    return model


def follow(model: Any, policies: tuple[LayerPolicy, ...]) -> None:
    """Have each layer of a skeleton do as `accelerate(memory=MemoryPolicy(policies))` would."""
    from fastpeft.layers.mlp import FastMlp
    from fastpeft.replacements.memory import MemoryReplacement
    from fastpeft.replacements.mlp import MlpReplacement

    mlps: dict[str, nn.Module] = {p: each for p, each in model.named_modules() if isinstance(each, FastMlp)}
    MlpReplacement().finish(model, mlps, True)
    MemoryReplacement().finish(model, {}, MemoryPolicy(policies))


def _keep_first_layers(model: Any, whole: bool) -> tuple[int, ...]:
    """Shorten each stack of layers; for each layer that was there, the one that stands for it among those left."""
    stacks: dict[str, list[nn.Module]] = {}
    chosen = getattr(model.config, "vision_feature_layer", None) is not None  # results of layers are told by number
    for path, layer in model_layers(model).items():
        stacks.setdefault(path.rpartition(".")[0], []).append(layer)
    order: list[int] = []
    before = 0
    for path, layers in stacks.items():
        kinds = [_kind(layer) for layer in layers]
        every = whole or (chosen and "vision" in path) or not isinstance(model.get_submodule(path), nn.ModuleList)
        count = len(layers) if every else _enough(kinds)
        if count < len(layers):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.ModuleList(layers[:count]))
        order += [before + place for place in _places(kinds, count)]
        before += count
    return tuple(order)


def _places(kinds: Sequence[Any], count: int) -> list[int]:
    """Of `count` first layers the one that stands for each: the last for the last, the one before for those between."""
    last = {kind: index for index, kind in enumerate(kinds[:count])}
    between = last | {kind: index for index, kind in enumerate(kinds[: count - 1])}
    found = [index if index < count - 1 else between[kind] for index, kind in enumerate(kinds)]
    return [*found[:-1], last[kinds[-1]]]


def _enough(kinds: Sequence[Any]) -> int:
    """How many first layers hold every kind, and twice each that occurs twice: a first one may do more than others.

    Five at least: of inputs that leave for the host two are on their way, the first is the embedding's result, which
    the model's own code holds, and the last is still there when backward begins.
    """
    ends = []
    for kind in set(kinds):
        places = [index for index, each in enumerate(kinds) if each == kind]
        ends.append(places[:2][-1])
    return min(len(kinds), max(5, 1 + max(ends)))


def _kind(layer: nn.Module) -> Any:
    return type(layer), tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())


def _pack(model: Any, dtype: torch.dtype) -> None:
    """Linear4bit in place of every linear layer, but of those that transformers leaves."""
    from fastpeft.errors import UserError

    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise UserError("method: qlora needs bitsandbytes: pip install bitsandbytes") from error
    kept = _kept_dense(model)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not any(name == path or path.endswith(f".{name}") for name in kept):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _packed(Linear4bit, module, dtype))
    model.is_loaded_in_4bit = True


def _kept_dense(model: Any) -> list[str]:
    """Names of what transformers does not quantise: the head, and what a family keeps in fp32."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = [path for path, module in model.named_modules() if module is head]
    return [*heads, *(getattr(model, "_keep_in_fp32_modules", None) or ()), "lm_head", "classifier", "score"]


def _packed(kind: Callable[..., Any], module: nn.Linear, dtype: torch.dtype) -> Any:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    blocks = -(-module.weight.numel() // BLOCKSIZE)
    with torch.device("meta"):
        new = kind(module.in_features, module.out_features, module.bias is not None, dtype, quant_type="nf4")
        nested = QuantState(
            torch.empty(-(-blocks // NESTED_BLOCKSIZE)), code=torch.empty(256), blocksize=256, dtype=torch.float32
        )
        state = QuantState(
            torch.empty(blocks, dtype=torch.uint8), module.weight.shape, torch.empty(16), BLOCKSIZE, "nf4", dtype,
            torch.empty(()), nested,
        )  # fmt: skip
        values = torch.empty((-(-module.weight.numel() // 2), 1), dtype=torch.uint8)
        new.weight = Params4bit(values, quant_state=state, quant_type="nf4", bnb_quantized=True, module=new)
    new.bias = module.bias
    new.quant_state = state
    return new


def stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(kind, tensor) of all that the modules themselves hold: "packed", "dense", "trained" or "buffer"."""
    for each in module.modules():
        for parameter in each._parameters.values():
            if parameter is None:
                continue
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
                yield from (("packed", tensor) for tensor in (parameter, state.absmax, state.code, *nested))
            else:
                yield "trained" if parameter.requires_grad else "dense", parameter
        yield from (("buffer", buffer) for buffer in each._buffers.values() if buffer is not None)
