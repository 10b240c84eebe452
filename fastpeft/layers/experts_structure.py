"""Which modules hold experts that the op can compute: by their parameters, and by what they give on random numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.activation import KINDS
from fastpeft_kernels.experts import CLAMPED_SWIGLU, ExpertProjection, Experts, Gating
from fastpeft_kernels.experts.reference import lora_experts_reference
from fastpeft_kernels.weights import DenseWeight

from ..integrations.transformers import experts_implementation
from .mlp_structure import FEATURES, SCALES, WIDTH, close_by_rows, computes, functions_among
from .proving import failure, takes

TOP_K = 2
LARGEST = 1e9
"""From here on a limit is none: no value in an MLP is so large."""


@dataclass(frozen=True)
class ExpertRoles:
    """What the parameters of a module of experts are.

    Attributes:
        inner, down: names of the stacks of matrices, (experts, out, in), or (experts, in, out) if `transposed`.
        biased: whether each has a bias, of its name and "_bias".
        gating: what stands between the two.
        even: whether x is all that is passed: as many rows for each expert, one expert after the other (Llama 4). Else
            (x, index, weights).
    """

    inner: str
    down: str
    transposed: bool
    biased: bool
    gating: Gating
    even: bool = False

    def experts(self, parameters: Any, adapters: dict[str, Any]) -> Experts:
        """As the op takes them: `parameters` by name, and the `ExpertAdapter`s of each stack."""
        inner, down = (self._projection(name, parameters, adapters.get(name, ())) for name in (self.inner, self.down))
        return Experts(inner, down, self.gating)

    def names(self) -> tuple[str, ...]:
        """Of all parameters."""
        stacks = (self.inner, self.down)
        return (*stacks, *(f"{name}_bias" for name in stacks if self.biased))

    def _projection(self, name: str, parameters: Any, adapters: tuple[Any, ...]) -> ExpertProjection:
        stack: Tensor = parameters[name]
        transposed = self.transposed
        if not stack.is_contiguous():
            stack, transposed = stack.mT, not transposed
        bias = parameters[f"{name}_bias"] if self.biased else None
        return ExpertProjection(DenseWeight(stack.flatten(0, 1)), stack.shape[0], transposed, bias, adapters)


def settings(module: nn.Module) -> dict[str, Any]:
    """What beside its parameters decides what a module of experts computes; of the proof, and at each call."""
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    own = {name: value for name, value in numbers.items() if not name.startswith("_") and name != "training"}
    return {"class": type(module), "implementation": experts_implementation(module), **own, **module._modules}


def candidates(module: nn.Module) -> list[ExpertRoles]:
    """All that the module could be by its parameters and children alone; empty when it holds no such experts."""
    parameters = dict(module.named_parameters(recurse=False))
    stacks = {name: tuple(p.shape) for name, p in parameters.items() if p.dim() == 3 and min(p.shape) > 0}
    functions = functions_among(module.children())
    if len(stacks) != 2 or len(functions) > 1 or len({shape[0] for shape in stacks.values()}) != 1:
        return []
    if any(module.buffers()) or any(next(f.parameters(), None) is not None or any(f.children()) for f in functions):
        return []
    evens = [even for even in (False, True) if takes(module, 1 if even else 3)] or [False]
    found = []
    shapes = product(evens, permutations(stacks), (False, True), (False, True))
    for even, (inner, down), transposed, biased in shapes:
        into, width = stacks[inner][1:] if transposed else stacks[inner][:0:-1]
        features, out = stacks[down][1:] if transposed else stacks[down][:0:-1]
        if into != out or width not in (features, 2 * features):
            continue
        for gating in _gatings(module, functions, gated=width == 2 * features):
            roles = ExpertRoles(inner, down, transposed, biased, gating, even)
            if set(roles.names()) == set(parameters):
                found.append(roles)
    return found


def proved(module: nn.Module, wanted: list[ExpertRoles]) -> ExpertRoles | str:
    """The one of `wanted` that gives what the module's forward gives, or why there is none; leaves no trace.

    Tried is the module's own code on (x, index, weights), or x alone, over small random matrices in fp32 in place of
    its own: with `training` on and off, on small and large inputs, beyond any limit that it may have, with experts that
    get no row and tokens that choose one twice. What takes both is served with a routing.
    """
    fitting: list[ExpertRoles] = []
    errors: list[Exception] = []
    limits = dict.fromkeys(roles.gating.limit for roles in wanted)
    scales = (*SCALES, *(4.0 * limit for limit in limits if 4.0 * limit > SCALES[-1]))
    for roles in wanted:  # without a gate either stack could be the inner one, by its shape
        try:
            if _fits(module, roles, scales):
                fitting.append(roles)
        except Exception as error:
            errors.append(error)
    fitting = [roles for roles in fitting if not roles.even] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        return "it computes more than one known kind of experts alike"
    return failure(errors[0]) if len(errors) == len(wanted) else "it computes something else than experts"


def _fits(module: nn.Module, roles: ExpertRoles, scales: tuple[float, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    twin: Any = _twin(module, roles, generator)
    experts, *sizes = twin._parameters[roles.inner].shape
    times = experts if roles.even else 4
    rows = times * len(scales)
    x = torch.randn((rows, sizes[0 if roles.transposed else 1]), generator=generator)
    x = x * torch.tensor(scales).repeat(times)[:, None]
    if roles.even:
        routing = even_routing(x, experts, x.dtype)
    else:
        index = torch.randint(experts, (rows, TOP_K), generator=generator)
        routing = index, torch.rand((rows, TOP_K), generator=generator)
    passed = () if roles.even else routing
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        ours = lora_experts_reference(x, *routing, roles.experts(twin._parameters, {}), torch.float32)
        for training in (True, False):
            twin.training = training
            if not close_by_rows(ours, type(module).forward(twin, x.clone(), *(t.clone() for t in passed))):
                return False
    return True


def even_routing(x: Tensor, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(index, weights) of x (rows, in_features) whose rows are equal parts, one an expert; weights of ones."""
    index = torch.arange(experts, device=x.device).unsqueeze(1).expand(experts, x.shape[0] // experts)
    return index.reshape(-1, 1), torch.ones((x.shape[0], 1), dtype=dtype, device=x.device)


def _twin(module: nn.Module, roles: ExpertRoles, generator: torch.Generator) -> nn.Module:
    """The module with small matrices in place of its own, on the CPU; even ones tell experts apart by x's own width."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name != "forward"})
    experts, *sizes = module.get_parameter(roles.inner).shape
    outer = sizes[0 if roles.transposed else 1] if roles.even else WIDTH
    width = FEATURES * (2 if roles.gating.gated else 1)
    made: dict[str, nn.Parameter] = {}
    for name, (out, into) in ((roles.inner, (width, outer)), (roles.down, (outer, FEATURES))):
        shape = (experts, into, out) if roles.transposed else (experts, out, into)
        made[name] = nn.Parameter(torch.randn(shape, generator=generator) / into**0.5, requires_grad=False)
        if roles.biased:
            offset = torch.randn((experts, out), generator=generator)
            made[f"{name}_bias"] = nn.Parameter(offset, requires_grad=False)
    twin.__dict__["_parameters"] = made
    return twin


def _gatings(module: nn.Module, functions: list[nn.Module], gated: bool) -> list[Gating]:
    kinds = KINDS if not functions else [kind for kind in KINDS if computes(functions[0], kind)]
    layouts = (False, True) if gated else (False,)
    found = [Gating(kind, gated, interleaved) for kind in kinds for interleaved in layouts]
    if gated and (not functions or computes(functions[0], "silu")):
        limits = [limit for limit in _numbers(module, "limit") if limit < LARGEST]
        alphas = dict.fromkeys((*_numbers(module, "alpha"), 1.0))
        clamped = product(layouts, alphas, limits, (1.0, 0.0))
        found += [Gating(CLAMPED_SWIGLU, gated, *numbers) for numbers in clamped]
    return found


def _numbers(module: nn.Module, word: str) -> list[float]:
    """The finite ones among the module's attributes whose name ends so."""
    named = {name: value for name, value in vars(module).items() if name.endswith(word)}
    numbers = [float(value) for value in named.values() if type(value) in (int, float)]
    return list(dict.fromkeys(number for number in numbers if math.isfinite(number)))
