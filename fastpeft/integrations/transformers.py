"""What fastpeft knows of transformers' models: nothing about architectures, a little about calls."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' own Conv1D, GPT-2's linear layer, whose weight is (in_features, out_features)."""
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and type(module) is home.Conv1D


def is_own_linear(module: nn.Module) -> bool:
    """True for Falcon's nn.Linear, which adds its bias after the product: no more than another rounding."""
    home = sys.modules.get("transformers.models.falcon.modeling_falcon")
    return home is not None and type(module) is home.FalconLinear


CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "mems", "cache")


def passes_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True when a call hands the module a key-value cache, which a second run of the same call would fill twice."""
    if any(kwargs.get(name) is not None for name in CACHE_NAMES):
        return True
    return any(is_cache(value) for value in (*args, *kwargs.values()))


def is_cache(value: Any) -> bool:
    """Whether it is one of transformers' key-value caches, or behaves as one."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


@cache
def _outputs_collected() -> Callable[[], Mapping[str, Any] | None]:
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # another transformers
        return lambda: None
    get: Callable[[], Mapping[str, Any] | None] = _active_collector.get
    return get


_COLLECTED = "fastpeft_weights"
"""Attribute of an attention module whose last forward in training was asked for weights."""


def collects_weights(module: Any) -> bool:
    """Whether a model that runs keeps weights of attention for its outputs, which GPT-2 does not tell its layers.

    In backward, where layers are computed again, whether the module's last forward in training was asked for them. Not
    told under torch.compile, which cannot trace it.
    """
    if torch.compiler.is_compiling():
        return False
    noted: dict[str, Any] = getattr(module, "__dict__", {})
    if torch._C._current_graph_task_id() != -1:
        return _COLLECTED in noted
    collected = _outputs_collected()()
    found = collected is not None and any([name.endswith("attentions") for name in collected])
    if noted.get("training"):  # an evaluation may come between forward and backward
        if found:
            noted[_COLLECTED] = True
        else:
            noted.pop(_COLLECTED, None)
    return found


def forget_weights(module: nn.Module) -> None:
    """Take away what `collects_weights` noted."""
    module.__dict__.pop(_COLLECTED, None)


EXPERTS_ALIKE = ("eager", "batched_mm", "grouped_mm")
"""Implementations of experts that compute the same, whatever the module."""


def experts_implementation(experts: Any) -> str | None:
    """Which code a module of experts runs at present, one name for those that compute the same; None without any."""
    name: str | None = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    return EXPERTS_ALIKE[0] if name in EXPERTS_ALIKE else name


def multiplies_experts_as_stored(experts: Any) -> bool:
    """True where the experts' products are in the dtype of their weights under autocast too: autocast has no rule for
    torch's grouped product, which transformers takes then."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None) == "grouped_mm"


def multiply_experts_one_by_one(experts: Any) -> None:
    """Have a module of experts, with a configuration of its own, run its own loop, which takes any dtype."""
    config: Any = getattr(experts, "config", None)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"


ATTENTION = "fastpeft"
"""The name of our implementation; transformers takes every name with "flash" in it for FlashAttention's."""


def attention_implementation(module: Any) -> str | None:
    """Which code a model or an attention module runs at present; None where its configuration says nothing."""
    name: str | None = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return name


def set_attention_implementation(module: Any, name: str) -> None:
    """Have a model or an attention module, and all that share its configuration, run other code.

    Parts with a configuration of their own go on as before.
    """
    module.config._attn_implementation_internal = name


def is_model_class(kind: type[Any]) -> bool:
    """Whether a class is one of transformers' models."""
    home = sys.modules.get("transformers.modeling_utils")
    return home is not None and issubclass(kind, home.PreTrainedModel)


@cache
def takes_labels(kind: type[Any]) -> bool:
    """Whether models of a class compute a loss when they are given labels."""
    return "labels" in inspect.signature(kind.forward).parameters


def output_head(model: Any) -> nn.Module | None:
    """The module that makes a model's logits over words; None without one."""
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None


def has_its_own_attention(model: Any) -> bool:
    """Whether a model's code computes attention itself, without asking which implementation is wanted."""
    return model.base_model is model and not model._can_set_attn_implementation()


@cache
def asks_for_attention(kind: type[Any]) -> bool:
    """Whether modules of a class call the attention function that is registered under their configuration's name."""
    code = _code_of_forward(kind)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


