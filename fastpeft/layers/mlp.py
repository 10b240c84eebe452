"""MLPs of any model with a fused forward: the same module, its projections and activation computed as one op.

A module becomes one of these by a swap of `__class__`, once `mlp_structure` has proved on this instance what it
computes. Each forward reads the projections' state anew; what the op does not cover runs the module's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.lora import Dtypes
from fastpeft_kernels.mlp import Mlp
from fastpeft_kernels.mlp.api import draw_mlp_seeds, run_mlp, why_not_tiled

from ..integrations import peft
from .bypass import why_not_bypassed, why_not_called
from .counting import Counting
from .few_tokens import FEW_TOKENS, is_few
from .lora import FastLoraLayer
from .mixing import reduced, swap_out
from .mlp_structure import Roles
from .requests import Request, agrees, keep_made, leading_dtypes, made_before, plain_request

UNTILED = "not in tiles"
"""Begins the outcome of a call that the op served with all tokens at once, though tiles were asked for."""
DROPOUT = "a dropout that does not stand alone between activation and down projection, or drops all"
DORA = "DoRA, whose projections are computed one group at a time"


class FastMlp(nn.Module, Counting):
    """Mixed in before a model's own MLP class; overrides `forward`.

    What else it keeps is in instance attributes of these names; `leave` takes them away again.
    """

    fastpeft_roles: Roles | None = None
    fastpeft_bypassed: tuple[nn.Module, ...]  # of the proof
    fastpeft_keep: bool = True  # of gate and up for backward
    fastpeft_tile: int = 0  # tokens at a time, of `LayerPolicy.tile`
    fastpeft_suspended: bool = False

    def request(self, x: Tensor) -> tuple[Mlp, Dtypes] | str:
        """What to compute for x, or why the module's own forward must run."""
        roles = self.fastpeft_roles
        assert roles is not None
        if tuple(self._modules) != roles.children:
            return "other parts than when it was accelerated"
        for name, module in zip(roles.bypassed, self.fastpeft_bypassed, strict=True):
            if self._modules[name] is not module:
                return f"{name}: another one than when it was accelerated"
            reason = why_not_bypassed(module, type(module), x.device)
            if reason is not None:
                return f"{name}: {reason}"
        dropout = self._dropout()
        if isinstance(dropout, str):
            return dropout
        wanted: list[Request] = []
        for name in (*roles.inner, roles.down):
            if name == roles.down and wanted[0].dtypes.out != x.dtype:
                # stands for what comes out of the activation
                x = x.new_empty((x.shape[0], 0), dtype=wanted[0].dtypes.out)
            found = request_of(self._modules[name], x)
            if isinstance(found, str):
                return f"{name}: {found}"
            if found.projection.magnitude is not None:
                return f"{name}: {DORA}"
            wanted.append(found)
        made = made_before(wanted)
        if isinstance(made, tuple) and (made[0].activation, made[0].dropout) == (roles.activation, dropout):
            return made
        dtypes = common_dtypes(wanted)
        if isinstance(dtypes, str):
            return dtypes
        mixed = [request.row_names for request in wanted if request.row_names is not None]
        if mixed and any([r.row_names != mixed[0] for r in wanted if r.row_names is not None or r.projection.adapters]):
            return "a mixed batch with other names for some projections"
        index = peft.adapter_index(mixed[0]) if mixed else None
        *inner, down = (request.projection for request in wanted)
        made = Mlp(tuple(inner), down, roles.activation, adapter_index=index, dropout=dropout), dtypes
        keep_made(wanted, made, ())
        return made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        roles = self.fastpeft_roles
        if roles is None or self.fastpeft_suspended or len(args) != 1:
            return super().forward(*args, **kwargs)
        x = args[0]
        adapted = [child for child in self._modules.values() if isinstance(child, FastLoraLayer)]
        drops = self._dropout() != 0.0  # then a forward without gradients must draw as one with them
        if adapted and not drops and is_few(x) and all([child.leaves_few(x) for child in adapted]):
            self._count(FEW_TOKENS)
            return super().forward(*args, **kwargs)
        if _watched(adapted):
            return super().forward(*args, **kwargs)
        if not adapted:
            if roles.adapted:  # PEFT has taken its layers out again
                y = super().forward(*args, **kwargs)
                self.leave()
                return y
            if not (drops or torch.is_grad_enabled()):  # nothing is kept, so nothing is saved
                return super().forward(*args, **kwargs)
        reason = why_not_called(self, x, (), kwargs)
        if reason is None:
            request = self.request(x)
            if not isinstance(request, str):
                mlp, dtypes = request
                seeds = draw_mlp_seeds(x.device, mlp, training=True)
                tile = self.fastpeft_tile
                reason = why_not_tiled(mlp) if tile else None
                self._count("fused" if reason is None else f"{UNTILED}: {reason}")
                tile = 0 if reason else tile
                return run_mlp(x, mlp, dtypes, seeds, self.fastpeft_keep, tile)
            reason = request
        self._count(reason)
        return super().forward(*args, **kwargs)

    def _dropout(self) -> float | str:
        """The probability with which what the down projection reads is dropped, or why the module itself must drop."""
        roles, found = self.fastpeft_roles, 0.0
        assert roles is not None
        for name in roles.bypassed:
            module: Any = self._modules.get(name)
            if not (isinstance(module, nn.Dropout) and module.training and module.p > 0.0):
                continue
            if name not in roles.between or found or module.p >= 1.0:
                return f"{name}: {DROPOUT}"
            found = module.p
        return found

    def leave(self) -> None:
        """This instance as it was before."""
        for name in ("roles", "bypassed", "keep", "tile", "calls", "suspended"):
            self.__dict__.pop(f"fastpeft_{name}", None)
        swap_out(self, FastMlp)

    def _count(self, outcome: str) -> None:
        super()._count(outcome)
        if (outcome == "fused" or outcome.startswith(UNTILED)) and self.fastpeft_roles is not None:
            for name in (*self.fastpeft_roles.inner, self.fastpeft_roles.down):
                child = self._modules[name]
                if isinstance(child, FastLoraLayer):
                    child._count("fused")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, FastMlp)


def _watched(layers: list[FastLoraLayer]) -> bool:
    """Whether siblings are being looked for, for the calls that this op does not serve."""
    return any([layer.fastpeft_watch is not None and layer.fastpeft_watch.watching for layer in layers])


def request_of(module: Any, x: Tensor) -> Request | str:
    """What a projection asks of the op for x, with or without adapters, or why it must be called itself."""
    adapted = isinstance(module, FastLoraLayer)
    names = peft.hooked_row_names(module) if adapted and not torch.compiler.is_compiling() else None
    reason = why_not_bypassed(module, type(module), x.device, known_hooks=names is not None)
    if reason is not None:
        return reason
    return module.request(x, names) if adapted else plain_request(module, x)


def common_dtypes(requests: list[Request]) -> Dtypes | str:
    """The dtypes of all projections, or the reason why there are none; one without adapters takes any adapters'."""
    dtypes = leading_dtypes(requests)
    agree = all([agrees(request, dtypes) for request in requests])
    return dtypes if agree else "projections of differing dtypes"
