"""Module by module: an accelerated layer, MLP, wrapper of experts, embedding or norm against PEFT's and a copy in fp64.

Our error against the truth may be twice PEFT's own (in the same dtype and autocast state) plus one rounding, and a
little more where few numbers leave much to chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .layers.embedding import FastEmbedding
from .layers.experts import FastExperts
from .layers.lora import FastLoraLayer
from .layers.lycoris import FastLycorisLayer
from .layers.mlp import FastMlp
from .layers.norm import FEW, FastNorm
from .layers.siblings import Sibling
from .layers.tokens import FastTokens
from .verification_states import Wide, child_copy, in_fp64, norm_in_fp64, suspended, whole_in_fp64

Layer = Sibling | FastLycorisLayer
Whole = FastMlp | FastExperts | FastEmbedding | FastTokens
"""What is checked by itself, not with its siblings."""


@dataclass(frozen=True)
class Check:
    """One compared quantity.

    Attributes:
        path: the module, or "" for the whole model.
        what: output, gradient of x, of a gate, of a parameter, or loss.
        error: ours; relative to the largest magnitude of the truth (module) or to PEFT's norm (whole model).
        reference: PEFT's own error against fp64 (module), or the twin's distance from PEFT (whole model).
        budget: what the error may be.
    """

    path: str
    what: str
    error: float
    reference: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False for NaN


@dataclass(frozen=True)
class Rounding:
    """PEFT's own errors in the modules, given their inputs.

    Attributes:
        outputs: root mean square of the output's error, by path.
        gradients: norm of a parameter's gradient's error over the gradient's, by the parameter's name.
    """

    outputs: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)

    def note(self, path: str, module: nn.Module, peft: _Derived, exact: _Derived, which: int) -> None:
        """Of the module at `path`, the `which`-th that was differentiated."""
        self.outputs[path] = (peft.outputs[which].double() - exact.outputs[which]).square().mean().sqrt().item()
        names = [f"{path}.{name}" for name, p in module.named_parameters() if p.requires_grad]
        for name, got, truth in zip(names, peft.parameters[which], exact.parameters[which], strict=True):
            self.gradients[name] = _norm(got.double() - truth) / (_norm(truth) or 1.0)


def check_layers(layers: dict[str, Layer], traffic: dict[str, list[Tensor]]) -> tuple[list[Check], Rounding]:
    """Checks of every layer, group by group."""
    checks: list[Check] = []
    rounding = Rounding()
    paths = {id(layer): path for path, layer in layers.items()}
    done: set[int] = set()
    for layer in layers.values():
        if id(layer) in done:
            continue
        group = getattr(layer, "fastpeft_group", None)
        members: Sequence[Layer] = [layer] if group is None else group.members
        done.update(map(id, members))
        members = [member for member in members if len(traffic.get(paths[id(member)], ())) == 2]
        inputs = [traffic[paths[id(member)]] for member in members]
        with torch.enable_grad():
            requests = [m.request(x.requires_grad_()) for m, (x, _) in zip(members, inputs, strict=True)]
        served = [i for i, request in enumerate(requests) if not isinstance(request, str)]
        if served:
            together = [members[i] for i in served]
            x, dys = inputs[served[0]][0], [inputs[i][1] for i in served]
            checks += _check_group([paths[id(m)] for m in together], together, x, dys, rounding)
        for member in members:
            traffic.pop(paths[id(member)])
    return checks, rounding


def _check_group(
    paths: list[str], members: Sequence[Layer], x: Tensor, dys: list[Tensor], rounding: Rounding
) -> list[Check]:
    parameters = [_trained(member) for member in members]
    ours = _differentiate(members, x, dys, parameters)
    with suspended(dict(zip(paths, members, strict=True))):
        peft = _differentiate(members, x, dys, parameters)
    exact = _Derived([], torch.zeros_like(x, dtype=torch.float64), [])
    for member, dy in zip(members, dys, strict=True):  # one fp64 copy at a time
        wide = in_fp64(member)
        with torch.autocast(x.device.type, enabled=False):
            part = _differentiate([wide], x.double(), [dy.double()], [_trained(wide)])
        exact = _Derived([*exact.outputs, *part.outputs], exact.x + part.x, [*exact.parameters, *part.parameters])
    checks = []
    for i, path in enumerate(paths):
        rounding.note(path, members[i], peft, exact, i)
        checks.append(_check(path, "output", ours.outputs[i], peft.outputs[i], exact.outputs[i]))
        triples = zip(ours.parameters[i], peft.parameters[i], exact.parameters[i], strict=True)
        checks += [_check(path, "gradient of a parameter", *triple) for triple in triples]
    checks.append(_check(paths[0], "gradient of x", ours.x, peft.x, exact.x))
    return checks


def check_wholes(wholes: Mapping[str, Whole], traffic: dict[str, list[Tensor]]) -> tuple[list[Check], Rounding]:
    """Checks of all that the ops served, each as a whole."""
    checks: list[Check] = []
    rounding = Rounding()
    for path, module in wholes.items():
        *inputs, dy = traffic.pop(path, [torch.empty(0)])
        if not inputs or (len(inputs) > 1 and not isinstance(module, FastExperts)):
            continue
        if isinstance(module.request(*inputs), str):
            continue
        x, *routing = inputs
        parts = {name: part for name, part in module.named_modules() if isinstance(part, (FastLoraLayer, FastExperts))}
        trained = [_trained(module)]
        ours = _differentiate([module], x, [dy], trained, routing)
        with suspended({**parts, path: module}):
            peft = _differentiate([module], x, [dy], trained, routing)
        wide = whole_in_fp64(module)
        x, *routing = [t.double() if t.is_floating_point() else t for t in inputs]
        with torch.autocast(x.device.type, enabled=False):
            exact = _differentiate([wide], x, [dy.double()], [_trained(wide)], routing)
        rounding.note(path, module, peft, exact, 0)
        checks.append(_check(path, "output", ours.outputs[0], peft.outputs[0], exact.outputs[0]))
        triples = zip(ours.parameters[0], peft.parameters[0], exact.parameters[0], strict=True)
        checks += [_check(path, "gradient of a parameter", *triple) for triple in triples]
        if x.is_floating_point():
            checks.append(_check(path, "gradient of x", ours.x, peft.x, exact.x))
    return checks, rounding


def check_norms(norms: Mapping[str, FastNorm], traffic: dict[str, list[Tensor]]) -> list[Check]:
    """Checks of every norm that the op serves, however few its numbers."""
    checks: list[Check] = []
    for path, norm in norms.items():
        *inputs, dy = traffic.pop(path, [torch.empty(0)])
        if norm.why_not(*inputs) not in (None, FEW):
            continue
        x, *gate = [t.clone().requires_grad_() for t in inputs]
        leaves = [[*gate, *_trained(norm)]]
        ours = _differentiate([norm.fused], x, [dy], leaves, gate)
        with suspended({path: norm}):
            peft = _differentiate([norm], x, [dy], leaves, gate)
        wide = norm_in_fp64(norm)
        gate = [t.detach().double().requires_grad_() for t in gate]
        with torch.autocast(x.device.type, enabled=False), Wide():
            exact = _differentiate([wide], x.double(), [dy.double()], [[*gate, *_trained(wide)]], gate)
        checks.append(_check(path, "output", ours.outputs[0], peft.outputs[0], exact.outputs[0]))
        checks.append(_check(path, "gradient of x", ours.x, peft.x, exact.x))
        triples = zip(ours.parameters[0], peft.parameters[0], exact.parameters[0], strict=True)
        for i, triple in enumerate(triples):
            checks.append(_check(path, "gradient of the gate" if i < len(gate) else "gradient of a parameter", *triple))
    return checks


def rounding_of_heads(heads: Mapping[str, nn.Module], traffic: dict[str, list[Tensor]]) -> dict[str, float]:
    """By path, the root mean square of the error that the model's own head makes in its logits.

    A loss without logits makes none, so it is that far from PEFT's.
    """
    found = {}
    for path, head in heads.items():
        inputs = traffic.pop(path, [])
        if len(inputs) == 2:
            x = inputs[0]
            with torch.no_grad(), suspended({path: head}):
                logits = head(x)
            wide = child_copy(head).double()
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                found[path] = (logits.double() - wide(x.double())).square().mean().sqrt().item()
    return found


@dataclass
class _Derived:
    outputs: list[Tensor]
    x: Tensor
    parameters: list[list[Tensor]]


def _differentiate(
    layers: Sequence[Callable[..., Tensor]],
    x: Tensor,
    dys: list[Tensor],
    parameters: Sequence[Sequence[Tensor]],
    more: Sequence[Tensor] = (),
) -> _Derived:
    with torch.enable_grad():
        x = x.detach().clone()
        x.requires_grad_(x.is_floating_point())
        outputs = [layer(x, *more) for layer in layers]
        flat = [p for group in parameters for p in group]
        wanted = [x, *flat] if x.requires_grad else flat
        gradients = iter(torch.autograd.grad(outputs, wanted, dys, allow_unused=True))
    dx = next(gradients) if x.requires_grad else None
    grouped = [[_or_zero(next(gradients), p) for p in group] for group in parameters]
    return _Derived([y.detach() for y in outputs], _or_zero(dx, x), grouped)


def _trained(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def _check(path: str, what: str, ours: Tensor, peft: Tensor, exact: Tensor) -> Check:
    """The larger of the two budgets' uses: largest element, and norm.

    Errors of one distribution differ by chance, the more the fewer numbers there are, and their largest element more
    than their norm.
    """
    eps = torch.finfo(ours.dtype).eps
    slack = 2.0 * (1.0 + 4.0 / max(ours.numel(), 1) ** 0.5)
    worst = None
    for measure, allowed in ((lambda t: t.abs().max().item() if t.numel() else 0.0, 2.0 * slack), (_norm, slack)):
        scale = measure(exact) or 1.0
        error = measure(ours.double() - exact) / scale
        reference = measure(peft.double() - exact) / scale
        check = Check(path, what, error, reference, allowed * reference + eps)
        if worst is None or not check.passed or check.error / check.budget > worst.error / worst.budget:
            worst = check
    assert worst is not None
    return worst


def _norm(t: Tensor) -> float:
    return t.norm().item()


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