@cache
def masks_by_name(kind: type[Any]) -> bool:
    """Whether attention in the file of a class does for "eager" and "sdpa" what it does for no other name.

    So does sparse attention, which makes a mask of the keys it has chosen, and else hands on their indices.
    """
    home = vars(sys.modules[kind.__module__]).values()
    return any(_names_both(each) for each in (kind, *home) if isinstance(each, type) and issubclass(each, nn.Module))


def _names_both(kind: type[nn.Module]) -> bool:
    code = _code_of_forward(kind)
    if code is None or not {"ALL_ATTENTION_FUNCTIONS", "_attn_implementation"} <= set(code.co_names):
        return False
    return {"eager", "sdpa"} <= _constants(code)


@cache
def makes_masks_of_masks(kind: type[Any]) -> bool:
    """Whether attention of a class makes a mask of the model's, which is to have all queries x keys for that.

    So does attention that weighs or chooses keys as it goes (Doge's, Qwen4's): it keeps a mask of its own, which a
    method of its class makes, or a model of its file forbids that the whole mask be left out.
    """
    code = _code_of_forward(kind)
    if code is None:
        return False
    own = code.co_varnames[code.co_argcount + code.co_kwonlyargcount :]
    if not any("mask" in name for name in own):
        return False
    if any("mask" in name for name in vars(kind)):
        return True
    home = vars(sys.modules[kind.__module__]).values()
    codes = (_code_of_forward(each) for each in home if isinstance(each, type) and issubclass(each, nn.Module))
    return any("allow_is_causal_skip" in _constants(each) for each in codes if each is not None)


def _code_of_forward(kind: type[Any]) -> CodeType | None:
    code: CodeType | None = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code


def _constants(code: CodeType) -> set[Any]:
    """Of a function, those within tuples too: names of arguments, keys of dicts."""
    found: set[Any] = set()
    for constant in code.co_consts:
        found |= set(constant) if isinstance(constant, (tuple, frozenset)) else {constant}
    return found


@cache
def attention_is_an_argument(kind: type[Any]) -> bool:
    """Whether models of the file that an attention class is from may run another function than `eager`.

    Then all that it needs is handed to that function.
    """
    home = sys.modules[kind.__module__]
    models = [each for each in vars(home).values() if isinstance(each, type) and is_model_class(each)]
    flags = ("_supports_sdpa", "_supports_flash_attn")
    return any(getattr(each, flag, False) for each in models if each.__module__ == home.__name__ for flag in flags)


def sample_batch(model: Any, seed: int = 0, rows: int = 2, tokens: int = 32) -> dict[str, Any]:
    """A small random batch that the model's forward accepts, padded in one row, with labels where it takes any.

    Args:
        model: a transformers model or a PEFT model around one.
        seed: of the random tokens.
        rows, tokens: size of the batch; tokens is cut to what the model's positions allow.

    Raises:
        ValueError: the model takes no token ids (pictures, sound), or has no configuration: pass a batch instead.
    """
    import torch
    from transformers.utils import find_labels

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    if config is None or getattr(base, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(
            f"batch: {type(base).__name__} does not take input_ids alone; pass a batch as a dict of tensors"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None) or 0
    tokens = min(tokens, positions) if positions > 0 else tokens  # XLNet's -1: as many as come
    generator = torch.Generator().manual_seed(seed)
    device = next(base.parameters()).device
    ids = torch.randint(0, text.vocab_size, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, tokens - tokens // 4 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    labels = _sample_labels(find_labels(type(base)), base, config, ids, generator)
    if not labels and getattr(config, "is_encoder_decoder", False):
        labels = {"decoder_input_ids": ids[:, : tokens // 2]}
    return {name: value.to(device) for name, value in (batch | labels).items()}


def _sample_labels(names: list[str], base: Any, config: Any, ids: Any, generator: Any) -> dict[str, Any]:
    import torch

    kind = type(base).__name__
    rows, tokens = ids.shape
    if {"start_positions", "end_positions"} <= set(names):
        return {
            name: torch.randint(0, tokens, (rows,), generator=generator)
            for name in ("start_positions", "end_positions")
        }
    if "labels" not in names:
        return {}
    if "SequenceClassification" in kind:
        if config.problem_type == "multi_label_classification":
            return {"labels": torch.rand(rows, config.num_labels, generator=generator)}
        if config.num_labels == 1:
            return {"labels": torch.rand(rows, generator=generator)}
        return {"labels": torch.randint(0, config.num_labels, (rows,), generator=generator)}
    if "TokenClassification" in kind:
        return {"labels": torch.randint(0, config.num_labels, (rows, tokens), generator=generator)}
    return {"labels": ids.clone()}
