"""Checks of the arguments of losses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..common.tracing import as_op
from ..common.validation import FLOATING, check_device, check_floating, check_instance, check_tensor
from ..weights import FrozenWeight
from .head import Head, Options

REDUCTIONS = ("mean", "sum", "none")


def check_hidden(hidden: Any) -> None:
    """Raise TypeError or ValueError unless it is (..., hidden_size) in a dtype that the ops compute in."""
    check_floating("hidden", hidden)
    if hidden.dtype not in FLOATING:
        raise TypeError(f"hidden: expected one of {[str(d) for d in FLOATING]}, got {hidden.dtype}")
    if hidden.dim() < 1:
        raise ValueError(f"hidden: expected shape (..., hidden_size), got {tuple(hidden.shape)}")


def check_head(head: Any, hidden: Tensor, name: str = "head", like: str = "hidden") -> None:
    """Raise TypeError or ValueError unless it maps `hidden` as `Head` says; name, like: what these are called."""
    check_instance(name, head, Head)
    weight, device = head.weight, hidden.device
    check_instance(f"{name}.weight", weight, FrozenWeight, Tensor)
    if isinstance(weight, Tensor):
        check_floating(f"{name}.weight", weight)
    check_device(f"{name}.weight", weight.device, device, like)
    if len(weight.shape) != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        raise ValueError(
            f"{name}.weight: expected shape (words, {hidden.shape[-1]}) with words >= 1, got {tuple(weight.shape)}"
        )
    words = weight.shape[0]
    if head.bias is not None:
        check_tensor(f"{name}.bias", head.bias, device, (words,), like)
    if (head.s is None) != (head.b is None):
        raise ValueError(f"{name}.s, {name}.b: expected both or neither, got one")
    if head.s is not None and head.b is not None:
        check_instance(f"{name}.s", head.s, Tensor)
        check_tensor(f"{name}.s", head.s, device, (*hidden.shape[:-1], *head.s.shape[-1:]), like)
        check_tensor(f"{name}.b", head.b, device, (words, *head.s.shape[-1:]), like)
    check_number(f"{name}.scale", head.scale)
    if head.softcap is not None:
        check_number(f"{name}.softcap", head.softcap)
        if not head.softcap > 0:
            raise ValueError(f"{name}.softcap: expected a number > 0 or None, got {head.softcap}")


def check_labels(labels: Any, hidden: Tensor, words: int, ignore_index: Any, *, in_range: bool = True) -> None:
    """Raise TypeError or ValueError unless they are int64, one for each token and, `in_range`, as for `check_range`."""
    check_instance("labels", labels, Tensor)
    check_instance("ignore_index", ignore_index, int)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected torch.int64, got {labels.dtype}")
    check_device("labels", labels.device, hidden.device, "hidden")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}")
    if in_range:
        check_range(labels, words, ignore_index)


def check_range(labels: Tensor, words: int, ignore_index: int) -> None:
    """Raise ValueError unless each is a word or ignored, on a CPU; elsewhere asking would have the host wait."""
    if labels.device.type != "cpu" or as_op():
        return
    outside = ((labels < 0) | (labels >= words)) & (labels != ignore_index)
    if bool(outside.any()):
        got = int(labels[outside][0])
        raise ValueError(f"labels: expected ignore_index ({ignore_index}) or 0 <= label < {words}, got {got}")


def check_options(options: Options) -> None:
    """Raise TypeError or ValueError unless label_smoothing and z_loss are in their ranges."""
    check_number("label_smoothing", options.label_smoothing)
    check_number("z_loss", options.z_loss)
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 <= label_smoothing <= 1, got {options.label_smoothing}")
    if not options.z_loss >= 0:
        raise ValueError(f"z_loss: expected a number >= 0, got {options.z_loss}")


def check_weights(class_weight: Any, token_weight: Any, labels: Tensor, words: int) -> None:
    """Raise TypeError or ValueError unless each is None or as `linear_cross_entropy` says."""
    if class_weight is not None:
        check_tensor("class_weight", class_weight, labels.device, (words,), "labels")
        if class_weight.requires_grad:
            raise ValueError("class_weight: expected a tensor without gradient, got one that requires it")
    if token_weight is not None:
        check_tensor("token_weight", token_weight, labels.device, tuple(labels.shape), "labels")


def check_reduction(reduction: Any, num_items: Any) -> None:
    """Raise TypeError or ValueError unless they are as `linear_cross_entropy` says."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    if num_items is None:
        return
    check_instance("num_items", num_items, int, float, Tensor)
    if reduction != "mean":
        raise ValueError(f'num_items: expected None with reduction "{reduction}", got {num_items}')
    if isinstance(num_items, Tensor) and num_items.dim() != 0:
        raise ValueError(f"num_items: expected a number or a 0-d tensor, got shape {tuple(num_items.shape)}")


def check_temperature(temperature: Any) -> None:
    """Raise TypeError or ValueError unless it is a finite number > 0."""
    check_number("temperature", temperature)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")


def check_beta(beta: Any) -> None:
    """Raise TypeError or ValueError unless it is a number in [0, 1]."""
    check_number("beta", beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected 0 <= beta <= 1, got {beta}")


def check_mask(mask: Any, like: Tensor) -> None:
    """Raise TypeError or ValueError unless it is bool, of the shape of `like` but for its last size."""
    check_instance("mask", mask, Tensor)
    shape = tuple(like.shape[:-1])
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"mask: expected bool of shape {shape}, got {mask.dtype} of shape {tuple(mask.shape)}")
    check_device("mask", mask.device, like.device)


def check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
