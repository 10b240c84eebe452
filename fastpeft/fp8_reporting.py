"""What products in FP8 cost in accuracy, layer by layer, on a batch of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .integrations.models import model_within
from .integrations.transformers import sample_batch
from .layers.fp8 import BOTH, FORWARD, NEVER, asked, why_not_fp8
from .layers.lora import FastLoraLayer
from .layers.requests import compute
from .memory.streaming.layer import check_resident
from .verification import recorded_step
from .verification_states import calm

OUTPUT, GRADIENT = "output", "gradient of x"


@dataclass(frozen=True)
class Fp8Row:
    """One tensor of a layer, in FP8 against 16 bits (fp32 where the model is in fp32).

    Attributes:
        path: the layer's name in the model.
        what: "output" or "gradient of x".
        largest: largest difference, relative to the largest magnitude.
        norm: norm of the difference, relative to the norm.
        cosine: of the angle between the two.
    """

    path: str
    what: str
    largest: float
    norm: float
    cosine: float


@dataclass(frozen=True)
class Fp8Report:
    """All rows; prints as a table, the largest error first.

    Attributes:
        rows: of the layers that can compute in FP8.
        left: why the others cannot, by their names.
        limit: of `Fp8Row.norm`, or None.
    """

    rows: tuple[Fp8Row, ...]
    left: dict[str, str]
    limit: float | None

    @property
    def above(self) -> tuple[str, ...]:
        """Names of the layers above the limit, as `accelerate(fp8_exclude=...)` takes them."""
        if self.limit is None:
            return ()
        return tuple(dict.fromkeys(row.path for row in self.rows if not row.norm <= self.limit))  # NaN is above

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        rows = [asdict(row) for row in self.rows]
        return {"rows": rows, "left": self.left, "limit": self.limit, "above": list(self.above)}

    def __str__(self) -> str:
        ordered = sorted(self.rows, key=lambda row: (row.norm == row.norm, -row.norm))
        lines = [f"{'norm':>9}{'largest':>9}{'cosine':>10}  layer"] if ordered else []
        lines += [f"{r.norm:9.4f}{r.largest:9.4f}{r.cosine:10.6f}  {r.path}, {r.what}" for r in ordered]
        if self.limit is not None:
            lines.append(f"{len(self.above)} layers above the limit of {self.limit}")
            lines += [f"above: {path}" for path in self.above]
        return "\n".join([*lines, *(f"left in 16 bits: {path}: {reason}" for path, reason in self.left.items())])


def fp8_report(
    model: nn.Module,
    batch: Mapping[str, Any] | None = None,
    *,
    fp8_compute: str = BOTH,
    limit: float | None = None,
    seed: int = 0,
) -> Fp8Report:
    """How far each adapted layer is off when its frozen products are made in FP8, on a real step's tensors.

    Each layer gets the input and the output's gradient of one step of the model as it is, and is computed with its
    products in FP8 and with none. On devices without such products they are emulated (rows rounded to e4m3, multiplied
    in fp32), so that the report can be had before the GPU. In evaluation mode; zero `lora_B` get random values
    meanwhile. The model is afterwards as it was.

    Args:
        model: a model that `fastpeft.accelerate` was called on, with `fp8_compute` or without.
        batch: keyword arguments of the model's forward; a small random one by default.
        fp8_compute: "forward" or "both", as for `accelerate`.
        limit: of the norm of the error over the norm; layers above it are named by `.above`.
        seed: of the random batch.

    Returns:
        A `Fp8Report`: `.rows`, `.above`, and a table when printed.

    Raises:
        TypeError: `model` is not an nn.Module, `batch` not a mapping or `limit` not a number.
        ValueError: the model holds no accelerated layer, `fp8_compute` is none of these, or no batch can be made up for
            all of them at once.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_resident(model)
    if fp8_compute not in (FORWARD, BOTH):
        raise ValueError(f"fp8_compute: expected {FORWARD!r} or {BOTH!r}, got {fp8_compute!r}")
    if batch is not None and not isinstance(batch, Mapping):
        raise TypeError(f"batch: expected a mapping of the forward's arguments, got {type(batch).__name__}")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float))):
        raise TypeError(f"limit: expected a number or None, got {limit!r}")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, FastLoraLayer)}
    if not layers:
        raise ValueError("model: no accelerated layer in it; call fastpeft.accelerate(model) first")
    if batch is None:
        model = model_within(model, (FastLoraLayer,), "accelerated layers", "pass a batch")
    inputs = dict(sample_batch(model, seed) if batch is None else batch)
    rows: list[Fp8Row] = []
    left: dict[str, str] = {}
    with calm(model, seed):
        _, traffic = recorded_step(model, layers, inputs, record=True)
        for path, layer in layers.items():
            reason = why_not_fp8(layer.get_submodule("base_layer"))
            if reason is None and len(traffic.get(path, ())) != 2:
                reason = "no gradient of its output in this step"
            if reason is not None:
                left[path] = reason
                continue
            x, dy = traffic.pop(path)
            ours, exact = (_outputs(layer, setting, x, dy) for setting in (fp8_compute, NEVER))
            if isinstance(ours, str) or isinstance(exact, str):
                left[path] = ours if isinstance(ours, str) else str(exact)
                continue
            rows += _rows(path, ours, exact)
    return Fp8Report(tuple(rows), left, limit)


def _outputs(layer: FastLoraLayer, setting: str, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor] | str:
    """(output, gradient of x) of one layer by itself, or why the op does not serve it."""
    with asked(layer.get_submodule("base_layer"), setting), torch.enable_grad():
        x = x.detach().requires_grad_()
        request = layer.request(x)
        if isinstance(request, str):
            return request
        (y,) = compute(x, [request])
        (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


def _rows(path: str, ours: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> Iterator[Fp8Row]:
    for what, got, wanted in zip((OUTPUT, GRADIENT), ours, exact, strict=True):
        a, b = got.float().flatten(), wanted.float().flatten()
        difference, least = a - b, torch.finfo(torch.float32).tiny
        largest = difference.abs().max() / b.abs().max().clamp(min=least)
        norm = difference.norm() / b.norm().clamp(min=least)
        cosine = torch.dot(a, b) / (a.norm() * b.norm()).clamp(min=least)
        yield Fp8Row(path, what, largest.item(), norm.item(), cosine.item())
